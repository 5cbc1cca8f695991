"""`python -m train.quantize RUN` runs `train.artifact.requantize` by name: this package may not import that one."""

import runpy

runpy.run_module("train.artifact.requantize", run_name="__main__", alter_sys=True)

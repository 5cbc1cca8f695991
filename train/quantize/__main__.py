"""`python -m train.quantize RUN` runs `train.artifact.requantize`, which this package must not import."""

import runpy

runpy.run_module("train.artifact.requantize", run_name="__main__", alter_sys=True)

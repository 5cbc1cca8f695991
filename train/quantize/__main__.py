"""`python -m train.quantize RUN` runs `train.artifact.requantize`; `train.quantize` may not import `train.artifact`."""

import runpy

runpy.run_module("train.artifact.requantize", run_name="__main__", alter_sys=True)

"""`python -m train.quantize RUN`: the old name of `python -m train.artifact.requantize RUN`."""

import runpy

runpy.run_module("train.artifact.requantize", run_name="__main__", alter_sys=True)

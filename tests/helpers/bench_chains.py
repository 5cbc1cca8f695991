"""All benchmarks that define a `Chain`. `BENCHES` maps the operator's name to the module `benchmarks/bench_*.py`."""

import importlib
from pathlib import Path

import benchmarks

_MODULES = [
    importlib.import_module(f"benchmarks.{path.stem}") for path in Path(benchmarks.__file__).parent.glob("bench_*.py")
]
BENCHES = {module.CHAIN.op: module for module in _MODULES if hasattr(module, "CHAIN")}

"""The import direction csrc → golf_kernels → train → benchmarks, read from the sources."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = {"golf_kernels", "train", "benchmarks", "tests", "setup"}
# what each part may import besides the standard library; train's list is open, except for these
KERNELS_MAY = {"torch", "golf_kernels", "triton"}
TRAIN_MAY_NOT = {"triton", "benchmarks", "tests", "setup"}
# the way of a run through train's folders: none imports from one that comes later, but for what is started by hand or
# looks at all of them from outside
WALK = ("data", "model", "optimize", "quantize", "single_file", "artifact", "evaluate", "submission")
STARTED = {"__main__.py", "requantize.py", "modules.py"}


def imports(source, package=""):
    """(top-level module, line, guarded) of every import, relative ones resolved, in functions and strings of calls too."""
    tree = ast.parse(source)
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.Try, ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [package if node.level else node.module]
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        for name in names:
            yield name.split(".")[0], node.lineno, node in guarded


def sources(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def foreign(path, package, allowed):
    standard = set(sys.stdlib_module_names)
    found = imports(path.read_text(), package)
    return [f"{path.name}:{line} imports {name}" for name, line, _ in found if name not in standard | allowed]


@pytest.mark.parametrize("path", sources("golf_kernels"), ids=lambda path: path.name)
def test_golf_kernels_imports_torch_and_guarded_triton_only(path):
    assert foreign(path, "golf_kernels", KERNELS_MAY) == []
    if path.name.endswith("_triton.py"):
        # such a file can be pasted into a single-file script, behind the ones of its kind that it imports
        others = re.sub(r"^from golf_kernels\.\w+_triton import .*$", "", path.read_text(), flags=re.MULTILINE)
        found = {name for name, _, _ in imports(others, "golf_kernels")} - set(sys.stdlib_module_names)
        assert found <= {"torch", "triton"}
    else:
        unguarded = [line for name, line, guarded in imports(path.read_text()) if name == "triton" and not guarded]
        assert unguarded == []


@pytest.mark.parametrize("path", sources("train"), ids=lambda path: str(path.relative_to(ROOT)))
def test_train_imports_neither_triton_nor_what_is_above_it(path):
    found = imports(path.read_text(), "train")
    assert [f"{path.name}:{line} imports {name}" for name, line, _ in found if name in TRAIN_MAY_NOT] == []


@pytest.mark.parametrize("room", WALK)
def test_no_folder_of_train_looks_ahead_on_the_walk(room):
    later = {f"train.{name}" for name in WALK[WALK.index(room) + 1 :]}
    found = []
    for path in sources(f"train/{room}"):
        if path.name in STARTED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and ".".join((node.module or "").split(".")[:2]) in later:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module}")
    assert found == []


def test_nothing_imports_the_tests_and_setup_needs_no_torch():
    for path in sources("benchmarks"):
        assert not {name for name, _, _ in imports(path.read_text(), "benchmarks")} & {"tests", "setup"}
    found = {name for name, _, _ in imports((ROOT / "setup.py").read_text())}
    assert found - set(sys.stdlib_module_names) <= {"setuptools", "pybind11", "ninja"}


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
NEVER = re.compile(r"^((torch|ATen|c10|cutlass|cute|thrust|cub)/|cublas)")


def include_problems(name, source):
    for header in INCLUDE.findall(source):
        if NEVER.match(header):
            yield f"{name} includes {header}"
        if (header.startswith("pybind11") or header == "Python.h") and name != "bindings.cpp":
            yield f"{name} includes {header}, which only bindings.cpp may"


def test_csrc_knows_neither_python_nor_torch():
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
    assert {"launchers.h", "bindings.cpp"} <= {path.name for path in files}
    assert [problem for path in files for problem in include_problems(path.name, path.read_text())] == []


def test_the_readers_see_what_they_must():
    source = (
        "import torch.nn\nfrom train.config import Config\nfrom . import dispatch\n"
        "def f():\n    import triton\n    importlib.import_module('benchmarks.measure.common')\n"
        "try:\n    import numpy as np\nexcept ImportError:\n    np = None\n"
    )
    assert sorted(imports(source, "golf_kernels")) == [
        ("benchmarks", 6, True),
        ("golf_kernels", 3, False),
        ("numpy", 8, True),
        ("torch", 1, False),
        ("train", 2, False),
        ("triton", 5, True),
    ]
    text = (
        '#include <torch/extension.h>\n  # include "cublas_v2.h"\n#include <pybind11/pybind11.h>\n#include "int6.h"\n'
    )
    assert len(list(include_problems("int6.cu", text))) == 3
    assert len(list(include_problems("bindings.cpp", text))) == 2

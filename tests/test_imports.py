"""Which file may import which, read from the sources: csrc → golf_kernels → train → benchmarks, and the rooms of train."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = {"golf", "golf_kernels", "train", "benchmarks", "tests", "setup"}
# what each part may import besides the standard library; train's list is open, except for these
KERNELS_MAY = {"torch", "golf_kernels", "triton"}
TRAIN_MAY_NOT = {"triton", "benchmarks", "tests", "setup"}
# the rooms of train from the lowest to the highest: a folder, or a file at its top; none imports from a higher one
ROOMS = (
    "common", "config", "recipes", "data", "command_line", "single_file", "run", "model", "optimize", "checkpoint", "quantize",
    "artifact", "evaluate", "generate", "export", "loop", "describe", "submission", "runs", "pipeline", "train_gpt", "sweep", "__main__",
)  # fmt: skip
MOST_AT_THE_TOP = 9
COMPILED = "golf_kernels._C"


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


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root, folders=("golf_kernels", "train")):
    """Module → the modules of these folders that it imports anywhere: in functions, for type checkers, by name in a call."""
    files = {module_name(path, root): path for folder in folders for path in sorted((root / folder).rglob("*.py"))}
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                found = {f"{source}.{alias.name}" for alias in node.names} - {COMPILED}
                # what is no module is a name in the package
                names |= {name if name in files else source for name in found}
            elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
        graph[module] = names & files.keys()
    return graph


def room(module):
    """The room of a module of train; None for other modules and for train itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "train" and len(parts) > 1 else None


def circle(graph):
    """Modules that import each other in a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def climbs(graph):
    """Imports of a higher room."""
    return [
        f"{module} imports {imported}"
        for module, found in graph.items()
        for imported in sorted(found)
        if room(module) and room(imported) and ROOMS.index(room(module)) < ROOMS.index(room(imported))
    ]


def test_no_files_import_each_other_in_a_circle():
    assert circle(import_graph(ROOT)) == []


def test_no_room_of_train_imports_from_a_higher_one():
    graph = import_graph(ROOT)
    assert {room(module) for module in graph} - {None} == set(ROOMS)
    assert climbs(graph) == []


def test_few_files_lie_at_the_top_of_train():
    assert len(list((ROOT / "train").glob("*.py"))) <= MOST_AT_THE_TOP


def test_the_old_name_of_requantize_imports_nothing_of_train():
    assert import_graph(ROOT)["train.quantize.__main__"] == set()


@pytest.mark.parametrize(
    "back",
    [
        "import train.loop",
        "from train.loop import train",
        "from train import loop",
        "from ..loop import train",
        "def f():\n    from train import loop",
        "if TYPE_CHECKING:\n    from train.loop import TrainResult",
        "importlib.import_module('train.loop')",
        "__import__('train.loop')",
    ],
)
def test_a_circle_and_a_climb_are_found_however_they_are_written(tmp_path, back):
    (tmp_path / "train/data").mkdir(parents=True)
    (tmp_path / "train/__init__.py").touch()
    (tmp_path / "train/data/__init__.py").touch()
    (tmp_path / "train/loop.py").write_text("from train.data.shards import read_shard")
    (tmp_path / "train/data/shards.py").write_text("import numpy\nfrom golf_kernels import _C")
    graph = import_graph(tmp_path)
    assert graph["train.loop"] == {"train.data.shards"} and not circle(graph) and not climbs(graph)
    (tmp_path / "train/data/shards.py").write_text(back)
    graph = import_graph(tmp_path)
    assert set(circle(graph)) == {"train.loop", "train.data.shards"}
    assert climbs(graph) == ["train.data.shards imports train.loop"]


def test_nothing_imports_the_tests_and_setup_needs_no_torch():
    for path in sources("benchmarks"):
        assert not {name for name, _, _ in imports(path.read_text(), "benchmarks")} & {"tests", "setup"}
    found = {name for name, _, _ in imports((ROOT / "setup.py").read_text())}
    assert found - set(sys.stdlib_module_names) <= {"setuptools", "pybind11", "ninja"}


def test_no_test_imports_a_test():
    tests = {path.stem for path in sources("tests") if path.stem.startswith("test_")}
    assert len(tests) == len([path for path in sources("tests") if path.stem.startswith("test_")])
    assert not {name for path in sources("tests") for name, _, _ in imports(path.read_text())} & tests


def test_files_are_short():
    # a kernel that is pasted into a script is one file
    long = {"golf_kernels/newton_schulz_triton.py", "golf_kernels/leaky_relu2_mlp_triton.py"}
    folders = ("golf", "golf_kernels", "train", "benchmarks", "examples", "tests")
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for f in folders for path in sources(f)}
    assert {name for name, count in lines.items() if count > 400} == long


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

"""The installation in each of its modes, on copies of the source tree; torch is hidden from all of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what pip runs, with torch out of reach
HOOK = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; print(build_meta.{}({!r}))"
HAS_CXX = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
FAKE_CXX = """#!/bin/sh
echo "$0 $*" >> {log}
case "$*" in *--version*) echo "fake g++ 1.0"; exit 0;; esac
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; elif [ "$1" = -MF ]; then echo "x.o:" > "$2"; fi; shift; done
"""
FAKE_NVCC = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 99.1, V99.1.7"; exit 0;;
*--dryrun*) echo '#$ TOP=/opt/somewhere/cuda/bin/..' >&2; exit 0;;
esac
if [ -n "$BREAK_NVCC" ]; then echo "nvcc fatal: broken on purpose" >&2; exit 1; fi
exec {cxx} "$@"
"""


def copy_of_the_tree(folder):
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("made by a test\n")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(
        ROOT / "golf_kernels", folder / "golf_kernels", ignore=shutil.ignore_patterns("_*.so", "_*.json", "__pycache__")
    )
    for name in ("train", "benchmarks", "golf"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def build(tree, hook, **environment):
    """Runs a hook; a variable that is None is removed. Returns the exit status, the output and the unpacked package."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME")}
    kept = {name: value for name, value in kept.items() if not name.startswith("GOLF_")}
    out = tree / "out"
    shutil.rmtree(out, ignore_errors=True)
    result = subprocess.run(
        [sys.executable, "-c", HOOK.format(hook, str(out))],
        cwd=tree,
        env=kept | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wheel = next(out.glob("*.whl"), None) if out.is_dir() else None
    if wheel is not None:
        zipfile.ZipFile(wheel).extractall(out / "site")
    return result.returncode, result.stdout, wheel


def build_info(package):
    return json.loads((package / "_build_info.json").read_text())


def ask_native(site, code):
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from golf_kernels import native; {code}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=site).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A tree whose C++ part is compiled, and the wheel of it."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("compiled"))
    status, output, wheel = build(tree, "build_wheel", GOLF_SKIP_CUDA="1")
    assert status == 0, output
    return tree, wheel


@pytest.fixture
def tree(tmp_path):
    return copy_of_the_tree(tmp_path)


@pytest.fixture
def fake_toolkit(tmp_path):
    """Compilers that write down their command lines and leave empty files."""
    folder = tmp_path / "toolkit" / "bin"
    folder.mkdir(parents=True)
    (folder / "fakecxx").write_text(FAKE_CXX.format(log=folder / "log"))
    (folder / "nvcc").write_text(FAKE_NVCC.format(cxx=folder / "fakecxx"))
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
def test_a_compiler_gives_a_wheel_with_the_extension_and_nothing_else_on_top(compiled):
    tree, wheel = compiled
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"golf", "golf_kernels", "golf_kernels-0.2.0.dist-info"}
    assert "golf_kernels/py.typed" in names and "none-any" not in wheel.name
    assert {"train/__init__.py", "benchmarks/__init__.py", "csrc/int6.cpp"} <= {
        name.removeprefix("golf_kernels/_apps/") for name in names
    }
    package = tree / "out" / "site" / "golf_kernels"
    information = build_info(package)
    assert (package / information["extension"]).is_file()
    assert information["cpp"]["built"] and "-O3" in information["cpp"]["flags"] and information["cpp"]["version"]
    assert information["cuda"]["built"] is False
    assert information["cuda"]["reason"] == "switched off by GOLF_SKIP_CUDA=1"
    (metadata,) = (tree / "out" / "site").glob("*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    assert [package for package in needed if "extra ==" not in package] == ["torch>=2.11"]
    answer = ask_native(package.parent, "print(native.extension().abi == native.ABI, native.problem('cuda'))")
    assert answer.startswith("True not built: switched off by GOLF_SKIP_CUDA=1; to change that, unset GOLF_SKIP_CUDA")


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
def test_an_editable_installation_reuses_the_objects_and_can_lose_its_compiler(compiled, tmp_path):
    tree, _ = compiled
    status, output, _ = build(tree, "build_editable", GOLF_SKIP_CUDA="1")
    assert status == 0 and "no work to do" in output, output
    extension = tree / "golf_kernels" / build_info(tree / "golf_kernels")["extension"]
    assert extension.is_file() and not (tree / "golf_kernels" / "_apps").exists()
    status, output, _ = build(tree, "build_editable", PATH=str(tmp_path))
    assert status == 0, output
    assert not extension.exists()
    assert build_info(tree / "golf_kernels")["extension"] is None
    assert not list((tree / "golf_kernels").glob("_*.new"))


@pytest.mark.parametrize(("target", "installed"), [("run", [".[train]"]), ("test", [".[train]", ".[train,test]"])])
def test_the_tools_of_the_tests_are_installed_for_the_tests_alone(target, installed, tmp_path):
    command = ["make", "-n", target, f"VENV={tmp_path}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r'--editable "(.*?)"', plan) == installed
    assert ("triton" in plan) == (target == "test")


def test_no_compiler_gives_a_pure_wheel_that_says_why(tree):
    status, output, wheel = build(tree, "build_wheel", PATH=str(tree))
    assert status == 0, output
    assert wheel.name == "golf_kernels-0.2.0-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_C" in name]
    information = build_info(tree / "out" / "site" / "golf_kernels")
    assert information["extension"] is None
    for part in ("cpp", "cuda"):
        assert information[part]["built"] is False
        assert information[part]["reason"] == "no C++ compiler: g++, c++ and clang++ are not on PATH"
        assert "apt install g++" in information[part]["remedy"]
    code = "print(native.problem('cpp')); native.extension()"
    with pytest.raises(subprocess.CalledProcessError) as error:
        ask_native(tree / "out" / "site", code)
    assert "not built: no C++ compiler" in error.value.stdout
    assert "RuntimeError: golf_kernels._C: not built: no C++ compiler" in error.value.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"CUDA_HOME": "/nowhere"},
            "GOLF_FORCE_CUDA=1, but no nvcc: CUDA_HOME=/nowhere has no bin/nvcc; to repair it, inst",
        ),
        (
            {"CXX": "/nowhere/g++"},
            "GOLF_FORCE_CUDA=1, but no C++ compiler: CXX names /nowhere/g++, which was not found",
        ),
        (
            {"GOLF_SKIP_CUDA": "1"},
            "GOLF_FORCE_CUDA=1, but switched off by GOLF_SKIP_CUDA=1; to repair it, unset GOLF_SKIP",
        ),
    ],
)
def test_forced_cuda_without_its_compiler_is_an_error(tree, fake_toolkit, environment, message):
    environment = {"CXX": str(fake_toolkit / "fakecxx"), "CUDA_HOME": str(fake_toolkit.parent)} | environment
    status, output, wheel = build(tree, "build_editable", GOLF_FORCE_CUDA="1", **environment)
    assert status != 0 and wheel is None
    assert message in output
    assert not list((tree / "golf_kernels").glob("_[Cb]*"))


def test_cuda_is_compiled_for_the_named_architectures_and_linked_statically(tree, fake_toolkit):
    environment = {"CXX": str(fake_toolkit / "fakecxx"), "PATH": f"{fake_toolkit}:{os.environ['PATH']}"}
    status, output, _ = build(tree, "build_wheel", GOLF_CUDA_ARCHS="80, 90a compute_89", **environment)
    assert status == 0, output
    cuda = build_info(tree / "out" / "site" / "golf_kernels")["cuda"]
    assert cuda["version"] == "99.1.7" and cuda["archs"] == ["80", "90a", "compute_89"]
    # the toolkit's own folder, and not the one of the wrapper on PATH
    assert cuda["toolkit"] == "/opt/somewhere/cuda"
    commands = (fake_toolkit / "log").read_text().splitlines()
    (compile_cu,) = [line for line in commands if "int6.cu " in line]
    assert "arch=compute_80,code=sm_80" in compile_cu and "arch=compute_90a,code=sm_90a" in compile_cu
    assert "arch=compute_89,code=compute_89" in compile_cu
    (link,) = [line for line in commands if "-shared" in line]
    assert "-cudart static" in link and "--exclude-libs,ALL" in link and "int6.cu.o" in link
    assert "-L/opt/somewhere/cuda/lib " in link
    assert any("-DGOLF_WITH_CUDA" in line for line in commands if "bindings.cpp " in line)


def test_a_broken_nvcc_or_architecture_fails_the_installation(tree, fake_toolkit):
    environment = {"CXX": str(fake_toolkit / "fakecxx"), "CUDA_HOME": str(fake_toolkit.parent)}
    status, output, wheel = build(tree, "build_editable", BREAK_NVCC="1", **environment)
    assert status != 0 and wheel is None
    assert "nvcc fatal: broken on purpose" in output
    assert "golf_kernels._C was not built" in output and "GOLF_SKIP_CUDA=1 installs without" in output
    assert not list((tree / "golf_kernels").glob("_[Cb]*"))
    status, output, _ = build(tree, "build_editable", GOLF_CUDA_ARCHS="sm_90", **environment)
    assert status != 0
    assert "GOLF_CUDA_ARCHS: expected architectures such as 80,90a or compute_80, found 'sm_90'" in output


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
def test_sources_that_do_not_compile_fail_the_installation(tree):
    launchers = tree / "csrc" / "launchers.h"
    launchers.write_text('#include "missing_on_purpose.h"\n' + launchers.read_text())
    status, output, wheel = build(tree, "build_editable", GOLF_SKIP_CUDA="1")
    assert status != 0 and wheel is None
    assert "missing_on_purpose.h" in output and "golf_kernels._C was not built" in output
    assert not list((tree / "golf_kernels").glob("_[Cb]*"))


@pytest.mark.skipif(not (HAS_CXX and shutil.which("nvcc")), reason="no nvcc")
def test_real_cuda_imports_without_a_driver_and_spills_nothing(compiled):
    tree, _ = compiled
    status, output, _ = build(tree, "build_wheel", GOLF_FORCE_CUDA="1")
    assert status == 0, output
    package = tree / "out" / "site" / "golf_kernels"
    cuda = build_info(package)["cuda"]
    assert cuda["archs"] == ["90a", "compute_80"]
    from triton import knobs

    (library,) = package.glob("_C*.so")
    listed = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-lelf", "-lptx", library], text=True)
    # the machine code of an H100, and the PTX that a driver compiles for the others
    assert set(re.findall(r"sm_\w+\.(?:cubin|ptx)", listed)) == {"sm_90.cubin", "sm_80.ptx"}
    assert ask_native(package.parent, "print(hasattr(native.extension(), 'int6_pack_cuda'))") == "True\n"
    kernels = {}
    for source in sorted((tree / "csrc").glob("*.cu")):
        command = [cuda["compiler"], *cuda["flags"], "-Xptxas", "-v", "-fatbin", source, "-o", os.devnull]
        report = subprocess.run(command, check=True, text=True, capture_output=True).stderr
        found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert set(found) == {("0", "0", "0")}, source
        kernels[source.name] = len(found)
    assert kernels == {"gptq.cu": 2, "int6.cu": 8}

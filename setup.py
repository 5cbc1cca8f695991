"""Installs golf_kernels. Builds the extension `golf_kernels._C`: finds compilers, writes build.ninja, runs ninja.

The build does not need torch. It compiles the C++ code if it finds a C++ compiler and Python's headers, and the CUDA
code if it also finds nvcc. Without a compiler the package is pure Python. `golf_kernels/_build_info.json` records what
was built, or why not. `python -m golf_kernels` prints this record.

Environment variables: CXX (C++ compiler), CUDA_HOME (CUDA toolkit), GOLF_CUDA_ARCHS (GPU architectures: "80,90a" for
machine code, "compute_80" for PTX, which the driver compiles for any GPU from 8.0 on; default "90a,compute_80"),
GOLF_SKIP_CUDA=1 (do not build CUDA), GOLF_FORCE_CUDA=1 (fail if CUDA cannot be built).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
AGAIN = "then install golf_kernels again (pip install --no-build-isolation --no-deps -e .)"
# with -ffp-contract=off a product is rounded before it is added, as in PyTorch
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-ffp-contract=off"]
CXX_FLAGS += ["-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# the CUDA runtime is linked statically and not exported, because torch may have another one in the same process
NVCC_LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]


class Missing(Exception):
    """A backend cannot be built here. The exception's arguments are the reason and what to type."""


def switched_on(name):
    return os.environ.get(name, "0") not in ("", "0")


def output_of(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def find_cxx():
    """Returns the command of the C++ compiler, as a list of words."""
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if command is None or not shutil.which(command[0]):
        why = f"CXX names {command[0]}, which was not found" if command else "g++, c++ and clang++ are not on PATH"
        raise Missing(f"no C++ compiler: {why}", f"apt install g++, or name a compiler in CXX, {AGAIN}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise Missing(f"no Python headers: {header} was not found", f"apt install python3-dev, {AGAIN}")
    return [shutil.which(command[0]), *command[1:]]


def find_nvcc():
    """Returns the path of nvcc: in CUDA_HOME if that is set, otherwise from PATH or /usr/local/cuda."""
    if switched_on("GOLF_SKIP_CUDA"):
        raise Missing("switched off by GOLF_SKIP_CUDA=1", f"unset GOLF_SKIP_CUDA, {AGAIN}")
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        why = f"CUDA_HOME={home} has no bin/nvcc" if home else "it is neither on PATH nor in /usr/local/cuda/bin"
        raise Missing(f"no nvcc: {why}", f"install a CUDA toolkit and set CUDA_HOME to it, {AGAIN}")
    return nvcc


def cpp_record(cxx):
    version = output_of(*cxx, "--version").splitlines()[0]
    return {"built": True, "compiler": shlex.join(cxx), "version": version, "flags": CXX_FLAGS}


def cuda_record(nvcc, cxx):
    archs = re.split(r"[,; ]+", os.environ.get("GOLF_CUDA_ARCHS", "90a,compute_80").strip())
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?|compute_\d{2,3}", arch):
            raise PlatformError(f"GOLF_CUDA_ARCHS: expected architectures such as 80,90a or compute_80, found {arch!r}")
    version = re.search(r"V(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    # nvcc may be a wrapper outside the toolkit, so the toolkit's folder is read from its dry run
    top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    toolkit = os.environ.get("CUDA_HOME") or (os.path.realpath(top[1].strip()) if top else None)
    # -ccbin takes one word; if the command has several (ccache g++), nvcc uses its default compiler
    flags = [*NVCC_FLAGS, *(["-ccbin", cxx[0]] if len(cxx) == 1 else [])]
    for arch in archs:
        code = f"arch={arch},code={arch}" if arch.startswith("compute_") else f"arch=compute_{arch},code=sm_{arch}"
        flags += ["-gencode", code]
    known = {"version": version[1] if version else "unknown", "toolkit": toolkit, "archs": archs, "flags": flags}
    return {"built": True, "compiler": nvcc, **known}


def find_records():
    """Returns the records of C++ and CUDA for _build_info.json: how each is built here, or why it cannot be."""
    cpp = cuda = None
    try:
        cxx = find_cxx()
        cpp = cpp_record(cxx)
        cuda = cuda_record(find_nvcc(), cxx)
    except Missing as missing:
        cuda = dict(zip(("built", "reason", "remedy"), (False, *missing.args), strict=True))
    if switched_on("GOLF_FORCE_CUDA") and not cuda["built"]:
        raise PlatformError(f"GOLF_FORCE_CUDA=1, but {cuda['reason']}; to repair it, {cuda['remedy']}")
    return cpp or cuda, cuda


def ninja_file(cpp, cuda):
    """Returns the text of build.ninja. Its commands are complete, so ninja compiles again when a flag changes."""
    import pybind11

    cxx = [*shlex.split(cpp["compiler"]), *cpp["flags"]]
    include = [f"-I{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    compile_cpp, link, suffixes = [*cxx, *include], [*cxx, "-shared"], [".cpp"]
    rules = {}
    if cuda["built"]:
        nvcc = [cuda["compiler"], *cuda["flags"]]
        # nvcc looks for the static runtime in lib64, but the pip package of nvcc 13.0 has it in lib
        libraries = [f"-L{cuda['toolkit']}/lib"] if cuda["toolkit"] else []
        compile_cpp, suffixes = [*compile_cpp, "-DGOLF_WITH_CUDA"], [".cpp", ".cu"]
        link = [*nvcc, *NVCC_LINK, *libraries]
        rules["cu"] = f"{shlex.join(nvcc)} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    rules["cpp"] = f"{shlex.join(compile_cpp)} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    rules["link"] = f"{shlex.join(link)} $in -o $out"
    lines = [f"rule {name}\n  command = {command}" for name, command in rules.items()]
    sources = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in suffixes)
    for source in sources:
        lines.append(f"build {source.name}.o: {source.suffix[1:]} " + re.sub(r"([$ :])", r"$\1", str(source)))
    lines.append(f"build {EXTENSION}: link " + " ".join(f"{source.name}.o" for source in sources))
    return "\n".join(lines) + "\n"


def compile_extension(cpp, cuda):
    """Runs ninja and returns the extension's path. Object files stay in build/native for the next installation."""
    folder = ROOT / "build" / "native" / (f"{sys.implementation.cache_tag}" + ("-cuda" if cuda["built"] else ""))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import ninja

        (folder / "build.ninja").write_text(ninja_file(cpp, cuda))
    except ImportError as error:
        raise PlatformError(f"{error}; type: pip install 'pybind11>=2.13' 'ninja>=1.11'") from None
    if subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder]).returncode:
        hint = "; GOLF_SKIP_CUDA=1 installs without the CUDA kernels" if cuda["built"] else ""
        raise CompileError(f"golf_kernels._C was not built, see the compiler's message above{hint}")
    return folder / EXTENSION


class BuildStep(Command):
    """A step of `build`. `build_lib` is the folder of the wheel's files; an editable installation uses the checkout."""

    user_options: ClassVar = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))


class BuildNative(BuildStep):
    """Puts the extension and the build record into the package."""

    def run(self):
        cpp, cuda = find_records()
        built = compile_extension(cpp, cuda) if cpp["built"] else None
        folder = ROOT / "golf_kernels" if self.editable_mode else Path(self.build_lib, "golf_kernels")
        record = {"extension": built and built.name, "cpp": cpp, "cuda": cuda}
        new = folder / "_C.new"
        if built:
            shutil.copy2(built, new)
            os.replace(new, folder / built.name)
        else:
            (folder / EXTENSION).unlink(missing_ok=True)
        new.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(new, folder / "_build_info.json")


class BuildApps(BuildStep):
    """Copies the packages that `golf` runs into golf_kernels/_apps. An editable installation runs the checkout's."""

    def run(self):
        for name in () if self.editable_mode else ("benchmarks", "csrc", "train"):
            folder = Path(self.build_lib, "golf_kernels", "_apps", name)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(ROOT / name, folder, ignore=shutil.ignore_patterns("__pycache__", "results", "plots"))


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None), ("build_apps", None)]


class NativeDistribution(Distribution):
    """Gives the wheel a platform tag if there is a compiler for the extension."""

    def has_ext_modules(self):
        try:
            return bool(find_cxx())
        except Missing:
            return False


setup(
    license="MIT",
    packages=["golf", "golf_kernels"],
    package_data={"golf_kernels": ["py.typed", "shipped/*.json"]},
    include_package_data=False,
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "build_apps": BuildApps},
)

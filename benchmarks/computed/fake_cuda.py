"""A process that has a CUDA device without CUDA, and its tensors without data: see fake_cuda.cpp, which this compiles."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train.common.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
# torch.library.Library carries no type hints
_LIBRARY: Any = torch.library.Library("aten", "IMPL")


class NoDevice(RuntimeError):
    """Nothing can stand in for the GPU that this PyTorch wants."""


def environment(folder: Path) -> dict[str, str]:
    """Variables under which a process has a CUDA device: the machine's own, or one that is made up.

    Args:
        folder: where the library is compiled to; the process needs it as long as it runs.

    Raises:
        NoDevice: this PyTorch is built for CUDA and finds no GPU.
        subprocess.CalledProcessError: the C++ compiler failed.
    """
    if torch.cuda.is_available():
        return dict(os.environ)
    if torch.version.cuda is not None:
        raise NoDevice("this torch is built for CUDA and finds no GPU, which nothing can stand in for")
    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    linked = [f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, SOURCE, "-o", library, *linked], check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def run_module(module: str, argv: Sequence[str]) -> int:
    """The exit code of `python -m benchmarks.MODULE` with these arguments, in such a process.

    Raises:
        UserError: nothing can stand in for a GPU here.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            variables = environment(Path(folder))
        except NoDevice as reason:
            raise UserError(f"{module}: {reason}: install a torch without CUDA, or run it on a GPU's machine") from None
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"{module}: needs a C++ compiler for its stand-in of a GPU: {error}") from error
        return subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *argv], env=variables).returncode


def tensors_without_data() -> FakeTensorMode:
    """The mode in which tensors of that device have a shape and no data."""
    # PyTorch itself knows AdamW without data where its rate is a number alone; it changes what it gets, and returns nothing
    rated = "_fused_adamw_.tensor_lr"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{rated}", "Meta"):
        _LIBRARY.impl(rated, lambda *_, **__: None, "Meta")
    return FakeTensorMode(allow_non_fake_inputs=True)

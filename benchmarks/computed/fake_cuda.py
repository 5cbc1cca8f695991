"""A fake CUDA device whose tensors have no data. This module compiles fake_cuda.cpp and loads it with LD_PRELOAD."""

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
    """This PyTorch cannot use the fake device."""


def environment(folder: Path) -> dict[str, str]:
    """Returns environment variables for a process that needs a CUDA device.

    Without a real GPU, this function compiles the fake device into `folder`, and the variables make a process load it.
    """
    if torch.cuda.is_available():
        return dict(os.environ)
    if torch.version.cuda is not None:
        raise NoDevice(
            "this torch is built for CUDA but finds no GPU, and only a torch without CUDA can use the fake device"
        )
    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    linked = [f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, SOURCE, "-o", library, *linked], check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def run_module(module: str, argv: Sequence[str]) -> int:
    """Run `python -m MODULE` in a process that has a real or fake CUDA device. Returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            variables = environment(Path(folder))
        except NoDevice as reason:
            raise UserError(f"{reason}: install a torch without CUDA, or run this on a machine with a GPU") from None
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"no C++ compiler for the fake GPU: {error}: install g++, or set CXX") from error
        return subprocess.run([sys.executable, "-m", module, *argv], env=variables).returncode


def tensors_without_data() -> FakeTensorMode:
    """Returns a mode in which new tensors have a shape and a device but no data."""
    # PyTorch has no kernel of fused AdamW for tensors without data if the learning rate is a tensor. The operation
    # returns nothing, so a kernel that does nothing suffices
    rated = "_fused_adamw_.tensor_lr"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{rated}", "Meta"):
        _LIBRARY.impl(rated, lambda *_, **__: None, "Meta")
    return FakeTensorMode(allow_non_fake_inputs=True)

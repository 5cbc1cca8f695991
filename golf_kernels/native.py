"""Imports the compiled extension `golf_kernels._C` and reports whether its C++ and CUDA backends can run.

Importing this module never fails, even without the extension. The extension's functions take addresses (`data_ptr()`),
sizes and the CUDA stream.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

# must equal GOLF_ABI in csrc/launchers.h
ABI = 2
REBUILD = "pip install --no-build-isolation --no-deps -e . in the source tree"
BUILD_INFO_PATH = Path(__file__).with_name("_build_info.json")

_extension: ModuleType | None = None
_import_error: str | None = None
try:
    from golf_kernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    _import_error = str(error)
else:
    _extension = _C


def build_info() -> dict[str, Any]:
    """Reads what the installation recorded about the build.

    Returns:
        `{"extension": file name or None, "cpp": {...}, "cuda": {...}}`. The entry of each backend has `built`. If
        `built` is True, the entry also has `compiler`, `version` and `flags`, and for `cuda` `archs` and `toolkit`.
        Otherwise it has `reason` and `remedy`. In a source tree that was never installed, neither backend is built.
    """
    if BUILD_INFO_PATH.is_file():
        information: dict[str, Any] = json.loads(BUILD_INFO_PATH.read_text())
        return information
    missing = {"built": False, "reason": "this source tree was never installed", "remedy": f"run {REBUILD}"}
    return {"extension": None, "cpp": missing, "cuda": missing}


def architectures(record: dict[str, Any]) -> str:
    """Names the GPU architectures in the record of a CUDA build: `sm_90a` is machine code, `compute_80` is PTX."""
    return ", ".join(arch if arch.startswith("compute_") else f"sm_{arch}" for arch in record["archs"])


def extension() -> Any:
    """Returns the extension module.

    Raises:
        RuntimeError: the extension cannot be used; the message says why and what to type.
    """
    problem = missing("cpp")
    if problem is not None:
        raise RuntimeError(f"golf_kernels._C: {problem}")
    return _extension


@functools.cache
def missing(backend: Literal["cpp", "cuda"]) -> str | None:
    """Returns the reason why this installation lacks a backend, and what to type. None if the backend is there."""
    record = build_info()[backend]
    if not record["built"]:
        # a packed script has no source tree to install
        if hasattr(sys.modules.get("__main__"), "PACKED_SCRIPT"):
            return "a packed script carries no compiled code; PyTorch gives the same values"
        return f"not built: {record['reason']}; to change that, {record['remedy']}"
    if _extension is None:
        return f"built, but it does not import: {_import_error}; to repair it, run {REBUILD}"
    if _extension.abi != ABI:
        return f"built from other sources (ABI {_extension.abi}, expected {ABI}); to renew it, run {REBUILD}"
    return None


def problem(backend: Literal["cpp", "cuda"]) -> str | None:
    """Returns the reason why a backend cannot run on this machine (`cuda`: on the current GPU), or None if it can."""
    absent = missing(backend)
    if absent is not None or backend == "cpp":
        return absent
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    return cuda_problem(torch.cuda.current_device())


@functools.cache
def cuda_problem(device: int) -> str | None:
    """Returns the reason why the CUDA kernels cannot run on a GPU, such as an old driver, or None if they can."""
    try:
        with torch.cuda.device(device):
            extension().cuda_probe()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{error} (built for {architectures(build_info()['cuda'])}, this GPU is sm_{major}{minor}); "
            f"to build for it, run GOLF_CUDA_ARCHS={major}{minor} {REBUILD}"
        )
    return None

"""The compiled extension `golf_kernels._C`: whether it is there, what it was built with, and if not, why.

Importing this module never fails. Python hands the extension addresses (`data_ptr()`), sizes and the CUDA stream.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

# the value of GOLF_ABI in csrc/launchers.h that this Python code was written for
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
    """What the installation recorded: `{"extension": name or None, "cpp": {...}, "cuda": {...}}`.

    Returns:
        Per part `built`; where it is True `compiler`, `version` and `flags` (and for `cuda` `archs` and `toolkit`),
        otherwise `reason` and `remedy`. A source tree that was never installed has both parts not built.
    """
    if BUILD_INFO_PATH.is_file():
        information: dict[str, Any] = json.loads(BUILD_INFO_PATH.read_text())
        return information
    missing = {"built": False, "reason": "this source tree was never installed", "remedy": f"run {REBUILD}"}
    return {"extension": None, "cpp": missing, "cuda": missing}


def extension() -> Any:
    """The extension module.

    Raises:
        RuntimeError: it is not there; the message says why and what to type.
    """
    problem = missing("cpp")
    if problem is not None:
        raise RuntimeError(f"golf_kernels._C: {problem}")
    return _extension


@functools.cache
def missing(part: Literal["cpp", "cuda"]) -> str | None:
    """Why a part of the extension cannot be used on any machine, and what to type; None where it can."""
    record = build_info()[part]
    if not record["built"]:
        # what a script was packed into knows no source tree
        if hasattr(sys.modules.get("__main__"), "PACKED_SCRIPT"):
            return "a single script carries no compiled code, and PyTorch's form gives the same values"
        return f"not built: {record['reason']}; to change that, {record['remedy']}"
    if _extension is None:
        return f"built, but it does not import: {_import_error}; to repair it, run {REBUILD}"
    if _extension.abi != ABI:
        return f"built from other sources (ABI {_extension.abi}, expected {ABI}); to renew it, run {REBUILD}"
    return None


def problem(part: Literal["cpp", "cuda"]) -> str | None:
    """Why a part cannot run on this machine (for `cuda`: on the current GPU); None where it can."""
    absent = missing(part)
    if absent is not None or part == "cpp":
        return absent
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    return cuda_problem(torch.cuda.current_device())


@functools.cache
def cuda_problem(device: int) -> str | None:
    """Why the CUDA kernels cannot run on one GPU (an architecture or a driver they were not built for), or None."""
    try:
        with torch.cuda.device(device):
            extension().cuda_probe()
    except RuntimeError as error:
        archs = ", ".join(build_info()["cuda"]["archs"])
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{error} (built for sm_{archs}, this GPU is sm_{major}{minor}); "
            f"to build for it, run GOLF_CUDA_ARCHS={major}{minor} {REBUILD}"
        )
    return None

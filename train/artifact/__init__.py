"""The artifact: one file that contains a model. To load it, only this file and the submission's code are needed.

`train.artifact.container` describes the file format byte by byte. `python -m train.artifact inspect|verify|diff|convert
FILE` shows, checks, compares or converts an artifact.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.artifact.storage import load_model, read_artifact

__all__ = ["load_model", "read_artifact"]


def __getattr__(name: str) -> Any:
    # imported at first use, so that commands in this package can print a line before importing torch, which takes
    # seconds
    if name in __all__:
        return getattr(importlib.import_module("train.artifact.storage"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

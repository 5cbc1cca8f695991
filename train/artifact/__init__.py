"""The artifact: one file that holds a model. Only this file and the submission's code are needed to load the model.

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
    # imported at first use: the commands in this package say something before torch takes seconds
    if name in __all__:
        return getattr(importlib.import_module("train.artifact.storage"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

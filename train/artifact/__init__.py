"""The artifact: one file that holds a model. Only this file and the submission's code are needed to load the model.

`train.artifact.container` describes the file format byte by byte. `python -m train.artifact inspect|verify|diff|convert
FILE` shows, checks, compares or converts an artifact.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.artifact.budget import ArtifactInfo, BudgetError, BudgetRow, budget_table
    from train.artifact.container import ArtifactError
    from train.artifact.storage import (
        MODEL_FIELDS,
        Artifact,
        EncodedArtifact,
        encode_artifact,
        load_model,
        read_artifact,
        write_artifact,
    )

__all__ = [
    "MODEL_FIELDS",
    "Artifact",
    "ArtifactError",
    "ArtifactInfo",
    "BudgetError",
    "BudgetRow",
    "EncodedArtifact",
    "budget_table",
    "encode_artifact",
    "load_model",
    "read_artifact",
    "write_artifact",
]


def __getattr__(name: str) -> Any:
    # imported at first use: the commands in this package say something before torch takes seconds
    if name in __all__:
        for module in ("budget", "container", "storage"):
            found = importlib.import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Checkpoints, from which a run resumes exactly, and the trained weights."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.files import atomic_write
from train.config import Config
from train.model.gpt import GPT
from train.run.folder import RunFolder


class Stateful(Protocol):
    """Something whose state a checkpoint stores."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> object: ...


Parts = Mapping[str, Stateful | None]
"""What a checkpoint stores, by name; None: not in this run."""


def save_checkpoint(path: Path, parts: Parts, ranks: Ranks, extra: Mapping[str, Any]) -> None:
    """Write the states of all parts, and plain values such as the step, atomically.

    All ranks must call this, because sharded states are gathered; rank 0 writes.
    """
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    if ranks.is_main:
        write_tensors(path, {"parts": states, **extra})


def load_checkpoint(path: Path, parts: Parts, ranks: Ranks) -> dict[str, Any] | None:
    """Load a checkpoint's states into the parts; return its `extra` values, or None if there is no checkpoint.

    Raises:
        UserError: the file is damaged, or its parts are others than this run's.
    """
    if not path.exists():
        return None
    saved = read_tensors(path, ranks.device)
    states = saved.pop("parts", None)
    wanted = {name: part for name, part in parts.items() if part is not None}
    if not isinstance(states, dict) or set(states) != set(wanted):
        found = sorted(states) if isinstance(states, dict) else "none"
        raise UserError(f"{path}: expected the state of {sorted(wanted)}, found {found}: delete it to start over")
    for name in sorted(wanted):
        wanted[name].load_state_dict(states[name])
    return saved


def write_tensors(path: Path, values: Mapping[str, Any]) -> None:
    """Write a dictionary of tensors and plain values atomically."""
    # torch.save writes to memory first, because it would replace the error for a full disk by its own
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    atomic_write(path, buffer.getbuffer())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file of `write_tensors`; code in the file is never executed.

    Raises:
        UserError: the file is damaged, or not written by `write_tensors`.
    """
    try:
        # torch.load does not check the checksums that torch.save wrote
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
        saved = torch.load(path, map_location=device, weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged or not written by this program ({reason}): delete it and train again"
        ) from error
    if not isinstance(saved, dict):
        raise UserError(
            f"{path}: expected a dictionary of states, found {type(saved).__name__}: delete it to start over"
        )
    return saved


def load_weights(folder: RunFolder, config: Config | None = None) -> GPT:
    """The trained model of a run, from weights.pt; `config` None: the run's own settings.

    Raises:
        UserError: training has not finished, or the file does not fit the settings.
    """
    model = GPT(config or folder.trained_config())
    path = folder.need(folder.weights, f"python -m train --run_id {folder.path.name} --resume auto")
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of this run ({str(error).splitlines()[0]}): train again") from error
    return model

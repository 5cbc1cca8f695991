"""Writes and reads checkpoints and the trained weights. A run that resumes from a checkpoint continues exactly."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from train.common.distributed import Ranks
from train.common.errors import UserError, is_out_of_memory
from train.common.files import atomic_write, refuse_device
from train.common.values import fits
from train.config import Config
from train.model.gpt import GPT
from train.run.folder import RunFolder


class Stateful(Protocol):
    """An object whose state a checkpoint stores."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> object: ...


Parts = Mapping[str, Stateful | None]
"""Name → object whose state the checkpoint stores; None: this run has no such object."""


class Reached(NamedTuple):
    """How far a run had come."""

    step: int  # number of finished steps
    seconds: float  # training time
    first: Mapping[str, Any]  # figures of the validation before the first step
    world_size: int | None  # number of ranks; None: an earlier version wrote the checkpoint, and did not say


def save_checkpoint(path: Path, parts: Parts, ranks: Ranks, reached: Reached) -> None:
    """Write the states of `parts` and the progress, atomically.

    Every rank must call this, because the optimizer's state is gathered from all ranks. Rank 0 writes the file.
    """
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    if ranks.is_main:
        write_tensors(path, {"parts": states, **reached._asdict()})


def load_checkpoint(path: Path, parts: Parts, ranks: Ranks, iterations: int) -> Reached | None:
    """Load a checkpoint's states into `parts`. Return its progress, or None if there is no checkpoint.

    Raises:
        UserError: the file is damaged, has states of other parts, or is beyond the last of `iterations` steps.
    """
    if not path.exists():
        return None
    saved = read_tensors(path, ranks.device)
    reached = _reached(path, saved)
    states = saved.get("parts")
    wanted = {name: part for name, part in parts.items() if part is not None}
    if not isinstance(states, dict) or set(states) != set(wanted):
        found = sorted(states) if isinstance(states, dict) else "none"
        raise UserError(f"{path}: expected the state of {sorted(wanted)}, found {found}: delete it to start over")
    if reached.step > iterations:
        raise UserError(
            f"{path}: is at step {reached.step}, but iterations is {iterations}: set ITERATIONS to at least {reached.step}"
        )
    for name in sorted(wanted):
        if not all(tensor.isfinite().all() for tensor in _tensors(states[name])):
            raise UserError(f"{path}: the state of {name} holds NaN or infinity: delete it to start over")
        try:
            wanted[name].load_state_dict(states[name])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # the file may be good
            if is_out_of_memory(error) or "CUDA" in str(error):
                raise
            reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
            raise UserError(
                f"{path}: the state of {name} is not that of this run ({reason}): delete it to start over"
            ) from error
    return reached


def _reached(path: Path, saved: Mapping[str, Any]) -> Reached:
    values: dict[str, Any] = {name: saved.get(name) for name in Reached._fields}
    step, seconds, first, world_size = values.values()
    loader = saved["parts"].get("loader") if isinstance(saved.get("parts"), dict) else None
    problems = {
        "step": not fits(step, int) or step < 0 or (isinstance(loader, dict) and loader.get("step") != step),
        "seconds": not fits(seconds, float) or seconds < 0,
        "first": not isinstance(first, dict),
        "world_size": world_size is not None and (not fits(world_size, int) or world_size < 1),
    }
    wrong = [f"{name} {str(values[name])[:80]}" for name, bad in problems.items() if bad]
    if wrong:
        raise UserError(f"{path}: not a checkpoint of a run ({', '.join(wrong)}): delete it to start over")
    return Reached(step, seconds, first, world_size)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)


def write_tensors(path: Path, values: Mapping[str, Any]) -> None:
    """Write a dictionary of tensors and plain values atomically."""
    # let torch.save write to memory: on a full disk it would raise an error that hides the reason
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    atomic_write(path, buffer.getbuffer())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file that `write_tensors` wrote. Code in the file is never executed.

    Raises:
        UserError: the file is damaged, or `write_tensors` did not write it.
    """
    refuse_device(path)
    try:
        # check the checksums in the file here, because torch.load does not check them
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
        # the file may be good
        if is_out_of_memory(error) or "CUDA" in str(error):
            raise
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
    """Load the trained model of a run from weights.pt. If `config` is None, use the run's settings.

    Raises:
        UserError: training has not finished, or weights.pt does not fit the settings.
    """
    model = GPT(config or folder.trained_config())
    path = folder.need(folder.weights, f"python -m train --run_id {folder.path.name} --resume auto")
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of this run ({str(error).splitlines()[0]}): train again") from error
    return model

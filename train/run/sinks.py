"""Optional loggers: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from train.common.errors import UserError


class Sink(Protocol):
    """A logger that receives the metrics of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to `<run>/tensorboard`, for `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        module = _library("tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {name}={value}" for name, value in settings.items()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to the project WANDB_PROJECT (default golf_kernels), or with WANDB_MODE=offline to the run folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = _library("wandb")
        project = os.environ.get("WANDB_PROJECT", "golf_kernels")
        name, values = folder.name, dict(settings)
        try:
            # the id is the folder's name, so that a resumed run continues its curves
            self._run = wandb.init(project=project, id=name, name=name, dir=str(folder), config=values, resume="allow")
        except wandb.errors.Error as error:
            raise UserError(
                f"loggers: wandb does not start ({error}): run wandb login, set WANDB_MODE=offline, or drop wandb from LOGGERS"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def sink_names(text: str) -> list[str]:
    """Return the names in the setting `loggers`, such as `tensorboard,wandb`. An unknown name raises a UserError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SINKS:
            raise UserError(f"loggers: expected {' or '.join(SINKS)}, separated by commas, got {name!r}")
    return names


def check_sinks(text: str) -> None:
    """Raise a UserError if a name in the setting `loggers` is unknown or its package is not installed."""
    for name in sink_names(text):
        _library(name)


def open_sinks(text: str, folder: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """Start the loggers named in the setting `loggers`. The loggers also store the run's settings.

    Raises:
        UserError: `check_sinks` refuses the setting, or Weights & Biases does not start.
    """
    return [SINKS[name](folder, settings) for name in sink_names(text)]


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UserError(
            f"loggers: {name} cannot be imported ({error}): pip install {name}, or drop it from LOGGERS"
        ) from error

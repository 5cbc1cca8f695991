"""Reads settings, score, curve and status of a run, which may be unfinished or interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.values import ConfigError, format_value
from train.config import LOCAL, Config
from train.recipes import load_recipe
from train.run.folder import RunFolder, changed_settings
from train.run.logger import read_metrics, series
from train.submission.digits import is_number
from train.submission.summary import Summary


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Attributes:
        folder: the run folder.
        config: the run's settings.
        status: "finished", "running" (a process trains or quantizes it), "trained" (but not scored) or "interrupted".
        summary: the contents of summary.json; None: the artifact has no score.
        curve: (step, seconds, bits per byte) of each validation during training.
        steps: number of trained steps; if training has not finished, the last logged step.
        seconds: training time at step `steps`, in seconds.
    """

    folder: RunFolder
    config: Config
    status: str
    summary: Summary | None
    curve: Sequence[tuple[int, float, float]]
    steps: int
    seconds: float

    @property
    def text(self) -> str:
        """Name of the dataset, and number of bytes of validation text that were scored."""
        name = Path(self.config.data_path).name or "-"
        return f"{name} ({self.summary.bytes:,} B)" if self.summary else name

    @property
    def differences(self) -> list[str]:
        """The settings, as `name=value`, that differ from the recipe. The seed is included."""
        try:
            base = load_recipe(self.config.recipe).config()
        except ConfigError:
            return [f"no recipe {self.config.recipe} here"]
        changed = changed_settings(base, self.config, free=LOCAL - {"seed"})
        return [f"{name}={text_of(value)}" for name, _, value in changed]


def read_run(folder: RunFolder) -> Run:
    """Read a run.

    Raises:
        UserError: a file is missing, unreadable or damaged; the message is one line.
    """
    try:
        # do not warn about removed settings in config.json
        with warnings.catch_warnings(action="ignore"):
            config = folder.read_config()
        summary = Summary.read(folder.summary) if folder.summary.exists() else None
        records = read_metrics(folder.metrics) if folder.metrics.exists() else []
        curve, steps, seconds = _progress(folder, records)
        status = "running" if folder.is_busy else "finished" if summary else "interrupted"
        if status == "interrupted" and folder.is_trained:
            status = "trained"
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except UserError as error:
        raise UserError(" ".join(str(error).split())) from error
    if summary:
        steps, seconds = summary.steps, summary.train_seconds
    return Run(folder, config, status, summary, curve, steps, seconds)


def _progress(folder: RunFolder, records: list[dict[str, Any]]) -> tuple[list[tuple[int, float, float]], int, float]:
    points = [record for record in records if record["kind"] in ("train", "val", "resume")]
    for record in points:
        if not all(is_number(record.get(name)) for name in ("step", "seconds")):
            raise UserError(f"{folder.metrics}: a {record['kind']} record without step and seconds: restore the file")
    if not all(is_number(record.get("val_bpb") or 0) for record in points):
        raise UserError(f"{folder.metrics}: val_bpb: expected a number: restore the file")
    step, seconds = (points[-1]["step"], points[-1]["seconds"]) if points else (0, 0.0)
    return series(records, "val", "val_bpb"), step, seconds


def need_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: python -m train makes run folders below runs/")


def find_folders(path: Path) -> tuple[list[RunFolder], list[str], list[str]]:
    """Find run folders inside `path`, and the names of sweeps and of other folders. If `path` is a run folder, return it alone.

    Raises:
        UserError: there is no such folder.
    """
    need_folder(path)
    if (path / "config.json").exists():
        return [RunFolder(path)], [], []
    # skip hidden folders, which are unfinished
    inside = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    runs = [RunFolder(item) for item in inside if (item / "config.json").exists()]
    others: dict[bool, list[str]] = {True: [], False: []}
    for item in inside:
        if not (item / "config.json").exists():
            others[(item / "sweep.journal").exists()].append(printable(item.name))
    return runs, others[True], others[False]


def text_of(value: Any) -> str:
    """Format a setting's value, as `Config.to_dict` returns it."""
    return format_value(tuple(value) if isinstance(value, list) else value) or "empty"


def printable(text: str) -> str:
    """Return the text. If it contains line breaks or control characters, escape them."""
    return text if text.isprintable() else ascii(text)

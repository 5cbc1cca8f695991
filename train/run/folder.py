"""The run folder: what a run from text to record leaves behind, and all that a later stage needs to start again."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.common.values import ConfigError
from train.config import BOOKKEEPING, Config


@dataclass(frozen=True)
class RunFolder:
    """Names of the files in `runs/<run_id>/`.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def weights(self) -> Path:
        return self.path / "weights.pt"

    @property
    def artifact(self) -> Path:
        return self.path / "model.golf"

    @property
    def training(self) -> Path:
        return self.path / "training.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def stages(self) -> Path:
        return self.path / "stages.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def is_trained(self) -> bool:
        """Whether training has left all it leaves."""
        return self.weights.exists() and self.training.exists()

    @property
    def is_untrained(self) -> bool:
        """Whether this is a run's folder in which no step was trained, or at least none logged."""
        if not self.config.exists() or self.checkpoint.exists() or self.weights.exists():
            return False
        return not self.metrics.exists() or b'"kind": "train"' not in self.metrics.read_bytes()

    def read_config(self) -> Config:
        """The configuration that the run was started with; a setting that is younger than the file has its default.

        Raises:
            UserError: there is no such run, or its config.json is not readable.
        """
        self.need_run()
        values = read_json(self.config, "restore it or train again")
        if "recipe" not in values:
            raise UserError(f"{self.config}: no value for recipe, which every run has: restore it or train again")
        try:
            return Config.from_dict(values)
        except ConfigError as error:
            raise UserError(f"{self.config}: {error}: restore it or train again") from error

    def need_run(self) -> None:
        """Refuse a folder that is no run's.

        Raises:
            UserError: there is no such folder, or it has no config.json.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run folder (python -m train makes one under runs/)")
        if not self.config.exists():
            raise UserError(f"{self.config}: missing: {self.path} is not a run folder of python -m train")

    def write_config(self, config: Config) -> None:
        """Replace the run's settings."""
        write_json(self.config, config.to_dict())

    def drop_scores(self) -> None:
        """Remove what tells of the artifact: before another takes its place, so that no kill leaves old scores beside it."""
        for path in (self.evaluation, self.summary):
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other processes off the run until the block ends or this process dies; shared, only those that are not.

        Raises:
            UserError: there is no such run, another process is at work in its folder, or its file system has no locks.
        """
        self.need_run()
        # a file of its own: a lock does not outlast the replacement of its file
        with open(self.path / ".lock", "ab") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.path}: another process is at work on this run: wait for its end, or stop it first"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{file.name}: cannot be locked ({error.strerror}): expected a file system with locks: move the run to one, "
                    "or set RUNS_DIR to one"
                ) from error
            if not shared:
                self._clear()
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within a shared `held`: wait until no other process is here, so that what is read and written again loses nothing."""
        with open(self.path / ".writing.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._clear()
            yield

    def _clear(self) -> None:
        """Remove what a killed process was writing, where a lock says that nobody writes now."""
        for part in self.path.glob(".*.part"):
            part.unlink()

    def read_training(self, **kinds: type) -> dict[str, Any]:
        """What the training stage measured, the named fields at least, each of its kind.

        Raises:
            UserError: training has not finished, or its file is not readable.
        """
        path = self.need(self.training, f"python -m train --run_id {self.path.name} --resume auto")
        values = read_json(path, "restore it or train again")
        for name, kind in kinds.items():
            if not isinstance(values.get(name), (int, float) if kind is float else kind):
                raise UserError(
                    f"{path}: {name}: expected {kind.__name__}, found {values.get(name)!r}: restore it or train again"
                )
        return values

    def trained_config(self) -> Config:
        """The configuration of the function that was trained: without recurrence where the run ended before its start."""
        config = self.read_config()
        return config if self.read_training(recurrence=bool)["recurrence"] else config.replace(recur_layers=())

    def need(self, path: Path, stage: str) -> Path:
        """`path`, or an error that says which stage makes it."""
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a file, found a folder: move it away and run {stage}")
        if not path.exists():
            raise UserError(f"{path}: missing: run {stage} first")
        return path


def new_run_id(config: Config) -> str:
    """`run_id` as set, or a name from recipe and time."""
    return config.run_id or f"{config.recipe}_{time.strftime('%Y%m%d-%H%M%S')}"


def create_run_folder(config: Config) -> RunFolder:
    """Make the run's folder and write its configuration into it.

    With `resume=auto` an existing folder is taken up again if it was started with the same settings.

    Raises:
        UserError: the folder exists, or it belongs to a run with other settings, or to one that another process begins.
    """
    if not config.run_id.isprintable() or "/" in config.run_id or config.run_id in ("", ".", ".."):
        raise UserError(f"run_id: expected the name of a folder, got {config.run_id!r}: choose another RUN_ID")
    folder = RunFolder(Path(config.runs_dir) / config.run_id)
    if folder.path.exists():
        if config.resume == "never":
            raise UserError(
                f"{folder.path}: this run folder exists: choose another RUN_ID, or go on with RESUME=auto{_way_out(folder)}"
            )
        changed = changed_settings(folder.read_config(), config)
        if changed:
            listed = ", ".join(f"{name} was {before}, is {now}" for name, before, now in changed)
            raise UserError(
                f"{folder.path}: cannot resume with other settings than it was started with: {listed}{_way_out(folder)}"
            )
        return folder
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    # a folder without its settings, as a kill would leave it, could neither be resumed nor begun again
    with tempfile.TemporaryDirectory(dir=folder.path.parent, prefix=f".{config.run_id}.", suffix=".part") as work:
        made = RunFolder(Path(work, config.run_id))
        made.path.mkdir()
        made.write_config(config)
        os.rename(made.path, folder.path)
    return folder


def _way_out(folder: RunFolder) -> str:
    if not folder.is_untrained:
        return ""
    # another process may be about to train in it
    with folder.held():
        return "; no step was trained in it, so it can be deleted, and its RUN_ID used again"


@contextmanager
def open_run_folder(config: Config) -> Iterator[RunFolder]:
    """`create_run_folder`, held for this process alone until the block ends or the process dies.

    Raises:
        UserError: as `create_run_folder`, or another process is at work in the folder.
    """
    folder = create_run_folder(config)
    with folder.held():
        yield folder


def changed_settings(old: Config, new: Config, *, free: Iterable[str] = ()) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of each setting that differs and touches what is computed, but for those that are `free` to."""
    before, after, skipped = old.to_dict(), new.to_dict(), BOOKKEEPING.union(free)
    return [(name, before[name], after[name]) for name in before if name not in skipped and before[name] != after[name]]

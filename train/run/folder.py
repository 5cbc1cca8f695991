"""The run folder, which holds all files of a run. A stage that is repeated reads these files."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import open_lock, read_file, read_json, refuse_device, write_json
from train.common.values import ConfigError, format_value
from train.config import BOOKKEEPING, CHANGEABLE, Config

# settings that say whether to resume a run, and which one
WHICH_RUN = ("run_id", "runs_dir", "resume")


@dataclass(frozen=True)
class RunFolder:
    """A run folder, such as `runs/<run_id>`, and the paths of its files."""

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
    def source(self) -> Path:
        """File with the source code of the program that started the run.

        Older runs have the code in their log instead.
        """
        return self.path / "source.txt"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def stages(self) -> Path:
        return self.path / "stages.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def is_trained(self) -> bool:
        return self.weights.exists() and self.training.exists()

    @property
    def is_untrained(self) -> bool:
        """Whether the run has not trained a step yet."""
        if not self.config.exists() or self.checkpoint.exists() or self.weights.exists():
            return False
        return not self.metrics.exists() or b'"kind": "train"' not in read_file(self.metrics)

    @property
    def is_busy(self) -> bool:
        """Whether a process trains or quantizes the run now. False if the file system has no locks."""
        try:
            with open(os.open(self.path / ".lock", os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def read_config(self) -> Config:
        """Read the run's settings from config.json. A missing setting gets its default.

        Raises:
            UserError: the run does not exist, or its config.json cannot be read.
        """
        self.need_run()
        values = read_json(self.config, "restore it or train again")
        if "recipe" not in values:
            raise UserError(f"{self.config}: recipe is missing: restore the file or train again")
        try:
            return Config.from_dict(values)
        except ConfigError as error:
            raise UserError(f"{self.config}: {error} (or restore the file, or train again)") from error

    def need_run(self) -> None:
        """Raise a UserError if the folder does not exist or has no config.json."""
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: no such run folder (python -m train makes one under runs/, python -m train.runs lists them)"
            )
        if not self.config.exists():
            raise UserError(f"{self.config}: missing: {self.path} is not a run folder of python -m train")

    def find_data(self, config: Config) -> Config:
        """Return `config` with absolute paths of data, if the folder in which the run was started is known.

        Relative paths begin at this folder, which can be computed from a relative `runs_dir`. Otherwise return `config`
        unchanged.
        """
        path = Path(os.path.abspath(self.path))
        parts, tail = path.parts, Path(config.runs_dir, path.name).parts
        start = Path(*parts[: -len(tail)])
        if parts[-len(tail) :] != tail or start == Path.cwd():
            return config
        paths = {name: getattr(config, name) for name in ("data_path", "tokenizer_path", "paid_prefix_file")}
        return config.replace(**{name: str(start / path) for name, path in paths.items() if path})

    def write_config(self, config: Config) -> None:
        write_json(self.config, config.to_dict())

    def drop_scores(self) -> None:
        """Delete the stored scores of the artifact. Call this before another artifact replaces the old one."""
        for path in (self.evaluation, self.summary):
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[None]:
        """Lock the run until the context ends or this process dies. Several processes may hold shared locks at once.

        Raises:
            UserError: the run does not exist, another process has locked it, or its file system has no locks.
        """
        self.need_run()
        # lock a file of its own, because replacing a locked file would end the lock
        with open_lock(self.path / ".lock") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.path}: another process is at work on this run: wait until it ends, or stop it"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{file.name}: cannot be locked ({error.strerror}): move the run to a file system with locks, "
                    "or set RUNS_DIR to one"
                ) from error
            if not shared:
                self._clear()
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the context, be the only process that changes files of the run. Use this inside a shared `held`."""
        with open_lock(self.path / ".writing.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._clear()
            yield

    def _clear(self) -> None:
        """Delete unfinished files of a process that was interrupted. The caller must hold a lock."""
        for part in self.path.glob(".*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    def read_training(self, **kinds: type) -> dict[str, Any]:
        """Read training.json. `kinds` gives the names and types of the required fields.

        Raises:
            UserError: training has not finished, or the file cannot be read.
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
        """Read the settings of the trained model. They have no recurrence if training ended before recurrence began."""
        config = self.read_config()
        return config if self.read_training(recurrence=bool)["recurrence"] else config.replace(recur_layers=())

    def need(self, path: Path, stage: str) -> Path:
        """Return `path`. If the file is missing, raise a UserError that names `stage`, the command that writes it."""
        refuse_device(path)
        if path.is_dir():
            raise UserError(f"{path}: expected a file, found a folder: move it away and run {stage}")
        if not path.exists():
            raise UserError(f"{path}: missing: run {stage} first")
        return path


def default_runs_dir() -> Path:
    return Path(os.environ.get("RUNS_DIR") or Config.runs_dir)


def find_run(given: str) -> Path:
    """Return the path of a run folder or artifact. `given` is a path, or the name of a folder in `default_runs_dir`."""
    path, named = Path(given), default_runs_dir() / given
    is_run = path.is_file() or (path / "config.json").exists()
    return named if named.is_dir() and not is_run else path


def new_run_id(config: Config) -> str:
    """Return `config.run_id`, or RECIPE_DATE-TIME if `run_id` is empty."""
    return config.run_id or f"{config.recipe}_{time.strftime('%Y%m%d-%H%M%S')}"


def check_run_id(run_id: str) -> None:
    """Raise a UserError if `run_id` is not the name of a folder."""
    if not run_id.isprintable() or "/" in run_id or run_id in ("", ".", ".."):
        raise UserError(f"run_id: expected the name of a folder, got {run_id!r}: choose another RUN_ID")


def create_run_folder(config: Config) -> RunFolder:
    """Create the run folder with its config.json. With `resume=auto`, use an existing folder.

    Raises:
        UserError: `run_id` is not a folder name; or the folder exists, and `resume` is "never" or the settings in its
            config.json differ.
    """
    check_run_id(config.run_id)
    folder = RunFolder(Path(config.runs_dir) / config.run_id)
    if folder.path.exists():
        if config.resume == "never":
            raise UserError(
                f"{folder.path}: this run folder exists: choose another RUN_ID, or resume it with RESUME=auto{_offer_to_delete(folder)}"
            )
        refuse_changes(folder, folder.read_config(), vars(config), {})
        return folder
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    # write config.json before renaming the folder: a folder without config.json could be neither resumed nor used again
    with tempfile.TemporaryDirectory(dir=folder.path.parent, prefix=f".{config.run_id}.", suffix=".part") as work:
        made = RunFolder(Path(work, config.run_id))
        made.path.mkdir()
        made.write_config(config)
        os.rename(made.path, folder.path)
    return folder


def refuse_changes(folder: RunFolder, stored: Config, new: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raise a UserError if `new` changes a setting that a resumed run must keep.

    The error names the settings and, from `sources`, where the user gave each of them.
    """
    refused = []
    for name, value in new.items():
        before = getattr(stored, name)
        if value == before or name in BOOKKEEPING or name == "golf_backend":
            continue
        source = f" from {sources[name]}" if name in sources else ""
        why = ""
        if name in CHANGEABLE:
            fewer = name == "iterations" and value < before
            if not fewer and not folder.is_trained:
                continue
            why = " (training has finished)" if folder.is_trained else " (expected more)"
        refused.append(
            f"{name} was {format_value(before) or 'empty'}, is {format_value(value) or 'empty'}{source}{why}"
        )
    if refused:
        raise UserError(
            f"{folder.path}: cannot resume with different settings: {', '.join(refused)}: leave "
            f"{'it' if len(refused) == 1 else 'them'} out, or choose another RUN_ID{_offer_to_delete(folder)}"
        )


def _offer_to_delete(folder: RunFolder) -> str:
    if not folder.is_untrained:
        return ""
    # if another process is about to train in the folder, `held` raises an error
    with folder.held():
        return "; no step was trained, so you can delete the folder and use its RUN_ID again"


@contextmanager
def open_run_folder(config: Config) -> Iterator[RunFolder]:
    """Call `create_run_folder`, and hold the folder's lock until the context ends.

    If a resumed run changes settings, config.json gets the new values.
    """
    folder = create_run_folder(config)
    with folder.held():
        stored = folder.read_config()
        changes = {name: getattr(config, name) for name in (BOOKKEEPING | CHANGEABLE).difference(WHICH_RUN)}
        if stored.replace(**changes) != stored:
            folder.write_config(stored.replace(**changes))
        yield folder


def changed_settings(old: Config, new: Config, *, free: Iterable[str] = ()) -> list[tuple[str, Any, Any]]:
    """Return (name, old value, new value) of each differing setting, except settings in BOOKKEEPING or `free`."""
    before, after, skipped = old.to_dict(), new.to_dict(), BOOKKEEPING.union(free)
    return [(name, before[name], after[name]) for name in before if name not in skipped and before[name] != after[name]]

"""Kills and full disks at the places where files come and go, then the same command again."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NoReturn

from attack.campaign import Broke, Campaign
from submission_runs import make_dataset, narrow

from train.common.errors import main_guard
from train.data.__main__ import main as data
from train.export.__main__ import main as export
from train.pipeline import run_pipeline

# the calls after which a file is there, is on the disk, has its name, or is gone
TRANSITIONS = ("fdopen", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "chmod")


def in_child(function: Callable[[], int | None], error: Path) -> int:
    """Run `function` as a command in a forked process. Returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        # not sys.exit, which would run what the parent has to do at its own end
        try:
            main_guard(function)
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        except BaseException as other:
            os.write(2, f"Traceback: {type(other).__name__}: {other}".encode())
            os._exit(70)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def break_at(number: int, act: Callable[[], object], *, after: bool) -> list[int]:
    """Call `act` at the `number`-th transition of this process, before it or after it. Returns the counter, a list of one."""
    count = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            here = count[0] == number
            if here and not after:
                act()
            result = real(*arguments, **options)
            if here and after:
                act()
            return result

        return call

    for name in TRANSITIONS:
        setattr(os, name, counted(getattr(os, name)))
    return count


def full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


class Kills(Campaign):
    name: ClassVar[str] = "kill"
    tries: ClassVar[str] = (
        "SIGKILL or a full disk at one file transition of training, data or export, then the command again"
    )
    promise: ClassVar[str] = "one line of error (full disk), then the same bytes as without it, and nothing left over"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.dataset = make_dataset(folder / "small", 60_000, 6_000)
        source = Path(os.__file__).parent
        (folder / "text").mkdir()
        for name in ("ast.py", "dis.py", "argparse.py", "datetime.py"):
            shutil.copy(source / name, folder / "text" / name)
        whole = folder / "whole"
        self.expected: dict[str, str] = {}
        self.transitions: dict[str, int] = {}
        for name, work in self.works(whole).items():
            counted = folder / "count"

            def counting(work: Callable[[], int | None] = work, counted: Path = counted) -> int | None:
                count = break_at(-1, full, after=False)
                code = work()
                counted.write_text(str(count[0]))
                return code

            if code := in_child(counting, folder / "error"):
                raise RuntimeError(f"{name} ends in {code}: {(folder / 'error').read_text()}")
            self.transitions[name] = int(counted.read_text())
            self.expected[name] = digest(whole, name)

    def works(self, folder: Path) -> dict[str, Callable[[], int | None]]:
        folder.mkdir(exist_ok=True)
        config = narrow(self.dataset, folder / "train", 42, checkpoint_every=1, resume="auto")

        def train() -> int:
            run_pipeline(config)
            return 0

        def text() -> None:
            arguments = ["text", str(self.folder / "text"), "--out", str(folder / "data"), "--vocab", "400"]
            again = ["--overwrite"] if (folder / "data").exists() else []
            sys.argv = ["train.data", *arguments, *again]
            data()

        def out() -> int:
            run, target = self.folder / "whole" / "train" / "seed42", folder / "export" / "model.pt"
            target.parent.mkdir(exist_ok=True)
            # what is there was written whole, as its bytes will show
            return 0 if target.exists() else export([str(run), "--to", "state_dict", "--out", str(target)])

        return {"train": train, "data": text, "export": out}

    def attack(self, random: Random, folder: Path) -> None:
        name = random.choice(["train", "train", "data", "export"])
        number, after = random.randrange(1, self.transitions[name] + 1), random.random() < 0.5
        disk = random.random() < 0.3
        self.tried = (
            f"{name}: {'full disk' if disk else 'SIGKILL'} {'after' if after else 'before'} transition {number}"
        )
        work = self.works(folder)[name]
        error = folder / "error"

        def broken() -> int | None:
            act = full if disk else lambda: os.kill(os.getpid(), signal.SIGKILL)
            break_at(number, act, after=after)
            return work()

        code = in_child(broken, error)
        said = error.read_text(errors="replace")
        # the clean-up of what is not needed may go on without the disk
        if disk and (code not in (0, 2) or "Traceback" in said or (code == 2 and said.count("error: ") != 1)):
            raise Broke(f"exit code {code}: {said[-300:]!r}")
        if code := in_child(work, error):
            raise Broke(f"the second time exit code {code}: {error.read_text(errors='replace')[-300:]!r}")
        if digest(folder, name) != self.expected[name]:
            raise Broke("other bytes than without the break")
        if left := [
            path.name for path in folder.rglob("*") if ".part" in path.name or path.name.startswith("train_gpt_")
        ]:
            raise Broke(f"left over: {left}")


def digest(folder: Path, name: str) -> str:
    """The SHA-256 of the files that a command is for, and of their names."""
    if name == "train":
        paths = [folder / "train" / "seed42" / file for file in ("weights.pt", "model.golf")]
    else:
        # the manifest tells the time, and an export the place of its source
        paths = [path for path in sorted((folder / name).rglob("*")) if path.suffix in (".bin", ".model", ".pt")]
    total = hashlib.sha256()
    for path in paths:
        with suppress(FileNotFoundError):
            total.update(path.name.encode() + path.read_bytes())
    if not paths:
        raise RuntimeError(f"{folder}: nothing to compare")
    return total.hexdigest()

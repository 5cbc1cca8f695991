"""The parts of a campaign: a case, what it may end in, and damage to bytes and JSON values."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from train.common.errors import UserError, main_guard


class Broke(Exception):
    """The product did not keep its promise in this case. The text says what it did instead."""


class Campaign(ABC):
    """Cases of one kind. A case is decided by its number, so it can be repeated alone.

    The constructor makes, in `folder`, what all cases start from.
    """

    name: ClassVar[str]
    tries: ClassVar[str]
    promise: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tried = ""

    @abstractmethod
    def attack(self, random: Random, folder: Path) -> None:
        """Try one case in an empty `folder`.

        Sets `tried` to a description of the case before it begins.

        Raises:
            Broke: the promise was not kept. Any other exception counts as broken, too.
        """


def command(main: Callable[[], int | None], arguments: Sequence[object] = (), *, codes: Sequence[int] = (0, 2)) -> int:
    """Call a command's `main` as its shell command would, and return its exit code.

    Raises:
        Broke: it ended in an exception, in another exit code, or in code 2 without exactly one line of error.
    """
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    try:
        sys.argv = ["attack", *map(str, arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main_guard(main)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Exception as error:
        raise Broke(told(error)) from error
    finally:
        sys.argv = before
    errors = [line for line in err.getvalue().splitlines() if "error: " in line]
    if code not in codes or (code == 2 and len(errors) != 1) or "Traceback" in err.getvalue():
        raise Broke(f"exit code {code}: {err.getvalue()[-300:]!r}")
    if code == 2 and "out of memory" in errors[0]:
        raise Broke(errors[0])
    return code


def refuses(read: Callable[[], object]) -> bool:
    """Whether `read` raises a UserError, which must be one line."""
    try:
        read()
    except UserError as error:
        if not str(error) or "\n" in str(error):
            raise Broke(f"an error that is not one line: {str(error)[:200]!r}") from error
        return True
    return False


def told(error: BaseException) -> str:
    """Say in one line which exception came from which place."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]!r} at {Path(last.filename).name}:{last.lineno}"


def damage(data: bytes, random: Random) -> tuple[bytes, str]:
    """Return changed bytes, and what was changed."""
    kind = random.choice(["bit", "byte", "cut", "hole", "insert", "double", "zeros", "swap", "empty", "noise"])
    at, size = random.randrange(len(data) + 1), random.choice([1, 2, 3, 7, 64, 1000])
    there = data[at : at + size]
    changed = {
        "bit": lambda: (
            data[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]
        ),
        "byte": lambda: data[:at] + random.randbytes(len(data[at : at + 1])) + data[at + 1 :],
        "cut": lambda: data[:at],
        "hole": lambda: data[:at] + data[at + size :],
        "insert": lambda: data[:at] + random.randbytes(size) + data[at:],
        "double": lambda: data[:at] + there + data[at:],
        "zeros": lambda: data[:at] + bytes(len(there)) + data[at + size :],
        "swap": lambda: data[:at] + data[at + size : at + 2 * size] + there + data[at + 2 * size :],
        "empty": lambda: b"",
        "noise": lambda: random.randbytes(size),
    }[kind]()
    return changed, f"{kind} at byte {at:,} of {len(data):,} (size {size})"


ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "0", "-1", "abc",
    "nan", "é", "\ud800", "\0", "\x1b[31m", "a\nb", "x" * 100_000, [], [1], [None], ["a"], {}, {"a": 1}, [[[[]]]], "../..", "/",
)  # fmt: skip


def damage_json(text: str, random: Random) -> tuple[str, str]:
    """Return a JSON object with one value replaced, removed or renamed, and what was changed. Its checksum is removed."""
    root = json.loads(text)
    if isinstance(root, dict):
        root.pop("crc32", None)
    node, trail = root, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return json.dumps([root]), "a list around it"
        key = random.choice(keys)
        trail.append(str(key))
        if not isinstance(node[key], dict | list) or random.random() < 0.3:
            break
        node = node[key]
    kind = random.choice(["replace", "replace", "replace", "remove", "rename", "nest"])
    value = random.choice(ODD_VALUES)
    if kind == "replace":
        node[key] = value
    elif kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    else:
        for _ in range(random.choice([1, 50, 2000])):
            node[key] = [node[key]]
    try:
        text = json.dumps(root)
    except RecursionError:
        text = "[" * 5000 + "]" * 5000
    return text, f"{kind} {'.'.join(trail)[:60]}" + (f" by {value!r:.40}" if kind == "replace" else "")


def odd_place(path: Path, random: Random) -> str:
    """Put something at `path` that is not a regular file, and say what."""
    if path.is_dir() and not path.is_symlink():
        raise ValueError(f"{path}: expected a file")
    path.unlink(missing_ok=True)
    kind = random.choice(["nothing", "a folder", "a pipe", "a loop of links", "/dev/zero", "a broken link"])
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    elif kind == "/dev/zero":
        path.symlink_to(kind)
    elif kind == "a broken link":
        path.symlink_to("missing")
    return kind

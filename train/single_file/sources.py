"""The code of this program as it lies on the disk: the sources of a checkout, or the one packed script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.common.errors import UserError

# the single file that this program was packed into, which then is all the code that counts; None: it runs from sources
SCRIPT: Path | None = getattr(sys.modules.get("__main__"), "PACKED_SCRIPT", None)
# begins a script whose bytes are no UTF-8, as python itself reads it
LATIN1 = b"# coding: latin-1\n"
COUNTED_FOLDERS = ("csrc", "golf_kernels", "train")
COUNTED_SUFFIXES = frozenset({".py", ".cpp", ".cu", ".cuh", ".h"})


def package_code_bytes(root: str | os.PathLike[str] | None = None) -> int:
    """UTF-8 bytes of all the code that a run of this project may execute.

    Counted are the files with the suffixes .py, .cpp, .cu, .cuh and .h anywhere under `csrc`, `golf_kernels` and
    `train` of `root`: recipes and tools that a given run does not touch included; tests, benchmarks and set-up not.
    `csrc` may be missing. A packed script counts itself alone.

    Args:
        root: folder that holds these folders; None takes the one that this module was imported from.

    Raises:
        UserError: there is no `train` or `golf_kernels` in `root`, or a file is not UTF-8.
    """
    return sum(map(len, _sources(root).values()))


def package_source() -> str:
    """All the code that counts, one file after the other under its name, as a run's log begins with it."""
    return "\n".join(f"# {path}\n{decoded(source)}" for path, source in _sources(None).items())


def decoded(source: bytes) -> str:
    """The text of a source file: UTF-8, or what a packed script of the form raw is.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    return source.decode("latin-1" if source.startswith(LATIN1) else "utf-8")


def _sources(root: str | os.PathLike[str] | None) -> dict[str, bytes]:
    if root is None and SCRIPT is not None:
        return {SCRIPT.name: _source(SCRIPT)}
    base = Path(__file__).resolve().parents[2] if root is None else Path(root)
    for needed in ("golf_kernels", "train"):
        if not (base / needed).is_dir():
            raise UserError(
                f"{base}: expected a folder {needed} in it, found none: give the folder of the project's sources"
            )
    paths = sorted(
        path.relative_to(base).as_posix()
        for folder in COUNTED_FOLDERS
        for path in (base / folder).rglob("*")
        if path.suffix in COUNTED_SUFFIXES and path.is_file()
    )
    return {path: _source(base / path) for path in paths}


def _source(path: Path) -> bytes:
    try:
        source = path.read_bytes()
        decoded(source)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: code that counts must be there") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 source, found byte {source[error.start]:#04x} at {error.start}"
        ) from error
    return source

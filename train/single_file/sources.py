"""Reads the source files of this program, or the packed script."""

from __future__ import annotations

import sys
from pathlib import Path

import golf_kernels
from train.common.errors import UserError

# path of the packed script that is running; None: the program runs from its source files
SCRIPT: Path | None = getattr(sys.modules.get("__main__"), "PACKED_SCRIPT", None)
# first line of a script that is not UTF-8: it tells Python the encoding
LATIN1 = b"# coding: latin-1\n"
_ROOT = Path(__file__).resolve().parents[2]
# name → folder with the sources; in a wheel, csrc and train are inside golf_kernels
FOLDERS = {
    "csrc": _ROOT / "csrc",
    "golf_kernels": Path(golf_kernels.__file__).resolve().parent,
    "train": _ROOT / "train",
}
SUFFIXES = frozenset({".py", ".cpp", ".cu", ".cuh", ".h"})


def package_source() -> str:
    """Return all source files of this program, each after a line with its name. A run stores this in source.txt."""
    if SCRIPT is not None:
        paths = {SCRIPT.name: SCRIPT}
    else:
        paths = {
            f"{name}/{path.relative_to(folder).as_posix()}": path
            for name, folder in FOLDERS.items()
            # of golf_kernels, read only the files at the top: it has no subfolders of its own
            for path in sorted(folder.glob("*") if name == "golf_kernels" else folder.rglob("*"))
            if path.suffix in SUFFIXES and path.is_file()
        }
    return "\n".join(f"# {name}\n{decoded(read_source(path))}" for name, path in paths.items())


def decoded(source: bytes) -> str:
    """Decode a source file: from latin-1 if it is a script in the form `raw`, else from UTF-8.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    return source.decode("latin-1" if source.startswith(LATIN1) else "utf-8")


def read_source(path: Path) -> bytes:
    """Read the bytes of a source file.

    Raises:
        UserError: the file is missing, or neither UTF-8 nor a packed script.
    """
    try:
        source = path.read_bytes()
        decoded(source)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, but its bytes count as code: restore it") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 source, found byte {source[error.start]:#04x} at {error.start}"
        ) from error
    return source

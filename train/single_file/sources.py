"""The source files of this program: those of a checkout, or the packed script."""

from __future__ import annotations

import sys
from pathlib import Path

import golf_kernels
from train.common.errors import UserError

# the packed script that is running; None: it runs from sources
SCRIPT: Path | None = getattr(sys.modules.get("__main__"), "PACKED_SCRIPT", None)
# the first line of a script that is not UTF-8; Python reads it too
LATIN1 = b"# coding: latin-1\n"
_ROOT = Path(__file__).resolve().parents[2]
# a wheel has csrc and train inside golf_kernels
FOLDERS = {
    "csrc": _ROOT / "csrc",
    "golf_kernels": Path(golf_kernels.__file__).resolve().parent,
    "train": _ROOT / "train",
}
SUFFIXES = frozenset({".py", ".cpp", ".cu", ".cuh", ".h"})


def package_source() -> str:
    """All code of this program, each file after its name; a run's log begins with it."""
    if SCRIPT is not None:
        paths = {SCRIPT.name: SCRIPT}
    else:
        paths = {
            f"{name}/{path.relative_to(folder).as_posix()}": path
            for name, folder in FOLDERS.items()
            # golf_kernels has no folders of its own
            for path in sorted(folder.glob("*") if name == "golf_kernels" else folder.rglob("*"))
            if path.suffix in SUFFIXES and path.is_file()
        }
    return "\n".join(f"# {name}\n{decoded(read_source(path))}" for name, path in paths.items())


def decoded(source: bytes) -> str:
    """The text of a source file: UTF-8, or latin-1 if it is a packed script of form raw.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    return source.decode("latin-1" if source.startswith(LATIN1) else "utf-8")


def read_source(path: Path) -> bytes:
    """The bytes of a source file.

    Raises:
        UserError: it is missing, or neither UTF-8 nor a packed script.
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

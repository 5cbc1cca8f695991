"""The size of a submission's code, which counts against the cap with the model."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from train.common.errors import UserError
from train.config import Config

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


def counted_code_bytes(config: Config) -> int:
    """Bytes of code that count against the cap with a run's model.

    A packed script counts itself. A run from sources counts the train_gpt.py that it would be packed into, in the form
    `config.code_form`; or, with "sources", all files of `package_code_bytes`.

    Raises:
        UserError: see `check_code_form`.
    """
    check_code_form(config)
    if SCRIPT is not None or config.code_form == "sources":
        return package_code_bytes()
    # not part of a packed script
    from train.single_file.pack import pack, script_settings

    return len(pack(config.recipe, script_settings(config), config.code_form))


def check_code_form(config: Config) -> None:
    """Find out now whether the code can be counted at the end.

    Raises:
        UserError: the form needs python-minifier, which is not installed.
    """
    minified = SCRIPT is None and config.code_form not in ("plain", "sources")
    if minified and importlib.util.find_spec("python_minifier") is None:
        raise UserError(
            f"code_form: {config.code_form} needs python-minifier, which is not installed: pip install 'python-minifier>=3', or set "
            "CODE_FORM=plain"
        )


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

"""Errors that the user can fix.

For such an error a command prints one sentence without a traceback, and exits with code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """The user's input is wrong; the message says what is wrong, what was expected, and what to do."""


class CodecError(UserError):
    """A codec cannot encode or decode these bytes."""


class MissingCodec(UserError):
    """The library of a codec is not installed."""


# file system errors that the user can fix; any other OSError is a bug and keeps its traceback
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY,
)  # fmt: skip


# a missing module of these packages is a bug
_OWN_PACKAGES = ("benchmarks", "golf_kernels", "train")
# the extra of pyproject.toml that has a package; all others are in `train`
_EXTRAS = {"safetensors": "export", "optuna": "sweep", "submitit": "sweep", "constriction": "ans"}


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code (None: 0), with 2 and `error: …` for bad input, or with 130 after Ctrl-C."""
    try:
        for argument in sys.argv[1:]:
            check_text(argument, "command line")
        code = main() or 0
    except UserError as error:
        code = _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _OWN_PACKAGES:
            raise
        extra = _EXTRAS.get(package, "train")
        code = _refuse(
            f"{package} is not installed: pip install {package}, or all of its kind: pip install -e '.[{extra}]'"
        )
    except BrokenPipeError:
        # the reader, such as head, has closed the pipe; without this, Python fails again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        text = file_error_text(error)
        if text is None:
            raise
        code = _refuse(text)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _refuse(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}): lower TRAIN_BATCH_TOKENS, "
            "the window or the model's widths, or use more GPUs"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def check_text(text: str, source: str) -> None:
    """Raise a UserError if a text from the operating system is not UTF-8, because no log or JSON file could hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source}: {text!r} is not UTF-8: expected text; rename the file or folder, or type it again"
        ) from None


def _refuse(message: str) -> int:
    # one line, also where a name that it quotes has several
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return 2


def file_error_text(error: OSError) -> str | None:
    """Return what is wrong with a file and what to do, or None if the user cannot fix this error."""
    remedy = _remedy(error)
    return None if remedy is None else f"{error.filename or 'an output file'}: {error.strerror}: {remedy}"


def _remedy(error: OSError) -> str | None:
    if error.errno in _NO_ROOM:
        return "free some space or choose another folder and run again"
    if error.errno in _NO_RIGHT:
        return "give this user the permission, or choose another folder and run again"
    # an error without a file name is not about a path that the user gave
    if error.errno in _NO_PLACE and error.filename:
        return "choose another path, or move what is there"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # by name, because torch may not be imported; without memory on the CPU, torch raises a RuntimeError
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )

"""Errors that the user can fix: a command prints them in one sentence and exits with code 2, without a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """The user's input is wrong; the message says what, what was expected and what to do."""


class CodecError(UserError):
    """A codec cannot encode or decode these bytes."""


class MissingCodec(UserError):
    """The library of a codec is not installed."""


# errors of the file system that the user can fix; any other OSError is a bug and keeps its traceback
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


# a missing module of these packages is a bug
_HOUSE = ("benchmarks", "golf_kernels", "train")


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its code or 0, with 2 and `error: …` on bad input, with 130 on Ctrl-C."""
    try:
        for argument in sys.argv[1:]:
            check_text(argument, "command line")
        code = main() or 0
    except UserError as error:
        code = _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _HOUSE:
            raise
        code = _refuse(f"{package} is not installed: pip install {package}, or everything: pip install -e '.[train]'")
    except BrokenPipeError:
        # the reader, such as head, has closed the pipe; python would complain again while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        code = _refuse(f"{error.filename or 'an output file'}: {error.strerror}: {remedy}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _refuse(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}): lower TRAIN_BATCH_TOKENS or "
            "the model's widths, or use more GPUs"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def check_text(text: str, source: str) -> None:
    """Refuse a text from the operating system that is not UTF-8, because no log or JSON file could hold it.

    Raises:
        UserError: the message names `source` and the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source}: {text!r} is not UTF-8: expected text; rename the file or folder, or type it again"
        ) from None


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _remedy(error: OSError) -> str | None:
    if error.errno in _NO_ROOM:
        return "free some space or choose another folder and run again"
    if error.errno in _NO_RIGHT:
        return "give this user the permission, or choose another folder and run again"
    # without a file name, the error is not about a path that the user gave
    if error.errno in _NO_PLACE and error.filename:
        return "choose another path, or move what is there"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # by name, because torch may not be imported; on a CPU torch raises a RuntimeError
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )

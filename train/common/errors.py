"""Errors that a user can mend, and how a command ends on one: a sentence and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user gave is wrong; the message names it, what was expected and what to do."""


class CodecError(UserError):
    """Bytes that a codec cannot decode, or cannot encode."""


class MissingCodec(UserError):
    """A codec's library is not installed."""


# what the file system refuses, and what helps; any other OSError is a defect of ours and keeps its traceback
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


# a module of these that is not found is a defect of ours
_HOUSE = ("benchmarks", "golf_kernels", "train")


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its own code, 2 with `error: …` on bad input, 130 on an interrupt."""
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
        code = _refuse(f"{package} is not installed: pip install {package}, or all of it: pip install -e '.[train]'")
    except BrokenPipeError:
        # the reader (`… | head`) has seen enough; python would complain once more while closing stdout
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
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'no more of it'}): lower TRAIN_BATCH_TOKENS or "
            "the model's widths, or use more GPUs"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def check_text(text: str, source: str) -> None:
    """Refuse what the operating system gave as bytes that are not UTF-8: no log and no JSON could hold it.

    Raises:
        UserError: by `source` and the text.
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
        return "give this user the right to it, or choose another folder and run again"
    # without a name it is no path that was given to us
    if error.errno in _NO_PLACE and error.filename:
        return "choose another path, or move away what stands there"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # torch's own type for GPUs is known only where torch is imported; on a CPU it raises a plain RuntimeError
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )

"""Errors that the user can fix.

If such an error is raised, the command prints one line without a traceback and exits with code 2.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(Exception):
    """The user's input is wrong. The message says what is wrong, what was expected, and what to do."""


class CodecError(UserError):
    """A codec cannot encode or decode these bytes."""


class MissingCodec(UserError):
    """The library of a codec is not installed."""


# numbers of file system errors that the user can fix. Any other OSError is a bug and keeps its traceback.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY,
)  # fmt: skip


# packages of this project: if one of their modules is missing, that is a bug
_OWN_PACKAGES = ("benchmarks", "golf_kernels", "train")
# package → the extra of pyproject.toml that installs it; all other packages are in the extra `train`
_EXTRAS = {"safetensors": "export", "pyarrow": "parquet", "optuna": "sweep", "submitit": "sweep", "constriction": "ans"}


# flags of train.sweep and of tune that add to a list
_MAY_REPEAT = ("--set", "--slurm", "--only")


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run `main`, then exit with its return code (None: 0).

    After an error that the user can fix, print `error: …` and exit with code 2. After Ctrl-C, exit with code 130.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once)
    for stream in (sys.stdout, sys.stderr):
        # a terminal that is not UTF-8 shows an escape for a character that it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for argument in sys.argv[1:]:
            check_text(argument, "command line")
        _refuse_repeated(sys.argv[1:])
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
        # the reader of the pipe, such as `head`, has closed it. Without the next line, closing stdout would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        text = file_error_text(error)
        if text is None:
            raise
        code = _refuse(text)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = _refuse(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}): lower TRAIN_BATCH_TOKENS, "
            "the window or the model's widths, or use more GPUs"
        )
    except KeyboardInterrupt as error:
        # of several processes the first one speaks
        if os.environ.get("RANK", "0") == "0":
            print(str(error) or "interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def _interrupt_once(*_: object) -> NoReturn:
    """Raise a KeyboardInterrupt and ignore further SIGINT signals.

    The terminal and torchrun both send SIGINT. The second signal would interrupt the clean-up after the first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Raise a UserError if a flag is given twice, as the last one would count without a word."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1 and flag not in _MAY_REPEAT:
            raise UserError(f"{flag}: given twice: leave one out")


def check_text(text: str, source: str) -> None:
    """Raise a UserError if a text from the operating system is not UTF-8. A log or JSON file could not store it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        if encoding != "utf-8" and _is_utf8(os.fsencode(text)):
            raise UserError(
                f"{source}: {text!r} is UTF-8, but this Python reads names as {encoding}: set PYTHONUTF8=1, or a locale such as "
                "LC_ALL=C.UTF-8"
            ) from None
        raise UserError(
            f"{source}: {text!r} is not UTF-8: expected text; rename the file or folder, or type it again"
        ) from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse(message: str) -> int:
    # print one line without a terminal's commands, even if a quoted name contains some
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.splitlines()))
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def file_error_text(error: OSError) -> str | None:
    """Return a message about a file error and its remedy, or None if the user cannot fix the error."""
    remedy = _remedy(error)
    return None if remedy is None else f"{error.filename or 'an output file'}: {error.strerror}: {remedy}"


def _remedy(error: OSError) -> str | None:
    if error.errno in _NO_ROOM:
        return "free some space or choose another folder and run again"
    if error.errno in _NO_RIGHT:
        return "give this user the permission, or choose another folder and run again"
    # without a file name, the error is not about a path that the user gave
    if error.errno in _NO_PLACE and error.filename:
        return "choose another path, or move what is there"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that the CPU or the GPU has too little memory."""
    # by name, because torch may not be imported; without memory on the CPU, torch raises a RuntimeError
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )

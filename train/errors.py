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


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its own code, 2 with `error: …` on bad input, 130 on an interrupt."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except BrokenPipeError:
        # the reader (`… | head`) has seen enough; python would complain once more while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        # any other OSError is a defect of ours and keeps its traceback
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        name = error.filename or "an output file"
        print(
            f"error: {name}: {error.strerror}: free some space or choose another folder and run again",
            file=sys.stderr,
            flush=True,
        )
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)

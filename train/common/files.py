"""Writes files atomically (temporary file, sync, rename). Writes and reads JSON with a checksum."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from train.common.errors import UserError

_CHECKSUM = "crc32"


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a temporary binary file. At the end of the context it is renamed to `path`; after an error it is deleted.

    Raises:
        UserError: `path` is a device, a pipe or a socket, which the rename would replace.
        OSError: from the file system, with `filename` set to `path`.
    """
    target = Path(path)
    name = ""
    try:
        refuse_device(target)
        with _beside(target) as (prefix, suffix):
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=suffix)
            _hold(handle)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # mkstemp gives only the user access; give the access that the user's umask allows
            os.chmod(name, 0o666 & ~_umask())
            # before the file is closed, which releases it to `_beside` of other processes
            os.replace(name, target)
    except BaseException as error:
        if name and os.path.exists(name):
            os.unlink(name)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(target), None
        raise


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which is deleted at the end of the context."""
    with _beside(target) as (prefix, suffix):
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, suffix=suffix)
        handle = os.open(folder.name, os.O_RDONLY)
        _hold(handle)
    try:
        with folder as name:
            yield Path(name)
    finally:
        os.close(handle)


@contextmanager
def _beside(target: Path) -> Iterator[tuple[str, str]]:
    """Yield prefix and suffix for the name of a temporary file or folder beside `target`.

    Before that, delete what killed processes left under such names: files and folders that no process holds. Meanwhile no
    other process creates one in the same folder.
    """
    prefix, suffix = f".{target.name}.", ".part"
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        _hold(folder, wait=True)
        for left in target.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
            # another user's, or held by the process that writes it
            with suppress(OSError):
                handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                finally:
                    os.close(handle)
        yield prefix, suffix
    finally:
        os.close(folder)


def _hold(handle: int, *, wait: bool = False) -> None:
    # a file system without locks cannot tell what is held; then leftovers stay, because `_beside` gets no lock either
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def atomic_write(path: str | os.PathLike[str], data: bytes | memoryview | str) -> None:
    """Write `data` (text as UTF-8) to `path`. A reader sees the old file or the complete new file."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def refuse_device(path: Path) -> None:
    """Raise a UserError if `path` is a device, a pipe or a socket."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is a device or a pipe, expected a file: choose another, or move it away")


def open_lock(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to lock it. It is created if it does not exist; a pipe, which would be waited for, raises a UserError."""
    refuse_device(Path(path))
    return open(path, "ab")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file. Raise a UserError for a pipe or a device: reading it might never end."""
    refuse_device(Path(path))
    return Path(path).read_bytes()


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, and add its checksum as field `crc32`."""
    atomic_write(path, json.dumps({**values, _CHECKSUM: _checksum(values)}, indent=1) + "\n")


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """Read a JSON object. Check and remove its field `crc32`, if present. Error messages end with `remedy`.

    Raises:
        UserError: the file is missing, unreadable, not one JSON object, or changed since it was written.
    """
    try:
        value = json.loads(read_file(path).decode(), parse_int=_whole_number)
        expected = value.pop(_CHECKSUM, None) if isinstance(value, dict) else None
        # inside the `try`: an object that is nested too deeply cannot be encoded again
        found = _checksum(value)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}: {remedy}")
    if expected not in (None, found):
        raise UserError(
            f"{path}: changed since it was written (checksum {found}, expected {expected}): {remedy}; if you made the change, "
            f"delete the field {_CHECKSUM}"
        )
    return value


def sha256_file(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole_number(digits: str) -> int:
    number = int(digits)
    # raises an OverflowError for a number that no float holds, and with which no arithmetic can be done
    float(number)
    return number


def _checksum(values: Any) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

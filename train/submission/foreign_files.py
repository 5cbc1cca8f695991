"""Reads files of folders that other people made: only regular files, only inside the folder, and of limited size."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import os
import re
import stat
import zlib
from ast import Constant, parse, walk
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_FILES = 2000
MOST_LEVELS = 4
# limit for one file; a record's files are far smaller
MOST_BYTES = 8_000_000
MOST_TEXT_BYTES = 400_000
MOST_SOURCE_BYTES = 4_000_000
_MOST_PACKED_BYTES = 800_000


@dataclass(frozen=True)
class Listing:
    """The regular files of the folder `root`.

    `sizes` maps each relative path to its size in bytes. `skipped` lists the other entries, each with a reason.
    """

    root: Path
    sizes: dict[str, int]
    skipped: tuple[str, ...] = ()

    def read(self, name: str, limit: int = MOST_BYTES) -> bytes:
        """Read a file of the listing. Return b"" if it is larger than `limit` or no longer a regular file."""
        try:
            # O_NONBLOCK: if a pipe has replaced the file, opening must not wait for a writer
            handle = os.open(self.root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return b""
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            return file.read(limit) if stat.S_ISREG(status.st_mode) and status.st_size <= limit else b""


def list_files(root: Path) -> Listing:
    """List the regular files in a folder and its subfolders. Links and hidden folders are skipped."""
    sizes: dict[str, int] = {}
    skipped: list[str] = []
    folders = [(root, 0)]
    while folders:
        folder, level = folders.pop(0)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(f"{_shown(root, folder)} ({error.strerror})")
            continue
        for entry in entries:
            path = folder / entry.name
            if len(sizes) + len(skipped) >= MOST_FILES:
                return Listing(root, sizes, (*skipped, f"all after {MOST_FILES:,} files"))
            reason = _refused(entry)
            if reason:
                skipped.append(f"{_shown(root, path)} ({reason})")
            elif not entry.is_dir(follow_symlinks=False):
                sizes[path.relative_to(root).as_posix()] = entry.stat(follow_symlinks=False).st_size
            elif not entry.name.startswith((".", "__pycache__")) and level < MOST_LEVELS:
                folders.append((path, level + 1))
    return Listing(root, sizes, tuple(skipped))


def _refused(entry: os.DirEntry[str]) -> str:
    try:
        mode = entry.stat(follow_symlinks=False)
    except OSError as error:
        return str(error.strerror)
    if stat.S_ISLNK(mode.st_mode):
        return "a link, not followed"
    if not (stat.S_ISREG(mode.st_mode) or stat.S_ISDIR(mode.st_mode)):
        return "a pipe, socket or device"
    return f"{mode.st_size:,} bytes" if mode.st_size > MOST_BYTES and stat.S_ISREG(mode.st_mode) else ""


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def read_object(data: bytes) -> tuple[dict[str, Any], str]:
    """Read a JSON object. NaN, infinities and numbers of more than 18 digits become None.

    Returns:
        The object and "", or an empty object and the reason why there is none.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        return {}, f"not valid JSON ({str(error)[:80]})"
    return (values, "") if isinstance(values, dict) else ({}, "not a JSON object")


def _bounded(text: str) -> int | None:
    return int(text) if len(text) < 19 else None


def source_text(data: bytes) -> str:
    """Return the source code of a script, without executing the script.

    If most of the script is one compressed string, return that string unpacked, up to `MOST_SOURCE_BYTES`; "" if its
    compression is unknown.
    """
    text = data.decode(errors="replace")
    # parse only scripts whose lines are long on average, because parsing is slow and packed scripts have long lines
    short = len(text) < 150 * (text.count("\n") + 1) or len(data) > _MOST_PACKED_BYTES
    if short or not re.search("b85decode|b64decode|decompress", text):
        return text
    try:
        constants = [node.value for node in walk(parse(data)) if isinstance(node, Constant)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    long = (value for value in constants if isinstance(value, (str, bytes)) and 2 * len(value) > len(text))
    packed = next(long, None)
    if packed is None:
        return text
    inner = packed if isinstance(packed, bytes) else packed.encode("latin-1", errors="replace")
    for decode in (base64.b85decode, lambda text: base64.b64decode(text, validate=True), bytes):
        for decompress in (_bz2, _brotli, _lzma, _raw_lzma, _zlib):
            try:
                unpacked, ended = decompress(decode(inner))
            except (ImportError, OSError, ValueError, EOFError, lzma.LZMAError, zlib.error):
                continue
            # accept only a complete stream: other data may begin like compressed data
            if ended or len(unpacked) >= MOST_SOURCE_BYTES:
                return unpacked.decode(errors="replace")
    return ""


def _bz2(data: bytes) -> tuple[bytes, bool]:
    reader = bz2.BZ2Decompressor()
    return reader.decompress(data, MOST_SOURCE_BYTES), reader.eof


def _lzma(data: bytes) -> tuple[bytes, bool]:
    reader = lzma.LZMADecompressor(memlimit=200_000_000)
    return reader.decompress(data, MOST_SOURCE_BYTES), reader.eof


def _raw_lzma(data: bytes) -> tuple[bytes, bool]:
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    return reader.decompress(data, MOST_SOURCE_BYTES), reader.eof


def _zlib(data: bytes) -> tuple[bytes, bool]:
    reader = zlib.decompressobj()
    return reader.decompress(data, MOST_SOURCE_BYTES), reader.eof


def _brotli(data: bytes) -> tuple[bytes, bool]:
    import brotli

    reader = brotli.Decompressor()
    try:
        return bytes(reader.process(data, output_buffer_limit=MOST_SOURCE_BYTES)), bool(reader.is_finished())
    except brotli.error as error:
        raise ValueError("not brotli") from error

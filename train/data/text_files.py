"""Finds and reads the user's files: text, `.jsonl` and `.parquet`. Text and `.jsonl` may be packed (.gz, .xz, .zst)."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.common.errors import UserError
from train.common.wording import counted

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .py .pyi .c .h .cc .cpp .cu .cuh .hpp .js .ts .java .go .rs .tex .html".split()
)
KINDS = "text (.txt .md .py …) or .jsonl, each also .gz .xz .zst, or .parquet"
BINARY, EMPTY = "binary file", "empty file"
_COLUMN = "text"
_HEAD_BYTES = 8192
_READ_BYTES = 1 << 17
_READ_ROWS = 1000
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")


class Record(NamedTuple):
    """A document as it is stored."""

    data: bytes  # UTF-8 text, or a line of JSON
    number: int  # the line or row, from 1
    end: int  # the byte of the unpacked file after this line; a .parquet file has only rows
    read: int  # the bytes of the file read from disk so far


# what was skipped (`blank line`) → how often
Skipped = Counter[str]


@dataclass(frozen=True)
class Format:
    """How a kind of file is read.

    Attributes:
        unit: what `Record.number` counts; empty: the file is one document.
        check: returns `empty file` or `binary file` if there is nothing to read.
        records: yields the records of a file that begin at a byte and follow a record number, and counts the skipped ones.
        parse: returns a record's text; its second argument names the place in errors.
    """

    unit: str
    check: Callable[[Path], str]
    records: Callable[[Path, int, int, Skipped], Iterator[Record]]
    parse: Callable[[bytes, str], str]


@dataclass(frozen=True)
class TextFile:
    """A file to read. Its name is relative to the folder that the user gave."""

    path: Path
    name: str

    @property
    def packed(self) -> bool:
        return self.path.suffix in _OPENERS

    @property
    def format(self) -> Format:
        return _FORMATS.get(_inner_suffix(self.path), _TEXT)

    def records(self, skipped: Skipped, byte: int = 0, number: int = 0) -> Iterator[Record]:
        """Yield the records after the first `number` records. They begin at byte `byte` of the unpacked file.

        Raises:
            UserError: the file is damaged.
        """
        return self.format.records(self.path, byte, number, skipped)

    def place(self, record: Record) -> str:
        """Return the file and the line or row, as errors name it."""
        unit = self.format.unit
        return f"{self.path}, {unit} {record.number}" if unit else f"{self.path}"

    def text(self, record: Record) -> str:
        """Return the text of a record.

        Raises:
            UserError: the record is not UTF-8, or not a JSON object with a string `text`.
        """
        return self.format.parse(record.data, self.place(record))


def find_files(paths: Sequence[str | Path], skipped: Skipped) -> list[TextFile]:
    """Find the files to read, in the given order; those of a folder are sorted by name. Check how each file begins.

    In folders, files of another kind and binary files are skipped. Empty files are skipped everywhere.

    Raises:
        UserError: a file is missing, damaged, binary or UTF-16, a folder has no text, or all files are empty.
        ModuleNotFoundError: the package that reads this kind of file is not installed.
    """
    found: list[TextFile] = []
    for given in paths:
        path, before = Path(given), len(found)
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path}: no such file or folder: give {KINDS}, or folders of them")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_file():
                continue
            one = TextFile(file, file.name if file == path else file.relative_to(path).as_posix())
            suffix = _inner_suffix(file)
            readable = file == path or suffix in TEXT_SUFFIXES or suffix in _FORMATS
            why = one.format.check(file) if readable else f"{file.suffix or 'other'} file"
            if why == BINARY and file == path:
                raise UserError(f"{path}: a binary file: expected {KINDS}")
            if why:
                skipped[why] += 1
            else:
                found.append(one)
        if len(found) == before and path.is_dir():
            raise UserError(
                f"{path}: no text file in this folder (skipped: {skipped_text(skipped) or 'nothing'}): expected {KINDS}"
            )
    if not found:
        raise no_text(paths, skipped)
    return found


def no_text(paths: Sequence[str | Path], skipped: Skipped) -> UserError:
    return UserError(
        f"{', '.join(map(str, paths))}: the text is empty (skipped: {skipped_text(skipped)}): give files with text in them"
    )


def skipped_text(skipped: Skipped) -> str:
    """List what was skipped, the most frequent first: `12 .png files, 1 blank line`."""
    kinds = skipped.most_common()
    rest = sum(count for _, count in kinds[8:])
    return ", ".join(counted(count, what) for what, count in kinds[:8]) + (f", {rest:,} others" if rest else "")


def _inner_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _OPENERS else path.suffix


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Yield the unpacked stream and the file on disk."""
    try:
        with path.open("rb") as raw, _OPENERS.get(path.suffix, nullcontext)(raw) as stream:
            yield stream, raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or truncated ({error}): copy it again")


class _ZstdFrames(io.RawIOBase):
    """The unpacked bytes of a .zst file. zstandard's own reader does not report a truncated file."""

    def __init__(self, raw: Any) -> None:
        # imported here, because only .zst files need it
        import zstandard

        self.raw, self.library = raw, zstandard
        self.frame: Any = None
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.packed or self.raw.read(_READ_BYTES)
            if not packed and self.frame is None:
                return 0
            if not packed:
                raise EOFError("it ends inside a Zstandard frame")
            self.frame = self.frame or self.library.ZstdDecompressor().decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(packed))
            except self.library.ZstdError as error:
                raise EOFError(str(error)) from None
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def _check_text(path: Path) -> str:
    if not path.stat().st_size:
        return EMPTY
    with _opened(path) as (stream, _):
        head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if not head:
        return EMPTY
    encoding = _utf16(head)
    if encoding:
        raise UserError(f"{path}: UTF-16, expected UTF-8: convert it, e.g. `iconv -f {encoding} -t utf-8`")
    if b"\0" in head:
        return BINARY
    try:
        # not final: the head may end inside a character
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        # text in another 8-bit encoding has no control characters, and the error names its line
        return BINARY if _CONTROL.search(head) else ""
    return ""


def _utf16(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # without a byte order mark, most characters of European text have one zero byte
    even, odd = head[::2].count(0), head[1::2].count(0)
    if not even and odd > len(head) // 4:
        return "utf-16le"
    return "utf-16be" if not odd and even > len(head) // 4 else ""


def _lines(path: Path, byte: int, number: int, skipped: Skipped) -> Iterator[Record]:
    with _opened(path) as (stream, raw):
        if stream.seekable():
            stream.seek(byte)
        else:
            for start in range(0, byte, _READ_BYTES):
                stream.read(min(_READ_BYTES, byte - start))
        for line in stream:
            number, byte = number + 1, byte + len(line)
            if line.isspace():
                skipped["blank line"] += 1
            else:
                yield Record(line, number, byte, raw.tell())


def _whole(path: Path, _byte: int, number: int, skipped: Skipped) -> Iterator[Record]:
    if number:
        return
    with _opened(path) as (stream, raw):
        data = stream.read()
        if data.isspace():
            skipped[EMPTY] += 1
        else:
            yield Record(data, 1, len(data), raw.tell())


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    # imported here, because only .parquet files need it, and it takes a while
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _check_parquet(path: Path) -> str:
    if not path.stat().st_size:
        return EMPTY
    with _parquet(path) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        if columns.get(_COLUMN) not in ("string", "large_string"):
            found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise UserError(
                f"{path}: no column of strings named {_COLUMN!r}, found {found}: rename the column of the text"
            )
        return "" if file.metadata.num_rows else EMPTY


def _rows(path: Path, _byte: int, number: int, skipped: Skipped) -> Iterator[Record]:
    with _parquet(path) as file:
        from pyarrow import large_binary

        size, total = path.stat().st_size, file.metadata.num_rows
        groups, row = list(range(file.num_row_groups)), 0
        while groups and row + file.metadata.row_group(groups[0]).num_rows <= number:
            row += file.metadata.row_group(groups.pop(0)).num_rows
        for batch in file.iter_batches(_READ_ROWS, groups, [_COLUMN]):
            for data in batch.column(0).cast(large_binary()).to_pylist():
                row += 1
                if row > number and data is None:
                    skipped["null row"] += 1
                elif row > number:
                    yield Record(data, row, 0, size * row // total)


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = place if re.search(r", (line|row) \d+$", place) else f"{place}, line {line}"
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x}): convert it, e.g. `iconv -f latin1 -t utf8`"
        ) from None


def parse_document(line: bytes, place: str) -> str:
    """Return the `text` of one line of a `.jsonl` file. Lone surrogates become U+FFFD. Errors name the line as `place`.

    Raises:
        UserError: the line is not UTF-8, not a JSON object, or has no string `text`.
    """
    try:
        record = json.loads(_decode(line, place))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f'{place}: not JSON ({error}): expected one object per line, such as {{"text": "…"}}') from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(
            f'{place}: no string field \'text\', found {found}: expected one object per line, such as {{"text": "…"}}'
        )
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# suffix → unpacks a stream
_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(_ZstdFrames(raw), _READ_BYTES),
}
# suffix → format; any other file is text
_FORMATS = {
    ".jsonl": Format("line", _check_text, _lines, parse_document),
    ".parquet": Format("row", _check_parquet, _rows, _decode),
}
_TEXT = Format("", _check_text, _whole, _decode)

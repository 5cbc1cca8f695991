"""Reads documents to train on: the Python standard library's sources and documentation, or the user's text files.

This module does not change the text. The tokenizer later replaces consecutive whitespace by one space.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError

# skipped folders: tests, character tables, and packages that some distributions omit. All other files depend only on
# the Python version.
STDLIB_SKIPPED_FOLDERS = frozenset(
    "__pycache__ site-packages dist-packages test tests idle_test encodings idlelib lib2to3 distutils ensurepip tkinter turtledemo macholib".split()
)
# prefixes of skipped files, which are generated on the machine or by the distribution
STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "_distutils_system_mod")
STDLIB_SUFFIXES = (".py", ".txt")
TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .py .pyi .c .h .cc .cpp .cu .cuh .hpp .js .ts .java .go .rs .tex .html".split()
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")


@dataclass(frozen=True)
class Document:
    """A document. Its name is the same on every machine."""

    name: str
    text: str


def stdlib_documents(root: str | Path | None = None) -> Iterator[Document]:
    """Yield the standard library's sources and documentation, one document per file.

    `root` is the library's folder; None: the library of this interpreter. Files are sorted by the SHA-256 of their
    names, so that neighbouring documents are unrelated.

    Raises:
        UserError: the folder has no sources, as in a zipped or stripped installation.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    chosen = [path.relative_to(folder).as_posix() for path in _stdlib_files(folder)]
    if not chosen:
        raise UserError(
            f"{folder}: no Python source in it: the standard library of this interpreter is elsewhere or zipped: "
            "use another Python, or train on your own text with `python -m train.data text PATH`"
        )
    for name in sorted(chosen, key=_rank):
        text = _read_source(folder / name)
        if text.strip():
            yield Document(name, text)


def text_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Yield the documents of the user's files, in the given order. The files of a folder are sorted by name.

    Each line of a `.jsonl` file (also `.jsonl.gz` and `.jsonl.xz`) is a JSON object whose string `text` is a document.
    Any other file is one document of UTF-8 text. Files in folders are read only if their suffix is known.

    Raises:
        UserError: a file is missing, empty, not UTF-8 or not valid JSON; the message names file and line.
    """
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_text(file)]
            if not files:
                raise UserError(
                    f"{path}: no text file in this folder: expected {' '.join(sorted(TEXT_SUFFIXES))} or {' '.join(JSONL_SUFFIXES)}"
                )
        elif path.is_file():
            files = [path]
        else:
            raise UserError(f"{path}: no such file or folder: give text files, .jsonl files or folders of them")
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            if file.name.endswith(JSONL_SUFFIXES):
                yield from _jsonl_documents(file, name)
            else:
                text = _decode(file.read_bytes(), f"{file}")
                if not text.strip():
                    raise UserError(f"{file}: the text is empty: leave the file out")
                yield Document(name, text)


def split_documents(documents: Iterable[Document], val_bytes: int = 0) -> tuple[list[Document], list[Document]]:
    """Split documents into training and validation. The split depends only on the names and sizes of the documents.

    Documents are sorted by the SHA-256 of their names. Documents from the beginning become the validation text, until
    it has `val_bytes` UTF-8 bytes. Documents longer than a quarter of `val_bytes` are skipped. If the result has less
    than half of `val_bytes`, the end of the sorted text becomes the validation text instead. If `val_bytes` is 0, it is
    5 % of the text, but at most 200 kB, and at least 32 kB or a quarter of the text, whichever is less.

    Returns:
        Training and validation documents.

    Raises:
        UserError: the text is empty, or has at most `val_bytes` bytes.
    """
    ordered = sorted(documents, key=lambda document: _rank(document.name))
    sizes = [len(document.text.encode()) for document in ordered]
    total = sum(sizes)
    wanted = val_bytes or min(200_000, max(total // 20, min(total // 4, 32_768)))
    if not wanted:
        raise UserError("the text is empty: give at least one document with text in it")
    if wanted >= total:
        raise UserError(f"val_bytes {wanted} leaves no training text of {total} bytes: choose fewer, or give more text")
    train: list[Document] = []
    val: list[Document] = []
    taken = 0
    for document, size in zip(ordered, sizes, strict=True):
        fits = size <= wanted // 4 and taken < wanted
        (val if fits else train).append(document)
        taken += size if fits else 0
    if taken >= wanted // 2 and train:
        return train, val
    # there are too few documents, or they are too long: cut off the end of the text
    train, held, missing = list(ordered), [], wanted
    while missing > 0:
        last = train.pop()
        size = len(last.text.encode())
        if size > missing:
            head, tail = _cut(last.text, missing)
            train.append(Document(last.name, head))
            last = Document(f"{last.name}#end", tail)
        held.append(last)
        missing -= len(last.text.encode())
    return train, held[::-1]


def document_lines(path: Path, start_byte: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield each line of a `.jsonl` file (also `.gz`, `.xz`), with the number of bytes read from disk so far.

    Reading begins at `start_byte` of the uncompressed text.

    Raises:
        UserError: the compressed file is damaged.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, nullcontext)
    try:
        with path.open("rb") as raw, opener(raw) as stream:
            stream.seek(start_byte)
            for line in stream:
                yield line, raw.tell()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated ({error}): copy it again") from None


def parse_document(line: bytes, place: str) -> str:
    """Return the field `text` of one line of a `.jsonl` file. Lone surrogates become U+FFFD. Errors begin with `place`.

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


def _jsonl_documents(path: Path, name: str) -> Iterator[Document]:
    number = 0
    for number, (line, _) in enumerate(document_lines(path), 1):
        text = parse_document(line, f"{path}, line {number}")
        if not text.strip():
            raise UserError(f"{path}, line {number}: 'text' is empty: remove the line")
        yield Document(f"{name}:{number}", text)
    if not number:
        raise UserError(f"{path}: the text is empty: expected one JSON object with 'text' per line")


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = place if ", line " in place else f"{place}, line {line}"
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x}): convert it, e.g. `iconv -f latin1 -t utf8`"
        ) from None


def _read_source(path: Path) -> str:
    data = path.read_bytes()
    encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if path.suffix == ".py" else "utf-8"
    return data.decode(encoding, "replace")


def _stdlib_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        # os.walk does not enter folders that are removed here, such as installed packages, which may be very large
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in files:
            if name.endswith(STDLIB_SUFFIXES) and not name.startswith(STDLIB_SKIPPED_PREFIXES):
                yield Path(parent, name)


def _is_text(path: Path) -> bool:
    return path.suffix in TEXT_SUFFIXES or path.name.endswith(JSONL_SUFFIXES)


def _rank(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def _cut(text: str, tail_bytes: int) -> tuple[str, str]:
    """Split a text before its last `tail_bytes` bytes, at whitespace if there is any up to 1,000 bytes earlier."""
    data = text.encode()
    place = len(data) - tail_bytes
    blank = max(data.rfind(b"\n", 0, place), data.rfind(b" ", 0, place))
    place = blank if blank > 0 and place - blank < 1000 else place
    while data[place] & 0xC0 == 0x80:
        place -= 1
    return data[:place].decode(), data[place:].decode()


def total_bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)

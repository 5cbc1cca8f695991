"""Reads documents to train on: the Python standard library's sources and documentation, or the user's text files.

This module does not change the text. The tokenizer later replaces consecutive whitespace by one space.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.common.progress import Progress
from train.data.text_files import Skipped, find_files, no_text

# skipped folders: tests, character tables, and packages that some distributions omit. All other files depend only on
# the Python version.
STDLIB_SKIPPED_FOLDERS = frozenset(
    "__pycache__ site-packages dist-packages test tests idle_test encodings idlelib lib2to3 distutils ensurepip tkinter turtledemo macholib".split()
)
# prefixes of skipped files, which are generated on the machine or by the distribution
STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "_distutils_system_mod")
STDLIB_SUFFIXES = (".py", ".txt")


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


def text_documents(paths: Sequence[str | Path], skipped: Skipped) -> Iterator[Document]:
    """Yield the documents of the user's files and count what is skipped; see `find_files`.

    Each line of a `.jsonl` file and each row of a `.parquet` file is a document, whose text is the string `text`. Any
    other file is one document. Documents without a word are skipped.

    Raises:
        UserError: a file is missing, damaged or not UTF-8, a line is not valid JSON, or no document is left.
    """
    files = find_files(paths, skipped)
    found = 0
    with Progress(sum(file.path.stat().st_size for file in files), "reading", "bytes") as bar:
        for file in files:
            read = 0
            for record in file.records(skipped):
                text = file.text(record)
                bar.advance(record.read - read, f"{found:,} documents")
                read = record.read
                if text.strip():
                    found += 1
                    yield Document(f"{file.name}:{record.number}" if file.format.unit else file.name, text)
                else:
                    skipped["empty document"] += 1
    if not found:
        raise no_text(paths, skipped)


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

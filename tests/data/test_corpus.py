"""Which files become documents, in which order, how they are split, and what is refused."""

import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.data.corpus import Document, parse_document, split_documents, stdlib_documents, text_documents, total_bytes


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_the_library_is_its_own_sources_in_a_fixed_order(tmp_path: Path) -> None:
    kept = {
        "abc.py": "class ABC: pass",
        "json/decoder.py": "# decoder",
        "pydoc_data/topics.py": "topics = {}",
        "LICENSE.txt": "terms",
        "latin.py": "# -*- coding: latin-1 -*-\n# caf\xe9",
    }
    for name, text in kept.items():
        write(tmp_path / name, text.encode("latin-1"))
    for name in (
        "site-packages/numpy/core.py", "test/test_abc.py", "json/tests/case.py", "__pycache__/abc.py", "encodings/cp437.py", "idlelib/idle.py",
        "_sysconfigdata__linux.py", "sitecustomize.py", "config-3.11-x86_64/python-config.py", "abc.so", "empty.py",
    ):  # fmt: skip
        write(tmp_path / name, "" if name == "empty.py" else "x = 1")
    documents = list(stdlib_documents(tmp_path))
    assert {document.name: document.text for document in documents} == kept
    assert [document.name for document in documents] == sorted(
        kept, key=lambda name: hashlib.sha256(name.encode()).hexdigest()
    )


def test_this_interpreters_library_is_several_megabytes_and_steady() -> None:
    documents = list(stdlib_documents())
    assert documents == list(stdlib_documents())
    assert 4e6 < total_bytes(documents) < 4e7
    names = {document.name for document in documents}
    assert {"argparse.py", "json/__init__.py", "pydoc_data/topics.py"} <= names
    train, val = split_documents(documents)
    assert sorted(train + val, key=lambda d: d.name) == sorted(documents, key=lambda d: d.name)
    assert 200_000 <= total_bytes(val) <= 500_000
    assert max(len(document.text.encode()) for document in val) <= 100_000


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.data text"):
        list(stdlib_documents(tmp_path))


def test_text_files_folders_and_jsonl_in_order(tmp_path: Path) -> None:
    one = write(tmp_path / "one.unknown", "\ufeffBOM and text")
    folder = tmp_path / "folder"
    write(folder / "b.md", "bee")
    write(folder / "a" / "z.py", "zed = 1")
    write(folder / "picture.png", b"\x89PNG")
    lines = "".join(json.dumps({"id": index, "text": f"text {index} ü"}) + "\n" for index in range(3))
    write(folder / "c.jsonl", lines)
    packed = write(tmp_path / "p.jsonl.gz", gzip.compress(lines.encode()))
    dense = write(tmp_path / "q.jsonl.xz", lzma.compress(lines.encode()))
    found = [(document.name, document.text) for document in text_documents([one, folder, packed, dense])]
    three = [f"text {index} ü" for index in range(3)]
    assert found == [
        ("one.unknown", "BOM and text"),
        ("a/z.py", "zed = 1"),
        ("b.md", "bee"),
        *((f"c.jsonl:{index}", text) for index, text in enumerate(three, 1)),
        *((f"p.jsonl.gz:{index}", text) for index, text in enumerate(three, 1)),
        *((f"q.jsonl.xz:{index}", text) for index, text in enumerate(three, 1)),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt: the text is empty"),
        ("a.txt", b" \n\t ", r"a\.txt: the text is empty"),
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt, line 2: not UTF-8 \(byte 0xef\)"),
        ("a.jsonl", b"", r"a\.jsonl: the text is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "  "}\n', r"a\.jsonl, line 2: 'text' is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl, line 2: no string field 'text', .*\['txt'\]"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: no string field 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: .*found a list"),
        ("a.jsonl", b'{"text": "x"}\n\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], r"a\.jsonl\.gz: damaged"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 999)[:-20], r"a\.jsonl\.xz: damaged"),
        ("a.jsonl.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 40, r"a\.jsonl\.gz: damaged"),
        ("a.jsonl.xz", b"no xz", r"a\.jsonl\.xz: damaged"),
        ("folder/a.png", b"x", r"folder: no text file"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=message):
        list(text_documents([path.parent if name.startswith("folder") else path]))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file or folder"):
        list(text_documents([tmp_path / "none.txt"]))


def test_lone_surrogates_become_valid_text() -> None:
    text = parse_document(b'{"text": "a\\ud800b \\ud83d\\ude42"}', "here")
    assert text == "a\ufffdb \U0001f642" and text.encode()


def test_the_split_depends_on_names_and_sizes_alone() -> None:
    documents = [Document(f"d{index}", "word " * (20 + index)) for index in range(400)]
    train, val = split_documents(documents, 5000)
    assert (train, val) == split_documents(reversed(documents), 5000)
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).hexdigest())
    expected, size = [], 0
    for document in ranked:
        if size < 5000 and len(document.text) <= 1250:
            expected.append(document)
            size += len(document.text)
    assert val == expected and train == [document for document in ranked if document not in expected]
    assert 5000 <= total_bytes(val) < 5000 + 1250


def test_default_share_of_validation_text() -> None:
    def share(size: int) -> int:
        return total_bytes(split_documents([Document(f"d{index}", "x" * 99 + "\n") for index in range(size // 100)])[1])

    assert share(40_000) == 10_000
    assert 32_700 <= share(400_000) <= 32_900
    assert share(2_000_000) == 100_000


def test_a_single_document_is_cut_at_a_blank() -> None:
    text = "".join(f"wörd{index} " for index in range(5000))
    train, val = split_documents([Document("book", text)], 2000)
    assert train[0].text + val[0].text == text
    assert 2000 <= len(val[0].text.encode()) < 2020 and val[0].text.startswith(" w")


def test_a_text_without_blanks_is_cut_between_characters() -> None:
    text = "日本語" * 3000
    train, val = split_documents([Document("book", text)], 1000)
    assert train[0].text + val[0].text == text and 1000 <= len(val[0].text.encode()) <= 1003


@pytest.mark.parametrize(
    ("texts", "val_bytes", "message"), [([], 0, "empty"), (["abc"], 3, "leaves no training text"), ([""], 0, "empty")]
)
def test_no_split_without_text(texts: list[str], val_bytes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_documents([Document(str(index), text) for index, text in enumerate(texts)], val_bytes)

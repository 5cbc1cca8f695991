"""Which files of the standard library become documents, and how documents are split."""

import hashlib
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.data.corpus import Document, split_documents, stdlib_documents, total_bytes


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

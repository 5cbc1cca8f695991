"""The user's files: what is read from each kind and packing, what is skipped, and what is refused."""

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from train.common.errors import UserError, main_guard
from train.data.corpus import text_documents
from train.data.text_files import Record, Skipped, TextFile, find_files, parse_document, skipped_text

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ["text 0 ü", "日本語\n\n two lines", "last 🙂"]
LINES = "".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(TEXTS)).encode()


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(*paths: Path) -> tuple[dict[str, str], dict[str, int]]:
    skipped = Skipped()
    return {document.name: document.text for document in text_documents(paths, skipped)}, dict(skipped)


def write_rows(path: Path, texts: list[str | None], **options: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    kind = options.pop("kind", pyarrow.string())
    write_table(pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, kind)}), path, **options)
    return path


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_holds_the_same_documents(tmp_path: Path, packing: str) -> None:
    pack = PACKINGS[packing]
    lines = write(tmp_path / f"a.jsonl{packing}", pack(LINES))
    book = write(tmp_path / f"b.txt{packing}", pack("\ufeffBOM and\r\ntext".encode()))
    documents, skipped = read(lines, book)
    named = {f"a.jsonl{packing}:{number}": text for number, text in enumerate(TEXTS, 1)}
    assert documents == named | {f"b.txt{packing}": "BOM and\r\ntext"} and not skipped


def test_a_folder_is_read_in_order_and_says_what_it_skipped(tmp_path: Path) -> None:
    for name, data in {
        "z.md": b"zed",
        "a/b.py": b"bee = 1",
        "a/c.jsonl": b'\n{"text": "cee"}\n \n{"text": "  "}\n{"text": "dee"}\n\n',
        "a/d.txt.zst": PACKINGS[".zst"](b"packed"),
        "old.tex": "old, but in UTF-8: Übung".encode(),
        "empty.txt": b"",
        "blank.txt": b" \n\t ",
        "nothing.txt.gz": PACKINGS[".gz"](b""),
        "tape.txt": b"name\0\0\0ustar",
        "music.html": b"ID3\x03 \xff\xfb\x90 tag",
        "cut.txt.gz": PACKINGS[".gz"](b"MZ\x90\0 program"),
        "one.png": b"\x89PNG",
        "two.png": b"\x89PNG",
        "Makefile": b"all:",
    }.items():
        write(tmp_path / "folder" / name, data)
    odd = write(tmp_path / "given.unknown", "given by name")
    documents, skipped = read(tmp_path / "folder", odd)
    assert list(documents.items()) == [
        ("a/b.py", "bee = 1"), ("a/c.jsonl:2", "cee"), ("a/c.jsonl:5", "dee"), ("a/d.txt.zst", "packed"),
        ("old.tex", "old, but in UTF-8: Übung"), ("z.md", "zed"), ("given.unknown", "given by name"),
    ]  # fmt: skip
    assert skipped == {
        "blank line": 3, "empty document": 1, "empty file": 3, "binary file": 3, ".png file": 2, "other file": 1,
    }  # fmt: skip
    assert skipped_text(Skipped({".so file": 1, "blank line": 2000})) == "2,000 blank lines, 1 .so file"


NOISE = random.Random(1).randbytes(3000)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt: the text is empty \(skipped: 1 empty file\)"),
        ("a.txt.xz", b"", r"a\.txt\.xz: the text is empty \(skipped: 1 empty file\)"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: the text is empty \(skipped: 2 blank lines\)"),
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt, line 2: not UTF-8 \(byte 0xef\).*latin1"),
        ("a.txt", b"x" * 9000 + b"\n\xff", r"a\.txt, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.txt", "Grüße an alle".encode("utf-16"), r"a\.txt: UTF-16, .*`iconv -f utf-16 -t utf-8`$"),
        ("a.txt", "Grüße an alle".encode("utf-16-le"), r"a\.txt: UTF-16, .*`iconv -f utf-16le -t utf-8`$"),
        ("a.txt.gz", PACKINGS[".gz"]("Grüße".encode("utf-16-be")), r"a\.txt\.gz: UTF-16, .*-f utf-16be -t"),
        ("a.jsonl", LINES.decode().encode("utf-16"), r"a\.jsonl: UTF-16"),
        ("a.txt", b"\x7fELF\x02\x01\x01\0\0", r"a\.txt: a binary file: expected text"),
        ("a.pdf", b"%PDF-1.4\n\x07\xe2\xe3\xcf\xd3", r"a\.pdf: a binary file: expected text"),
        ("a.jsonl", PACKINGS[".gz"](LINES), r"a\.jsonl: a binary file"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl, line 2: no string field 'text', .*\['txt'\]"),
        ("a.jsonl", b'\n{"text": 5}\n', r"a\.jsonl, line 2: no string field 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: .*found a list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl.gz", PACKINGS[".gz"](b"x")[:10] + b"\xff" * 40, r"a\.jsonl\.gz: damaged"),
        ("a.txt.zst", PACKINGS[".zst"](NOISE.hex().encode()) + b"more", r"a\.txt\.zst: damaged"),
        *((f"a.jsonl{end}", b"not packed", rf"a\.jsonl\{end}: damaged") for end in PACKINGS if end),
        *((f"a.txt{end}", PACKINGS[end](NOISE.hex().encode())[:-9], rf"a\.txt\{end}: damaged") for end in PACKINGS if end),
        ("folder/a.png", b"x", r"folder: no text file in this folder \(skipped: 1 \.png file\)"),
        ("none/", None, r"none: no such file"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        write(path, data)
    with pytest.raises(UserError, match=message) as caught:
        read(path.parent if name.startswith("folder") else path)
    assert "\n" not in str(caught.value)


def test_lone_surrogates_become_valid_text() -> None:
    text = parse_document(b'{"text": "a\\ud800b \\ud83d\\ude42"}', "here")
    assert text == "a\ufffdb \U0001f642" and text.encode()


def records(path: Path, after: Record | None = None) -> list[Record]:
    file = TextFile(path, path.name)
    return list(file.records(Skipped(), after.end, after.number) if after else file.records(Skipped()))


@pytest.mark.parametrize("packing", PACKINGS)
def test_reading_resumes_after_any_line(tmp_path: Path, packing: str) -> None:
    # two frames, larger than what is read at once
    lines = [b'{"text": "%s"}\n\n' % random.Random(index).randbytes(20_000).hex().encode() for index in range(9)]
    pack = PACKINGS[packing]
    path = write(tmp_path / f"a.jsonl{packing}", pack(b"".join(lines[:5])) + pack(b"".join(lines[5:])))
    found = records(path)
    assert [record.data + b"\n" for record in found] == lines
    assert [record.number for record in found] == list(range(1, 18, 2))
    assert path.stat().st_size - 1 <= found[-1].read <= path.stat().st_size
    for index in (0, 4, 8):
        # how far the file was read ahead differs
        assert [record[:3] for record in records(path, found[index])] == [record[:3] for record in found[index + 1 :]]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [*TEXTS, None, " ", "end"], row_group_size=2)
    documents, skipped = read(path)
    assert list(documents.values()) == [*TEXTS, "end"] and list(documents)[-1] == "a.parquet:6"
    assert skipped == {"null row": 1, "empty document": 1}
    found = records(path)
    assert [record.number for record in found] == [1, 2, 3, 5, 6] and found[-1].read == path.stat().st_size
    for index in range(5):
        assert records(path, found[index]) == found[index + 1 :]


def test_bad_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.parquet", [NOISE.hex(), "b"], compression="zstd").read_bytes()
    summed = bytearray(
        write_rows(
            tmp_path / "summed.parquet", ["plain"], compression="none", use_dictionary=False, write_page_checksum=True,
            write_statistics=False,
        ).read_bytes()
    )  # fmt: skip
    summed[summed.index(b"plain")] ^= 1
    foreign = write_rows(tmp_path / "numbers.parquet", [1, 2], kind=None)
    for name, data, message in (
        ("cut.parquet", good[:-30], "damaged or truncated"),
        ("bad.parquet", good[:200] + bytes(800) + good[1000:], "damaged or truncated"),
        ("text.parquet", b"no parquet", "damaged or truncated"),
        ("summed.parquet", bytes(summed), "damaged or truncated"),
        (foreign.name, foreign.read_bytes(), r"no column of strings named 'text', found id \(int64\), text \(int64\)"),
        ("empty.parquet", b"", r"the text is empty \(skipped: 1 empty file\)"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}") as caught:
            read(write(tmp_path / name, data))
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package, name, extra in (("zstandard", "a.txt.zst", "train"), ("pyarrow", "a.parquet", "parquet")):
        path = write(tmp_path / name, b"something")
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(SystemExit) as caught:
            main_guard(lambda path=path: find_files([path], Skipped()) and None)
        assert caught.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {package} is not installed: pip install {package}") and f"'.[{extra}]'" in line

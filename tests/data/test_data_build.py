"""Datasets from documents: every token against a straight-line encoding, every figure of the manifest recounted."""

import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train.data.build
from train.common.errors import UserError
from train.common.files import sha256_file
from train.data.build import build_dataset, compressor_bpb
from train.data.bulk import build_bulk
from train.data.corpus import Document, stdlib_documents
from train.data.manifest import read_manifest
from train.data.shards import read_shard
from train.data.tokenizer import load_tokenizer

VOCAB = 384


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    found: list[Document] = []
    for document in stdlib_documents():
        if 500 < len(document.text) < 12_000:
            found.append(document)
        if len(found) == 40:
            return found
    raise AssertionError("the standard library has fewer than 40 middling files")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stream(folder: Path, split: str) -> list[int]:
    return [token for path in sorted(folder.glob(f"*_{split}_*.bin")) for token in read_shard(path).tolist()]


def encoded(model: Path, texts: list[str]) -> list[int]:
    tokenizer = load_tokenizer(model, VOCAB)
    return [token for text in texts for token in (1, *tokenizer.Encode(text))]


def small(documents: list[Document], out: Path, **changes: object):
    return build_dataset(documents[5:], documents[:5], out, VOCAB, **{"name": "x", "shard_tokens": 20_000} | changes)


def test_shards_and_manifest_hold_the_documents(documents: list[Document], tmp_path: Path) -> None:
    info = small(documents, tmp_path / "d", source="library")
    folder = tmp_path / "d"
    model = folder / "x_384_bpe.model"
    for split, part in (("val", documents[:5]), ("train", documents[5:])):
        texts = [document.text for document in part]
        tokens = encoded(model, texts)
        assert stream(folder, split) == tokens
        figures = getattr(info, split)
        assert figures.documents == len(part) and figures.tokens == len(tokens)
        assert figures.text_bytes == sum(len(text.encode()) for text in texts)
        assert figures.normalized_bytes == sum(len(" ".join(text.split()).encode()) for text in texts)
        assert figures.shards == len(list(folder.glob(f"x_{split}_*.bin"))) == -(-len(tokens) // 20_000)
    assert info.train.shards > 1
    assert (info.name, info.source, info.vocab_size, info.tokenizer) == ("x", "library", VOCAB, model.name)
    assert info.tokenizer_sha256 == sha256_file(model)
    assert read_manifest(folder) == info
    assert {path.name for path in tmp_path.iterdir()} == {"d"}


def test_the_same_documents_give_the_same_bytes(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, threads in (("a", 1), ("b", 2)):
        monkeypatch.setattr(train.data.build.os, "cpu_count", lambda threads=threads: threads)
        small(documents, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_tokenizer_never_sees_validation_text(documents: list[Document], tmp_path: Path) -> None:
    small(documents, tmp_path / "a")
    changed = [Document(document.name, "Ω≈ç√∫ qqzzx " * 200) for document in documents[:5]] + documents[5:]
    small(changed, tmp_path / "b")
    name = "x_384_bpe.model"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_takes_a_tokenizer_that_is_there(documents: list[Document], tmp_path: Path) -> None:
    small(documents, tmp_path / "a")
    model = tmp_path / "a" / "x_384_bpe.model"
    build_dataset(documents[:9], documents[30:], tmp_path / "b", VOCAB, name="y", tokenizer_path=model)
    assert (tmp_path / "b" / "y_384_bpe.model").read_bytes() == model.read_bytes()
    assert stream(tmp_path / "b", "train") == encoded(model, [document.text for document in documents[:9]])
    with pytest.raises(UserError, match="384 pieces, but vocab_size is 512"):
        build_dataset(documents[:9], documents[30:], tmp_path / "c", 512, tokenizer_path=model)


def test_what_exists_is_kept_unless_told_otherwise(documents: list[Document], tmp_path: Path) -> None:
    small(documents, tmp_path / "d")
    before = contents(tmp_path / "d")
    with pytest.raises(UserError, match=r"exists already: .*--overwrite"):
        small(documents, tmp_path / "d", name="y")
    assert contents(tmp_path / "d") == before
    small(documents, tmp_path / "d", name="y", overwrite=True)
    assert {name[0] for name in contents(tmp_path / "d")} == {"y", "m"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="not a dataset"):
        small(documents, tmp_path / "mine", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"d", "mine"} and len(contents(tmp_path / "mine")) == 1


def test_nothing_half_written_after_an_error(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.data.build, "atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        small(documents, tmp_path / "deep" / "d")
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize(
    ("train_texts", "val_texts", "which"), [([], ["a"], "training"), (["a"], [" \n"], "validation")]
)
def test_an_empty_split_is_refused(tmp_path: Path, train_texts: list[str], val_texts: list[str], which: str) -> None:
    parts = [[Document("x", text) for text in texts] for texts in (train_texts, val_texts)]
    with pytest.raises(UserError, match=f"the {which} text is empty"):
        build_dataset(*parts, tmp_path / "d", VOCAB)
    assert not list(tmp_path.iterdir())


def test_a_foreign_manifest_is_refused_and_none_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    for text in ("{}", "[", '{"notes": 1, "train": {}, "val": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: not a dataset's manifest"):
            read_manifest(tmp_path)


@pytest.mark.skipif(
    not (shutil.which("gzip") and shutil.which("xz")), reason="the programs gzip and xz are not installed"
)
def test_compressors_take_what_the_programs_need(documents: list[Document]) -> None:
    before, text = (
        "".join(document.text for document in documents[5:]),
        "".join(document.text for document in documents[:5]),
    )

    def size(program: str, data: str) -> int:
        return len(
            subprocess.run([*program.split(), "-c"], input=data.encode(), capture_output=True, check=True).stdout
        )

    measured = compressor_bpb(before, text)
    assert set(measured) == {"gzip -9", "xz -9"}
    for program, bits in measured.items():
        expected = (size(program, before + text) - size(program, before)) * 8 / len(text.encode())
        # xz's file format rounds to four bytes, and names its checksum differently
        assert bits == pytest.approx(expected, abs=100 * 8 / len(text.encode()))
    assert measured["xz -9"] < measured["gzip -9"] < 4


def test_compressors_get_a_bounded_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.data.build, "COMPRESSED_TRAIN_BYTES", 3000)
    monkeypatch.setattr(train.data.build, "COMPRESSED_VAL_BYTES", 500)
    words = [str(number**3) for number in range(5000)]
    before, text = " ".join(words[:4000]), " ".join(words[4000:])
    kept, scored = before.encode()[-3000:], text.encode()[:500]
    expected = {
        "gzip -9": (len(gzip.compress(kept + scored, 9)) - len(gzip.compress(kept, 9))) * 8 / 500,
        "xz -9": (len(lzma.compress(kept + scored, preset=9)) - len(lzma.compress(kept, preset=9))) * 8 / 500,
    }
    assert compressor_bpb(before, text) == expected


def write_docs(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(
        lzma.compress(data, preset=0) if path.suffix == ".xz" else gzip.compress(data) if path.suffix == ".gz" else data
    )
    return path


def test_bulk_is_the_documents_in_order(documents: list[Document], tmp_path: Path) -> None:
    texts = [document.text for document in documents]
    # an empty document is a lone BOS, as published
    texts[20] = ""
    # a file of text is one document
    book = tmp_path / "book.txt"
    book.write_text(texts[24], newline="")
    files = [
        write_docs(tmp_path / "a.jsonl", texts[:9]),
        write_docs(tmp_path / "b.jsonl.xz", texts[9:24]),
        book,
        write_docs(tmp_path / "c.jsonl.gz", texts[25:]),
    ]
    info = build_bulk(
        files,
        tmp_path / "d",
        VOCAB,
        val_docs=12,
        tokenizer_docs=10,
        workers=2,
        shard_tokens=7000,
    )
    folder = tmp_path / "d"
    val, train_tokens = encoded(folder / info.tokenizer, texts[:12]), encoded(folder / info.tokenizer, texts[12:])
    assert stream(folder, "val") == val and stream(folder, "train") == train_tokens
    assert (info.val.documents, info.val.tokens) == (12, len(val))
    assert (info.train.documents, info.train.tokens) == (28, len(train_tokens))
    assert info.train.text_bytes == sum(len(text.encode()) for text in texts[12:])
    assert info.val.normalized_bytes == sum(len(" ".join(text.split()).encode()) for text in texts[:12])
    assert all(path.stat().st_size == 1024 + 14_000 for path in sorted(folder.glob("docs_train_*.bin"))[:-1])
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".model", ".json"} and read_manifest(folder) == info
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.xz", "book.txt", "c.jsonl.gz", "d"]


def bulk_command(docs: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "train.data", "build", "--docs", str(docs), "--vocab", str(VOCAB), "--val-docs", "30", "--tokenizer-train-docs", "40",
        "--max-train-tokens", "1500000", "--shard-tokens", "100000", "--workers", str(workers), "--out", str(out), "--no-yardsticks",
    ]  # fmt: skip


def test_bulk_goes_on_after_a_kill_with_the_same_bytes(documents: list[Document], tmp_path: Path) -> None:
    texts = [document.text for document in documents]
    docs = write_docs(tmp_path / "docs.jsonl", [texts[index % 40][index:] for index in range(1200)])
    killed = subprocess.Popen(
        bulk_command(docs, tmp_path / "d", 2), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    work, state = tmp_path / "d.partial", tmp_path / "d.partial" / "state.json"
    deadline = time.monotonic() + 60
    while not (state.exists() and json.loads(state.read_text())["shards"]["train"] >= 2):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    # returns when the last process that holds the pipe has ended: those that encode do not outlive their parent
    killed.communicate(timeout=60)
    shards = json.loads(state.read_text())["shards"]
    finished = shards["train"]
    assert 2 <= finished < 15 and not (tmp_path / "d").exists()
    kept = {path.name: path.stat().st_ino for path in sorted(work.glob("docs_train_*.bin"))[:finished]}
    # what the kill may have cut off in the middle of a write
    (work / ".docs_train_000099.bin.x.part").write_bytes(b"half")
    again = subprocess.run(bulk_command(docs, tmp_path / "d", 1), capture_output=True, text=True, check=True)
    assert f"resuming with {sum(shards.values())} finished shards" in again.stdout and "MB/s" in again.stdout
    assert {name: (tmp_path / "d" / name).stat().st_ino for name in kept} == kept
    straight = subprocess.run(bulk_command(docs, tmp_path / "e", 2), capture_output=True, text=True, check=True)
    assert "resuming" not in straight.stdout
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    assert len(stream(tmp_path / "d", "train")) == 1_500_000
    assert not work.exists()


def test_bulk_work_whose_state_is_damaged_is_refused(documents: list[Document], tmp_path: Path) -> None:
    docs = write_docs(tmp_path / "docs.jsonl", [document.text for document in documents])
    (tmp_path / "d.partial").mkdir()
    for content in (b"\xff", b"[]", b"{}"):
        (tmp_path / "d.partial" / "state.json").write_bytes(content)
        with pytest.raises(UserError, match=r"state\.json: .*: delete the folder .*d\.partial"):
            build_bulk([docs], tmp_path / "d", VOCAB, val_docs=3, workers=1)


def test_bulk_skips_blank_lines_and_leaves_nothing_of_a_damaged_file(
    documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [document.text for document in documents]
    lines = write_docs(tmp_path / "docs.jsonl", texts).read_bytes()
    packed = gzip.compress(b"\n" + lines.replace(b"\n", b"\n \n"))
    (tmp_path / "blank.jsonl.gz").write_bytes(packed)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    options = {"val_docs": 5, "tokenizer_docs": 20, "workers": 1, "tokenizer_path": tmp_path / "t" / "x_384_bpe.model"}
    small(documents, tmp_path / "t")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged or truncated"):
        build_bulk([tmp_path / "cut.jsonl.gz"], tmp_path / "d", VOCAB, **options)
    assert {path.name for path in tmp_path.iterdir()} == before
    info = build_bulk([tmp_path / "blank.jsonl.gz"], tmp_path / "d", VOCAB, **options)
    assert (info.val.documents, info.train.documents) == (5, 35)
    assert stream(tmp_path / "d", "train") == encoded(options["tokenizer_path"], texts[5:])
    assert "skipped: 41 blank lines\n" in capsys.readouterr().out


def test_bulk_work_of_other_settings_is_not_mixed_in(documents: list[Document], tmp_path: Path) -> None:
    docs = write_docs(tmp_path / "docs.jsonl", [document.text for document in documents] * 4 + ["{"])
    broken = docs.read_bytes().replace(b'{"text": "{"}', b'{"txt": 1}')
    docs.write_bytes(broken)
    options = {"val_docs": 3, "tokenizer_docs": 20, "workers": 1, "shard_tokens": 3000}
    with pytest.raises(UserError, match=r"docs\.jsonl, line 161: no string field 'text'"):
        build_bulk([docs], tmp_path / "d", VOCAB, **options)
    assert not (tmp_path / "d").exists()
    # its first shards are finished
    with pytest.raises(UserError, match=r"d\.partial: started with val_docs 3, this command has 4"):
        build_bulk([docs], tmp_path / "d", VOCAB, **options | {"val_docs": 4})


@pytest.mark.parametrize(
    ("val_docs", "tokenizer", "message"),
    [
        (50, False, "no document after the first 50"),
        (40, False, "no document after the first 40"),
        (50, True, "the files have 40 documents, the validation split needs 50"),
        (40, True, "no document is left for training"),
    ],
)
def test_bulk_needs_more_documents_than_validation_takes(
    documents: list[Document], tmp_path: Path, val_docs: int, tokenizer: bool, message: str
) -> None:
    docs = write_docs(tmp_path / "docs.jsonl", [document.text for document in documents])
    model = ""
    if tokenizer:
        small(documents, tmp_path / "t")
        model = str(tmp_path / "t" / "x_384_bpe.model")
    with pytest.raises(UserError, match=message):
        build_bulk([docs], tmp_path / "d", VOCAB, val_docs=val_docs, tokenizer_path=model, workers=1)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file or folder"):
        build_bulk([tmp_path / "none.jsonl"], tmp_path / "e", VOCAB)


def test_last_tokens_come_from_the_last_shards() -> None:
    shards = [np.arange(0, 5), np.arange(5, 8), np.arange(8, 10)]
    for count in range(1, 12):
        assert np.concatenate(train.data.build._last(shards, count)).tolist() == list(range(10))[-count:]

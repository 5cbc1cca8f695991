"""Builds a dataset folder (tokenizer, shards, manifest) from documents. After an error, no files are left."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from train.common.errors import UserError
from train.common.files import atomic_write, sha256_file, temporary_folder
from train.common.progress import Progress
from train.data.case_operators import OPERATORS, encode_with_bytes, restore, transform
from train.data.corpus import Document, split_documents, stdlib_documents, total_bytes
from train.data.manifest import MANIFEST, DatasetInfo, SplitInfo, read_manifest
from train.data.shards import BOS, SHARD_TOKENS, ShardWriter, check_shard, find_shards, read_shard, read_sidecar
from train.data.tokenizer import SETTINGS, ByteTables, byte_tables, find_operator, load_tokenizer, train_tokenizer

# limits of the text that compressors get, in bytes, because xz -9 compresses only 2 to 3 MB per second
COMPRESSED_TRAIN_BYTES = 8_000_000
COMPRESSED_VAL_BYTES = 2_000_000
_BATCH_BYTES = 4_000_000
_CHUNK_TOKENS = 1 << 22
_NOTES = {
    "tokenizer_settings": SETTINGS,
    "normalized_bytes": "bytes after the tokenizer's normalization; with case operators the bytes of the original text that "
    "tokens stand for; bits per byte use these",
    "yardsticks": "bits per byte of gzip -9 and xz -9, primed with the training text: (|train+val| - |train|) * 8 / val, of "
    f"the last {COMPRESSED_TRAIN_BYTES} normalized bytes of train and the first {COMPRESSED_VAL_BYTES} of val",
}


def build_stdlib(out: str | Path, vocab_size: int, *, val_bytes: int = 0, **options: Any) -> DatasetInfo:
    """Make a dataset of the Python standard library's text. `options` are those of `build_dataset`.

    Raises:
        UserError: `build_dataset` raises it, or the interpreter's library cannot be read.
    """
    print("text: the Python standard library's sources and documentation; nothing is downloaded", flush=True)
    parts = split_documents(stdlib_documents(), val_bytes)
    return build_dataset(*parts, out, vocab_size, name="stdlib", source="Python standard library", **options)


def build_dataset(
    train_docs: Sequence[Document],
    val_docs: Sequence[Document],
    out: str | Path,
    vocab_size: int,
    *,
    name: str = "text",
    source: str = "",
    tokenizer_path: str | Path = "",
    case_operators: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
) -> DatasetInfo:
    """Make a dataset in the folder `out`: tokenizer, training shards, validation shards and manifest.

    The files are `<name>_<V>_bpe.model`, `<name>_train_*.bin`, `<name>_val_*.bin` and `manifest.json`. The same
    documents give the same files. The tokenizer is trained on the training text only, or copied from `tokenizer_path`.
    The folder has a temporary name until it is complete. `source` describes the text in the manifest.

    With `case_operators`, the tokens are those of the transformed text, and the files `<name>_val_bytes_*.bin` are added.

    Raises:
        UserError: a text is empty, `out` exists, or the tokenizer cannot be trained or loaded.
    """
    for split, documents in (("training", train_docs), ("validation", val_docs)):
        if not any(document.text.strip() for document in documents):
            raise UserError(f"the {split} text is empty: give at least one document with text in it")
    with _staged_folder(out, overwrite) as folder:
        model = folder / f"{name}_{vocab_size}_bpe.model"
        training = (document.text for document in train_docs)
        tokenizer = prepare_tokenizer(training, vocab_size, model, tokenizer_path, case_operators=case_operators)
        written = transform if case_operators else str
        counts: dict[str, tuple[int, int]] = {}
        for split, documents in (("val", val_docs), ("train", train_docs)):
            size, started = total_bytes(documents), time.monotonic()
            counts[split] = len(documents), size
            with (
                ShardWriter(folder, name, split, shard_tokens) as writer,
                ShardWriter(folder, name, "val_bytes", shard_tokens) as sidecar,
                Progress(size, f"encoding {split}", "bytes") as bar,
            ):
                for batch in _batches(documents):
                    if case_operators and split == "val":
                        for document in batch:
                            encoded, sizes = encode_with_bytes(tokenizer, document.text, document.name)
                            writer.extend(encoded)
                            sidecar.extend(sizes)
                    else:
                        texts = [written(document.text) for document in batch]
                        for ids in tokenizer.Encode(texts, num_threads=os.cpu_count() or 1):
                            writer.add(ids)
                    tokens = len(writer.paths) * shard_tokens + writer.pending
                    bar.advance(total_bytes(batch), f"{tokens:,} tokens")
            seconds = max(time.monotonic() - started, 1e-9)
            print(f"encoded {split}: {size:,} bytes of text at {size / seconds / 1e6:.1f} MB/s", flush=True)
        return describe_dataset(folder, name, source, model, tokenizer, shard_tokens, counts)


def describe_dataset(
    folder: Path,
    name: str,
    source: str,
    model: Path,
    tokenizer: SentencePieceProcessor,
    shard_tokens: int,
    counts: dict[str, tuple[int, int]],
    *,
    count_train_bytes: bool = True,
) -> DatasetInfo:
    """Write the manifest of the finished shards in `folder`.

    Args:
        counts: split → number of documents, bytes of text.
        count_train_bytes: also count the normalized bytes of the training split. This reads all its tokens. With case
            operators these bytes are never counted.
    """
    paths = {split: find_shards(folder, split) for split in counts}
    counted: dict[str, int | None] = dict.fromkeys(counts)
    if sidecar := read_sidecar(paths["val"]):
        counted["val"] = sum(int(sizes.sum(dtype=np.int64)) for sizes in sidecar)
    else:
        tables = byte_tables(tokenizer, tokenizer.vocab_size())
        for split in counts if count_train_bytes else ("val",):
            counted[split] = count_bytes(paths[split], tables)
    kept = "in its tokens" if sidecar else "after normalization"
    print(
        f"validation text: {counts['val'][1]:,} bytes, {counted['val']:,} {kept} (bpb uses the latter)",
        flush=True,
    )
    splits = {
        split: SplitInfo(*counts[split], counted[split], sum(map(check_shard, paths[split])), len(paths[split]))
        for split in counts
    }
    info = DatasetInfo(
        name=name, source=source, vocab_size=tokenizer.vocab_size(), tokenizer=model.name, tokenizer_sha256=sha256_file(model),
        shard_tokens=shard_tokens, train=splits["train"], val=splits["val"],
    )  # fmt: skip
    _write_manifest(folder, info)
    return info


def measure_compressors(path: str | Path) -> DatasetInfo:
    """Measure `compressor_bpb` on the text of a dataset's tokens, and write the results into the manifest.

    Raises:
        UserError: the folder `path` has no manifest.
    """
    folder = Path(path)
    info = read_manifest(folder)
    if info is None:
        raise UserError(f"{folder}: no {MANIFEST}: build the dataset with python -m train.data")
    tokenizer = load_tokenizer(folder / info.tokenizer, info.vocab_size, operators=True)
    training, validation = (find_shards(folder, split) for split in ("train", "val"))
    # each token except BOS has at least one byte, so this many tokens are enough
    before = np.concatenate(_last([read_shard(path) for path in training], COMPRESSED_TRAIN_BYTES))
    text = read_shard(validation[0])[:COMPRESSED_VAL_BYTES]
    decoded = [tokenizer.Decode(tokens.tolist()) for tokens in (before, text)]
    measured = compressor_bpb(*(map(restore, decoded) if find_operator(tokenizer) else decoded))
    info = replace(info, yardsticks=measured)
    _write_manifest(folder, info)
    return info


def _write_manifest(folder: Path, info: DatasetInfo) -> None:
    atomic_write(folder / MANIFEST, json.dumps(asdict(info) | {"notes": _NOTES}, indent=2) + "\n")


def load_given_tokenizer(path: str | Path, vocab_size: int, *, case_operators: bool) -> SentencePieceProcessor:
    """Load a dataset's tokenizer. It must have the four operators of CaseOps if `case_operators`, else none."""
    tokenizer = load_tokenizer(path, vocab_size, operators=case_operators)
    if case_operators and any(tokenizer.PieceToId(operator) == tokenizer.unk_id() for operator in OPERATORS):
        raise UserError(
            f"{path}: has no pieces for the case operators: leave out --case-operators, or --tokenizer to train one"
        )
    return tokenizer


def prepare_tokenizer(
    documents: Iterable[str], vocab_size: int, path: Path, existing: str | Path = "", *, case_operators: bool = False
) -> SentencePieceProcessor:
    """Copy the tokenizer `existing` to `path`. If `existing` is empty, train a tokenizer and write it to `path`."""
    if existing:
        tokenizer = load_given_tokenizer(existing, vocab_size, case_operators=case_operators)
        atomic_write(path, Path(existing).read_bytes())
        return tokenizer
    started = time.monotonic()
    print(f"tokenizer: training {vocab_size} pieces", flush=True)
    if case_operators:
        documents = map(transform, documents)
    tokenizer = train_tokenizer(documents, vocab_size, path, OPERATORS if case_operators else ())
    print(f"tokenizer: {vocab_size} pieces, trained in {time.monotonic() - started:.1f} s", flush=True)
    return tokenizer


def count_bytes(paths: Sequence[Path], tables: ByteTables) -> int:
    """Count the bytes of normalized text in these shards."""
    total, previous = 0, np.array([BOS], dtype=np.uint16)
    for path in paths:
        shard = read_shard(path)
        for start in range(0, len(shard), _CHUNK_TOKENS):
            tokens = np.concatenate((previous, shard[start : start + _CHUNK_TOKENS]))
            total += int(tables.count(tokens).sum())
            previous = tokens[-1:]
    return total


def compressor_bpb(train_text: str, val_text: str) -> dict[str, float]:
    """Measure the bits per byte of `gzip -9` and `xz -9` on the validation text, primed with the training text.

    "Primed" means that the compressor has read the training text before. Its score is
    (|compress(train + val)| - |compress(train)|) · 8 / |val|, where `train` is the last 8 MB of training text and `val`
    the first 2 MB of validation text, both in UTF-8. With more text xz would take minutes.

    Raises:
        UserError: the validation text is empty.
    """
    before, text = train_text.encode()[-COMPRESSED_TRAIN_BYTES:], val_text.encode()[:COMPRESSED_VAL_BYTES]
    if not text:
        raise UserError("the validation text is empty: give at least one document with text in it")
    compressors = {
        # gzip's header and trailer of 18 bytes cancel in the difference of the two sizes
        "gzip -9": lambda data: len(gzip.compress(data, 9)),
        "xz -9": lambda data: len(lzma.compress(data, preset=9)),
    }
    # both compressors release the GIL
    with ThreadPoolExecutor() as pool:
        sizes = {
            name: [pool.submit(size, data) for data in (before + text, before)] for name, size in compressors.items()
        }
        return {name: (both.result() - first.result()) * 8 / len(text) for name, (both, first) in sizes.items()}


def check_output(out: str | Path, overwrite: bool) -> None:
    """Raise a UserError if `out` exists, unless it is an empty folder or a dataset that may be overwritten."""
    folder = Path(out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder}: exists already: choose another --out, or give --overwrite")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: not a dataset (no {MANIFEST}), so --overwrite does not delete it: choose another --out"
        )


def install_folder(folder: Path, out: str | Path) -> None:
    """Rename a finished folder to `out`. Delete the earlier folder `out`, if there is one."""
    target = Path(out)
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        os.rename(target, old / target.name)
    os.rename(folder, target)
    if old is not None:
        shutil.rmtree(old)


@contextmanager
def _staged_folder(out: str | Path, overwrite: bool) -> Iterator[Path]:
    check_output(out, overwrite)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as work:
        folder = work / target.name
        folder.mkdir()
        yield folder
        install_folder(folder, target)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _last(shards: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    taken: list[np.ndarray] = []
    for shard in reversed(shards):
        taken.insert(0, np.asarray(shard[-count:]))
        count -= len(taken[0])
        if count <= 0:
            break
    return taken

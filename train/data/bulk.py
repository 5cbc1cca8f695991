"""Builds datasets larger than memory, in parallel. An interrupted build can be resumed.

Shards are written to the folder `<out>.partial`, which is renamed to `<out>` at the end. After each shard, the file
`state.json` in that folder stores the next document and the next token in that document. The same command resumes at
this place. Worker processes encode batches of documents. The results are joined in document order, so the shards do
not depend on the number of workers.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from train.common.errors import UserError
from train.common.files import atomic_write, open_lock, read_json, sha256_file
from train.common.progress import Progress
from train.common.wording import counted
from train.data.build import check_output, describe_dataset, install_folder, load_given_tokenizer, prepare_tokenizer
from train.data.case_operators import encode_with_bytes, transform
from train.data.manifest import DatasetInfo
from train.data.shards import SHARD_TOKENS, ShardWriter, Tokens
from train.data.text_files import Record, Skipped, TextFile, find_files, skipped_text
from train.data.tokenizer import load_tokenizer

VAL_DOCS = 50_000
STATE = "state.json"
LOCK = ".lock"
# small, so that the workers end at almost the same time
_BATCH_BYTES = 250_000
# batches that wait for each worker: the parent reads on while the workers start
_AHEAD = 40

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """The start of a document: index of the file, byte offset in the unpacked file, and line or row. All count from 0."""

    file: int = 0
    byte: int = 0
    line: int = 0


@dataclass
class State:
    """The progress of a build: shards contain all documents before `place` and the first `skip` tokens at `place`."""

    settings: dict[str, Any]  # the settings that determine the shards; a resumed build must have the same settings
    split: str = "val"  # the split that is being written
    place: Place = field(default_factory=Place)
    skip: int = 0
    documents: dict[str, int] = field(default_factory=lambda: {"val": 0, "train": 0})
    text_bytes: dict[str, int] = field(default_factory=lambda: {"val": 0, "train": 0})
    shards: dict[str, int] = field(default_factory=lambda: {"val": 0, "train": 0})

    def save(self, folder: Path) -> None:
        atomic_write(folder / STATE, json.dumps(asdict(self)))


@dataclass(frozen=True)
class Batch:
    """Documents of one file. `place` is the first document's, `read` the number of bytes read for the batch."""

    file: TextFile
    place: Place
    records: list[Record]
    read: int

    def place_of(self, index: int) -> Place:
        if not index:
            return self.place
        before = self.records[index - 1]
        return Place(self.place.file, before.end, before.number)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch, with BOS before each document, and each document's number of tokens and bytes of text.

    `token_bytes` has the number of bytes of each token, or is empty if these were not requested.
    """

    tokens: Tokens
    token_bytes: Tokens
    lengths: Integers
    sizes: Integers


def build_bulk(
    paths: Sequence[str | Path],
    out: str | Path,
    vocab_size: int,
    *,
    name: str = "docs",
    tokenizer_docs: int = 100_000,
    tokenizer_path: str | Path = "",
    val_docs: int = VAL_DOCS,
    max_train_tokens: int = 0,
    workers: int = 0,
    case_operators: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
) -> DatasetInfo:
    """Make a dataset from text files, such as `find_files` finds.

    The first `val_docs` documents are the validation split. The tokenizer is trained on the documents after them. A
    document with empty text becomes a single BOS, as in the published shards.

    Args:
        paths: files and folders, read in this order.
        out: folder to make.
        name: prefix of the file names.
        tokenizer_docs: number of documents to train the tokenizer on.
        tokenizer_path: SentencePiece model to use instead of training one.
        max_train_tokens: stop after this many training tokens; 0: all.
        workers: worker processes; 0: one per core.
        case_operators: encode the transformed text, and write the sidecar of the validation split.

    Raises:
        UserError: a file or setting is invalid, or `<out>.partial` was started with other settings. Finished shards
            are kept.
    """
    check_output(out, overwrite)
    skipped = Skipped()
    files = find_files(paths, skipped)
    if tokenizer_path:
        load_given_tokenizer(tokenizer_path, vocab_size, case_operators=case_operators)
    settings = {
        "files": [[str(file.path.resolve()), file.path.stat().st_size] for file in files],
        "tokenizer": sha256_file(tokenizer_path) if tokenizer_path else tokenizer_docs,
        "name": name, "vocab_size": vocab_size, "val_docs": val_docs,
        "max_train_tokens": max_train_tokens, "shard_tokens": shard_tokens,
    }  # fmt: skip
    if case_operators:
        settings["case_operators"] = True
    work = Path(f"{Path(out)}.partial")
    work.mkdir(parents=True, exist_ok=True)
    count = workers or os.cpu_count() or 1
    with _locked(work):
        state = _load_state(work, settings)
        try:
            model = work / f"{name}_{vocab_size}_bpe.model"
            if not model.is_file():
                if not tokenizer_path:
                    wanted = counted(tokenizer_docs, "document")
                    print(f"tokenizer: reading {wanted} after the first {val_docs:,}", flush=True)
                texts = _texts(files, val_docs, tokenizer_docs)
                prepare_tokenizer(texts, vocab_size, model, tokenizer_path, case_operators=case_operators)
            given = model, vocab_size, case_operators
            tokenizer = load_tokenizer(model, vocab_size, operators=case_operators)
            context = get_context("spawn")
            with ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=given) as pool:
                job = _Job(files, work, name, shard_tokens, pool, _AHEAD * count, case_operators, skipped)
                try:
                    job.write_splits(state, val_docs, max_train_tokens)
                finally:
                    pool.shutdown(cancel_futures=True)
        except BrokenProcessPool:
            raise UserError(
                f"{work}: a worker process died, possibly out of memory: run the same command again with fewer "
                "--workers; finished shards are kept"
            ) from None
        except UserError:
            if not state.shards["train"]:
                shutil.rmtree(work)
            raise
        if skipped:
            print(f"skipped: {skipped_text(skipped)}", flush=True)
        counts = {split: (state.documents[split], state.text_bytes[split]) for split in ("val", "train")}
        source = ", ".join(Path(path).name for path in paths)
        info = describe_dataset(work, name, source, model, tokenizer, shard_tokens, counts, count_train_bytes=False)
        install_folder(work, out)
        for left in (STATE, LOCK):
            Path(out, left).unlink()
    return info


@dataclass(frozen=True)
class _Job:
    """Encodes documents in worker processes, writes shards, and saves the state after each shard."""

    files: list[TextFile]
    work: Path
    name: str
    shard_tokens: int
    pool: ProcessPoolExecutor
    ahead: int
    case_operators: bool
    skipped: Skipped

    def write_splits(self, state: State, val_docs: int, max_train_tokens: int) -> None:
        """Write the rest of both splits."""
        left = val_docs - state.documents["val"]
        encoded = self._encoded(_batches(self.files, state.place, left, self.skipped), left)
        if left:
            self.write(encoded, state, "val", documents=val_docs)
        state.split = "train"
        state.save(self.work)
        self.write(encoded, state, "train", tokens=max_train_tokens)
        if not state.shards["train"]:
            raise UserError(f"{self.files[-1].path}: no document is left for training: choose a smaller --val-docs")

    def write(
        self, batches: Iterator[tuple[Batch, Encoded]], state: State, split: str, *, documents: int = 0, tokens: int = 0
    ) -> None:
        """Write the rest of a split. It ends after `documents` documents or `tokens` tokens in total; 0: no limit."""
        writer = ShardWriter(self.work, self.name, split, self.shard_tokens, first_shard=state.shards[split])
        # stays empty unless bytes are counted
        sidecar = ShardWriter(self.work, self.name, "val_bytes", self.shard_tokens, first_shard=state.shards[split])
        stored, bytes_before = state.shards[split] * self.shard_tokens, state.text_bytes[split]
        started = time.monotonic()
        if documents:
            total, unit = documents - state.documents[split], "documents"
        elif tokens:
            total, unit = tokens - stored, "tokens"
        else:
            total, unit = sum(file.path.stat().st_size for file in self.files[state.place.file :]), "bytes"
        with Progress(total, f"encoding {split}", unit) as bar:
            for batch, encoded in batches:
                position, bounds = state.skip, np.concatenate(([0], np.cumsum(encoded.lengths)))
                whole_documents, whole_bytes = state.documents[split], state.text_bytes[split]
                stored_before = stored
                while position < len(encoded.tokens) and (not tokens or stored < tokens):
                    room = min(self.shard_tokens - writer.pending, tokens - stored if tokens else self.shard_tokens)
                    piece = encoded.tokens[position : position + room]
                    sidecar.extend(encoded.token_bytes[position : position + room])
                    writer.extend(piece)
                    stored, position = stored + len(piece), position + len(piece)
                    index = int(np.searchsorted(bounds, position, side="right")) - 1
                    state.place, state.skip = batch.place_of(index), position - int(bounds[index])
                    state.documents[split] = whole_documents + index
                    state.text_bytes[split] = whole_bytes + int(encoded.sizes[:index].sum())
                    if not writer.pending:
                        state.shards[split] += 1
                        state.save(self.work)
                rate = (state.text_bytes[split] - bytes_before) / 1e6 / (time.monotonic() - started)
                done = {"documents": len(batch.records), "tokens": stored - stored_before, "bytes": batch.read}[unit]
                bar.advance(done, f"{rate:.1f} MB/s of text, {stored:,} tokens")
                if (tokens and stored >= tokens) or (documents and state.documents[split] >= documents):
                    break
        state.shards[split] += bool(writer.pending)
        sidecar.flush()
        writer.flush()
        size, seconds = state.text_bytes[split] - bytes_before, max(time.monotonic() - started, 1e-9)
        print(f"encoded {split}: {size:,} bytes of text at {size / seconds / 1e6:.1f} MB/s", flush=True)
        if documents and state.documents[split] < documents:
            raise UserError(
                f"{self.files[-1].path}: the files have {counted(state.documents[split], 'document')}, the validation split needs {documents}: "
                "give more documents, or choose a smaller --val-docs"
            )

    def _encoded(self, batches: Iterator[Batch], val_docs: int) -> Iterator[tuple[Batch, Encoded]]:
        """Yield the encoded batches in order. The worker pool holds at most `ahead` batches.

        The first `val_docs` documents are of the validation split, whose bytes a sidecar may count.
        """
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            count_bytes = self.case_operators and val_docs > 0
            val_docs -= len(batch.records)
            waiting.append((batch, self.pool.submit(_encode, batch, count_bytes)))
            if len(waiting) >= self.ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _texts(files: Sequence[TextFile], first: int, count: int) -> Iterator[str]:
    records = ((file, record) for file in files for record in file.records(Skipped()))
    file = None
    for file, record in itertools.islice(records, first, first + count):
        yield file.text(record)
    if file is None:
        raise UserError(
            f"{files[-1].path}: no document after the first {first}, which form the validation split: choose a smaller --val-docs"
        )


def _batches(files: Sequence[TextFile], place: Place, first: int, skipped: Skipped) -> Iterator[Batch]:
    """Yield batches of documents from `place` on. A batch ends after the first `first` documents, if `first` is not 0."""
    for number in range(place.file, len(files)):
        file, start = files[number], place if number == place.file else Place(number)
        records: list[Record] = []
        size, before = 0, 0 if file.packed else start.byte
        for record in file.records(skipped, start.byte, start.line):
            records.append(record)
            size, first = size + len(record.data), first - 1
            if size >= _BATCH_BYTES or not first:
                yield Batch(file, start, records, record.read - before)
                start, before = Place(number, record.end, record.number), record.read
                records, size = [], 0
        if records:
            yield Batch(file, start, records, records[-1].read - before)


_tokenizer: SentencePieceProcessor | None = None
_written: Callable[[str], str] = str


def _start_worker(model: Path, vocab_size: int, case_operators: bool) -> None:
    global _tokenizer, _written
    # ignore Ctrl-C, which the parent handles: a worker ends when its parent ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(model, vocab_size, operators=case_operators)
    if case_operators:
        _written = transform


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch, count_bytes: bool) -> Encoded:
    assert _tokenizer is not None
    texts = [batch.file.text(record) for record in batch.records]
    if count_bytes:
        places = map(batch.file.place, batch.records)
        both = [encode_with_bytes(_tokenizer, text, place) for text, place in zip(texts, places, strict=True)]
        ids, token_bytes = [tokens for tokens, _ in both], np.concatenate([sizes for _, sizes in both])
    else:
        # NumPy arrays, because lists of Python integers would take 10 % longer
        ids = [_tokenizer.EncodeAsNumpy(_written(text), add_bos=True) for text in texts]
        token_bytes = np.empty(0, np.uint16)
    lengths, sizes = (np.array([len(one) for one in each]) for each in (ids, map(str.encode, texts)))
    return Encoded(np.concatenate(ids).astype(np.uint16), token_bytes, lengths, sizes)


def _load_state(work: Path, settings: dict[str, Any]) -> State:
    path = work / STATE
    if not path.is_file():
        if {file.name for file in work.iterdir()} != {LOCK}:
            raise UserError(f"{work}: has files, but no {STATE}: delete that folder")
        state = State(settings)
        state.save(work)
        return state
    fields = read_json(path, f"delete the folder {work} and start again")
    there = fields.get("settings")
    if not isinstance(there, dict):
        raise UserError(f"{path}: no settings in it: delete the folder {work} and start again")
    for name, value in settings.items():
        if there.get(name) != value:
            raise UserError(
                f"{work}: started with {name} {there.get(name)}, this command has {value}: "
                "use the same settings, or delete that folder"
            )
    state = State(**fields | {"place": Place(**fields["place"])})
    # delete files that a killed process left. The lock keeps other processes from writing here.
    for part in work.glob(".*.part"):
        part.unlink()
    print(f"resuming with {counted(sum(state.shards.values()), 'finished shard')} in {work}", flush=True)
    return state


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    with open_lock(work / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{work}: another process is building this dataset: wait for it, or choose another --out"
            ) from None
        yield

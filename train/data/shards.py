"""Reads and writes token shards in Parameter Golf's format.

A shard has a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros), followed by tokens in
little-endian uint16. A shard belongs to one split. A document begins with BOS, may continue in the next shard,
and has no EOS.

A validation shard `<name>_val_NNNNNN.bin` may have a sidecar `<name>_val_bytes_NNNNNN.bin`: a file of the same format
with each token's number of bytes in the original text. It is needed if the tokenizer's pieces do not tell this number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.common.errors import UserError
from train.common.files import atomic_writer

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
SHARD_TOKENS = 10**8
BOS = 1
MAX_VOCAB = 65536

Tokens = npt.NDArray[np.uint16]

SPLITS = ("train", "val", "val_bytes")
_SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)_\d{6}\.bin")
_REMEDY = "download it again, or rebuild it with `python -m train.data`"


def write_shard(path: str | os.PathLike[str], tokens: npt.ArrayLike) -> None:
    """Write one shard atomically. `tokens` `(n,)` are integers with 0 <= token < 65,536 and 0 < n < 2^31.

    Raises:
        UserError: `tokens` has another shape or length, or a token does not fit 16 bits.
    """
    values = np.asarray(tokens)
    if values.ndim != 1 or not 0 < len(values) < 2**31:
        raise UserError(f"{path}: a shard holds 1 to 2^31 - 1 tokens in one row, got shape {values.shape}")
    if values.dtype != np.uint16:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= MAX_VOCAB or values.dtype.kind not in "iu":
            raise UserError(
                f"{path}: tokens are integers from 0 to 65535, got {values.dtype} from {low} to {high}: choose a smaller vocabulary"
            )
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(values)
    with atomic_writer(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(values, dtype="<u2").data)


def check_shard(path: str | os.PathLike[str]) -> int:
    """Check a shard's header and size. Return the number of tokens.

    Raises:
        UserError: the file is missing, not a shard, empty, truncated or too long, or has another version.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such shard: {_REMEDY}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        raw = stream.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{file}: a shard's header has {HEADER_BYTES} bytes, the file only {size}: {_REMEDY}")
    magic, version, count = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UserError(
            f"{file}: not a token shard: expected magic {MAGIC} in its first four bytes, found {magic}: {_REMEDY}"
        )
    if version != VERSION:
        raise UserError(f"{file}: expected shard version {VERSION}, found {version}: {_REMEDY}")
    if count <= 0:
        raise UserError(f"{file}: expected at least one token, the header says {count}: {_REMEDY}")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise UserError(f"{file}: {kind}: expected {expected} bytes for {count} tokens, found {size}: {_REMEDY}")
    return count


def read_shard(path: str | os.PathLike[str]) -> np.memmap:
    """Check a shard and memory-map its tokens, `(n,)` uint16, read-only."""
    count = check_shard(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def check_tokens(tokens: Tokens, vocab_size: int, name: str | os.PathLike[str]) -> None:
    """Raise a UserError if a token is not below `vocab_size`. The message names the shard as `name`."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{name}: holds token {int(tokens.max())}, but vocab_size is {vocab_size}: "
            "set VOCAB_SIZE to the vocabulary size of these shards, or choose another DATA_PATH"
        )


def need_data(data_path: str | os.PathLike[str]) -> Path:
    """Return the folder of shards. Raise a UserError if there is none."""
    if not data_path or not Path(data_path).is_dir():
        raise UserError(
            f"data_path {str(data_path)!r}: no such folder: make it with `python -m train.data stdlib|text|fineweb`, or give --data_path"
        )
    return Path(data_path)


def find_shards(data_path: str | os.PathLike[str], split: str) -> list[Path]:
    """Find the shards `<name>_<split>_NNNNNN.bin` in a folder, sorted. `split` is `train` or `val`.

    Raises:
        UserError: the folder does not exist, or has no shard of this split, or has shards of several datasets.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    folder = need_data(data_path)
    named = [
        (match["name"], path)
        for path in sorted(folder.iterdir())
        if (match := _SHARD_NAME.fullmatch(path.name)) and match["split"] == split
    ]
    if not named:
        raise UserError(
            f"{folder}: no *_{split}_NNNNNN.bin shard in it: make it with `python -m train.data stdlib|text|fineweb`, or give --data_path"
        )
    names = sorted({name for name, _ in named})
    # refuse a mixture: training on shards of two tokenizers would raise no error, but make no sense
    if len(names) > 1:
        raise UserError(f"{folder}: holds shards of several datasets ({', '.join(names)}): move all but one elsewhere")
    return [path for _, path in named]


def load_validation_tokens(data_path: str | os.PathLike[str], seq_len: int, vocab_size: int | None = None) -> Tokens:
    """Read the validation tokens, uint16, cut to whole sequences: the first ⌊(N-1)/S⌋·S + 1 of N tokens.

    Args:
        data_path: folder of shards.
        seq_len: S, the larger of the training and evaluation sequence lengths.
        vocab_size: if given, all tokens must be below it.

    Raises:
        UserError: a shard is invalid (see `check_shard`), a token is outside the vocabulary, or N is below S + 1.
    """
    paths = find_shards(data_path, "val")
    shards = [read_shard(path) for path in paths]
    if vocab_size is not None:
        for path, shard in zip(paths, shards, strict=True):
            check_tokens(shard, vocab_size, path)
    total = sum(len(shard) for shard in shards)
    if total < seq_len + 1:
        raise UserError(
            f"{data_path}: its validation shards hold {total} tokens, one sequence needs {seq_len + 1}: "
            "choose a smaller TRAIN_SEQ_LEN and EVAL_SEQ_LEN, or build the dataset with more validation text"
        )
    tokens: Tokens = np.concatenate(shards)[: (total - 1) // seq_len * seq_len + 1].astype(np.uint16, copy=False)
    return tokens


def read_sidecar(shards: Sequence[Path]) -> list[np.memmap]:
    """Check and memory-map the sidecars of validation shards, each `(n,)` uint16. Return [] if there are none.

    Raises:
        UserError: a sidecar is missing or invalid, has another length than its shard, or states bytes for a BOS.
    """
    paths = [path.with_name(path.name[:-10] + "bytes_" + path.name[-10:]) for path in shards]
    if not any(path.exists() for path in paths):
        return []
    sidecar = [read_shard(path) for path in paths]
    for path, shard, sizes in zip(paths, map(read_shard, shards), sidecar, strict=True):
        if len(sizes) != len(shard) or sizes[shard == BOS].any():
            raise UserError(
                f"{path}: not the sidecar of these {len(shard)} tokens: expected as many numbers, and 0 for each BOS: {_REMEDY}"
            )
    return sidecar


class ShardWriter:
    """Writes the documents of one split to shards `<prefix>_<split>_NNNNNN.bin`.

    At the end of the context, the last shard is written, unless there was an error.

    Attributes:
        paths: paths of the shards that have been written.
        pending: number of tokens that are not yet in a shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        prefix: str,
        split: str,
        shard_tokens: int = SHARD_TOKENS,
        first_shard: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if not 0 < shard_tokens < 2**31:
            raise UserError(f"shard_tokens: expected 1 to 2^31 - 1, got {shard_tokens}")
        self.folder, self.prefix, self.split, self.first_shard = Path(folder), prefix, split, first_shard
        self.buffer: Tokens = np.empty(shard_tokens, dtype=np.uint16)
        self.pending = 0
        self.paths: list[Path] = []

    def add(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Add one document: BOS, then `ids`.

        Raises:
            UserError: a token does not fit 16 bits.
        """
        values = np.asarray(ids, dtype=np.int64)
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= MAX_VOCAB):
            raise UserError(
                f"{self.prefix}: tokens run from 0 to 65535, got {int(values.min())} to {int(values.max())}: choose a smaller vocabulary"
            )
        self.extend(np.concatenate((np.array([BOS], dtype=np.uint16), values.astype(np.uint16))))

    def extend(self, tokens: Tokens) -> None:
        """Add tokens unchanged, without a BOS."""
        while len(tokens):
            taken = tokens[: len(self.buffer) - self.pending]
            self.buffer[self.pending : self.pending + len(taken)] = taken
            self.pending += len(taken)
            tokens = tokens[len(taken) :]
            if self.pending == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write the pending tokens, if there are any, to a shard.

        Raises:
            UserError: the split already has a million shards.
        """
        if self.pending:
            number = self.first_shard + len(self.paths)
            # the number in a shard's name has six digits
            if number > 999_999:
                raise UserError(
                    f"{self.folder}: a split has at most 1,000,000 shards, too few at {len(self.buffer)} tokens each: "
                    "choose a larger --shard-tokens"
                )
            path = self.folder / f"{self.prefix}_{self.split}_{number:06d}.bin"
            write_shard(path, self.buffer[: self.pending])
            self.paths.append(path)
            self.pending = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # not after an error, because the last document may be incomplete
        if kind is None:
            self.flush()

"""The paid prefix of #262: validation targets stored in the artifact, which the organisers ruled out.

A paid-prefix file contains the first N targets (tokens 1 … N) as little-endian uint16 in one .xz stream of preset 6.
The setting PAID_PREFIX_FILE names the file. A target that the file states correctly costs no nats, but its bytes of
text still count. The file's size counts as part of the submission. This code only serves to check published numbers: no
recipe uses a paid prefix, and every score with a paid prefix is labelled `NOT_COMPLIANT`. `python -m
train.submission.paid_prefix` builds such a file.
"""

from __future__ import annotations

import lzma
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.common.errors import UserError
from train.common.files import atomic_write, read_file
from train.config import Config
from train.data.shards import find_shards, read_shard

NOT_COMPLIANT = "NOT COMPLIANT: validation tokens in the artifact"
"""The label of every score that was made with a paid prefix."""

PRESET = 6


@dataclass(frozen=True)
class PaidPrefix:
    """The tokens of a paid-prefix file, compared with a validation text."""

    blob_bytes: int  # size of the file
    targets: int  # number of targets in the file
    known: np.ndarray  # (T,) bool: True if the file states target t correctly

    @property
    def coverage(self) -> float:
        """Fraction of the validation text's targets that cost no nats."""
        return float(self.known.mean())


def encode_prefix(targets: np.ndarray) -> bytes:
    """Encode targets, `(N,)` uint16, as the bytes of a paid-prefix file."""
    return lzma.compress(np.asarray(targets, dtype="<u2").tobytes(), lzma.FORMAT_XZ, preset=PRESET)


def decode_prefix(blob: bytes, limit: int) -> np.ndarray:
    """Decode the bytes of a paid-prefix file to targets, `(N,)` uint16.

    Raises:
        UserError: `blob` is not an .xz stream, is damaged, or holds more than `limit` targets.
    """
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        content = decoder.decompress(blob, 2 * limit + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"not an .xz stream of targets, or a damaged one ({error}): build it again") from error
    if len(content) > 2 * limit:
        raise UserError(
            f"holds more targets than the validation text's {limit:,}: build it from the text that is scored"
        )
    if not decoder.eof or len(content) % 2 or not content:
        raise UserError("the stream ends early: build it again")
    return np.frombuffer(content, "<u2")


def read_prefix(path: str | os.PathLike[str], tokens: np.ndarray) -> PaidPrefix:
    """Compare a paid-prefix file with the validation tokens, `(T + 1,)` uint16.

    Raises:
        UserError: the file is missing, or `decode_prefix` refuses it.
    """
    try:
        blob = read_file(path)
    except OSError as error:
        raise UserError(
            f"paid_prefix_file: {path}: {error.strerror}: build it with python -m train.submission.paid_prefix"
        ) from error
    try:
        targets = decode_prefix(blob, len(tokens) - 1)
    except UserError as error:
        raise UserError(f"paid_prefix_file: {path}: {error}") from error
    known = np.zeros(len(tokens) - 1, dtype=bool)
    known[: len(targets)] = targets == tokens[1 : len(targets) + 1]
    return PaidPrefix(len(blob), len(targets), known)


def known_targets(config: Config, tokens: np.ndarray) -> np.ndarray | None:
    """Return `(T,)` bool: True for targets that cost no nats. None if `config` has no paid prefix."""
    return read_prefix(config.paid_prefix_file, tokens).known if config.paid_prefix_file else None


def prefix_bytes(config: Config) -> int:
    """Return the size of the paid-prefix file in bytes; 0 if `config` has no paid prefix.

    Raises:
        UserError: the file is missing.
    """
    if not config.paid_prefix_file:
        return 0
    path = Path(config.paid_prefix_file)
    if not path.is_file():
        raise UserError(f"paid_prefix_file: {path}: no such file: build it with python -m train.submission.paid_prefix")
    return path.stat().st_size


def build_prefix(val_dir: str | os.PathLike[str], num_tokens: int, output: str | os.PathLike[str]) -> PaidPrefix:
    """Write a paid-prefix file with the first `num_tokens` targets of a dataset's validation text.

    Raises:
        UserError: the dataset has no validation text, or the text has fewer targets.
    """
    tokens = np.concatenate([read_shard(path) for path in find_shards(val_dir, "val")])
    if not 1 <= num_tokens < len(tokens):
        raise UserError(
            f"--num-tokens: expected 1 to {len(tokens) - 1:,}, the targets in {val_dir}, got {num_tokens:,}"
        )
    if not Path(output).parent.is_dir():
        raise UserError(f"{output}: its folder does not exist: create {Path(output).parent} first")
    atomic_write(output, encode_prefix(tokens[1 : num_tokens + 1]))
    return read_prefix(output, tokens)

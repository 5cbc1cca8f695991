"""A dataset's manifest: what was built, from what, by which tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from train.common.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SplitInfo:
    """What one split holds.

    Attributes:
        documents: number of documents.
        text_bytes: UTF-8 bytes of their text as it came.
        normalized_bytes: bytes the tokens stand for, the denominator of bits per byte; None where it was not counted.
        tokens: tokens, BOS included.
        shards: number of files.
    """

    documents: int
    text_bytes: int
    normalized_bytes: int | None
    tokens: int
    shards: int


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset's manifest, as `build_dataset` writes and `read_manifest` reads it.

    Attributes:
        yardsticks: bits per byte that `gzip -9` and `xz -9` need, see `yardsticks`; empty where not measured.
    """

    name: str
    source: str
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    train: SplitInfo
    val: SplitInfo
    shard_tokens: int
    yardsticks: dict[str, float] = field(default_factory=dict)


def read_manifest(data_path: str | Path) -> DatasetInfo | None:
    """The manifest of a dataset that `build_dataset` made; None where there is none, as in the published exports.

    Raises:
        UserError: the file is there but not what it should be.
    """
    path = Path(data_path) / MANIFEST
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        del fields["notes"]
        return DatasetInfo(**fields | {split: SplitInfo(**fields[split]) for split in ("train", "val")})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path}: not a dataset's manifest ({error!r}): build the dataset again with --overwrite"
        ) from None

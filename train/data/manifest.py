"""Reads manifest.json, which names the text and the tokenizer of a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from train.common.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SplitInfo:
    """The size of a split (training or validation)."""

    documents: int
    text_bytes: int  # bytes of the text before normalization
    normalized_bytes: int | None  # the denominator of bits per byte; None: not counted
    tokens: int  # number of tokens, including BOS
    shards: int


@dataclass(frozen=True)
class DatasetInfo:
    """The contents of manifest.json."""

    name: str
    source: str
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    train: SplitInfo
    val: SplitInfo
    shard_tokens: int
    # compressor → bits per byte, see `train.data.build.compressor_bpb`; empty: not measured
    yardsticks: dict[str, float] = field(default_factory=dict)


def read_manifest(data_path: str | Path) -> DatasetInfo | None:
    """Read a dataset's manifest. Return None if there is no manifest; the published FineWeb shards have none.

    Raises:
        UserError: the file is not a manifest.
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

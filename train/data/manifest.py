"""Reads manifest.json, which names the text and the tokenizer of a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from train.common.errors import UserError
from train.common.files import read_file
from train.common.values import fits

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
    if not path.exists():
        return None
    try:
        fields = json.loads(read_file(path))
        del fields["notes"]
        splits = {split: SplitInfo(**fields[split]) for split in ("train", "val")}
        info = DatasetInfo(**fields | splits)
        for part in (*splits.values(), info):
            _check_kinds(part)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path}: not a dataset's manifest ({error!r}): build the dataset again with --overwrite"
        ) from None
    return info


def _check_kinds(part: Any) -> None:
    for name, kind in get_type_hints(type(part)).items():
        if not fits(value := getattr(part, name), kind):
            raise ValueError(f"{name}: {ascii(value)[:80]}")

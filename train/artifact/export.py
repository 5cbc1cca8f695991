"""Converts an artifact to the file format of a published submission, so that the submission's script can load it.

Such a file is a dictionary (see `train.artifact.published_layouts`), serialized by `torch.save`, in some formats
byte-shuffled, and compressed. The weights are exactly the weights in the artifact.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.artifact.codecs import CODECS, byte_shuffle
from train.artifact.published_layouts import Layout, Mixed, PerRow
from train.artifact.published_names import published_parameters, to_published
from train.common.errors import UserError
from train.config import Config
from train.quantize.tensors import QuantizedTensor


@dataclass(frozen=True)
class PublishedFormat:
    """The file format in which a submission stores its model."""

    about: str  # description for --help
    recipe: str  # name of the recipe with the submission's settings
    layout: Layout
    stride: int  # stride of the byte shuffle; 0: no shuffle
    codec: str


@dataclass(frozen=True)
class Export:
    """A model in a published format."""

    data: bytes  # contents of the file
    payload_bytes: int  # size of all tensors, as the published logs count it
    pickled_bytes: int  # size of the output of `torch.save`


def export(tensors: Mapping[str, QuantizedTensor | Tensor], name: str, config: Config) -> Export:
    """Convert a model's stored tensors to the published format `name`, a key of `PUBLISHED_FORMATS`.

    Raises:
        UserError: the format cannot store a tensor's codes, or the tensors are not those of a model with these
            settings.
        MissingCodec: the codec's package is not installed.
    """
    published, renamed, parameters = PUBLISHED_FORMATS[name], to_published(tensors), published_parameters(config)
    if odd := renamed.keys() ^ parameters.keys():
        raise UserError(
            f"{min(odd)}: the tensors do not match the artifact's model fields: write it anew with python -m train"
        )
    content = published.layout.write(renamed, parameters)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    pickled = buffer.getvalue()
    shuffled = byte_shuffle(pickled, published.stride) if published.stride else pickled
    return Export(CODECS[published.codec].encode(shuffled), _tensor_bytes(content), len(pickled))


def _tensor_bytes(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    return sum(map(_tensor_bytes, content.values())) if isinstance(content, dict) else 0


PUBLISHED_FORMATS = {
    "baseline": PublishedFormat(
        "int8 rows, torch.save, zlib (the challenge's baseline)",
        "baseline", PerRow("int8_clean_per_row_v1"), 0, "zlib",
    ),
    "pr122": PublishedFormat(
        "w6e16: codes in 6 bits, torch.save, zstd (#122)",
        "sp2048_normuon", PerRow("w6_e16_clean_per_row_v1", packed=True), 0, "zstd",
    ),
    "pr262": PublishedFormat(
        "one code per byte, torch.save, zstd (#262)",
        "sp1024_smear_bigram", Mixed(), 0, "zstd",
    ),
    "pr1392": PublishedFormat(
        "one code per byte, torch.save, brotli (#1392)",
        "sp4096_recurrence", Mixed(), 0, "brotli",
    ),
    "pr1471": PublishedFormat(
        "one code per byte, torch.save, byte shuffle, brotli (#1471)",
        "sp8192_sdclip", Mixed(), 2, "brotli",
    ),
}  # fmt: skip

"""Export of an artifact to the formats of published submissions, whose scripts then load it: a packed, pickled dictionary.

    mixed      {"w": {NAME.q: int8, NAME.scale: float16, NAME: float16}, "m": {NAME: {"type": "int6"} or "passthrough"}}
    per_row    {"__quant_format__": …, "quantized": {NAME: int8}, "scales": {NAME: float16}, "dtypes": {NAME: "float32"},
               "passthrough": {NAME: …}, "qmeta": {NAME: {"scheme": "per_row", "axis": 0}}, "passthrough_orig_dtypes": {…}}

`torch.save` serializes the dictionary; the bytes are shuffled if the submission does so, and encoded. This module never
loads such a file: unpickling one requires trust. The weights are exactly the artifact's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf_kernels import int6_pack
from train.artifact.codecs import CODECS, byte_shuffle
from train.common.errors import UserError
from train.quantize.tensors import QuantizedTensor

_Tensors = Mapping[str, QuantizedTensor | Tensor]

_PUBLISHED_NAMES = {
    "embedding.weight": "tok_emb.weight",
    "bigram.embedding": "bigram.embed.weight",
    "bigram.proj": "bigram.proj.weight",
    "ve.embedding": "ve_shared.embed.weight",
    "ve.proj": "ve_shared.proj.weight",
    "ve.scale": "ve_shared.scale",
    "skips.weights": "skip_weights",
    "skips.gates": "skip_gates",
    "attention.query": "attn.c_q.weight",
    "attention.key": "attn.c_k.weight",
    "attention.value": "attn.c_v.weight",
    "attention.output": "attn.proj.weight",
    "attention.q_gain": "attn.q_gain",
    "mlp.up": "mlp.fc.weight",
    "mlp.down": "mlp.proj.weight",
}


@dataclass(frozen=True)
class PublishedFormat:
    """How a submission stores its model."""

    about: str  # for --help
    layout: Callable[[_Tensors], dict[str, Any]]  # makes the dictionary
    stride: int  # of the byte shuffle; 0: none
    codec: str


@dataclass(frozen=True)
class Export:
    """A model in a published format."""

    data: bytes  # the file
    payload_bytes: int  # of all tensors, as the published logs count them
    pickled_bytes: int  # of `torch.save`


def export(tensors: _Tensors, name: str) -> Export:
    """Convert stored tensors to the file of a format in `PUBLISHED_FORMATS`.

    Raises:
        UserError: the format cannot hold a tensor's codes.
        MissingCodec: the codec's library is not installed.
    """
    published = PUBLISHED_FORMATS[name]
    content = published.layout(_renamed(tensors))
    buffer = io.BytesIO()
    torch.save(content, buffer)
    pickled = buffer.getvalue()
    shuffled = byte_shuffle(pickled, published.stride) if published.stride else pickled
    return Export(CODECS[published.codec].encode(shuffled), _tensor_bytes(content), len(pickled))


def published_name(name: str) -> str:
    """A parameter's name in the published scripts, or its own name if they have no such parameter."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    prefix, rest = block.groups() if block else ("", name)
    return prefix + _PUBLISHED_NAMES.get(rest, rest)


def _renamed(tensors: _Tensors) -> dict[str, QuantizedTensor | Tensor]:
    renamed: dict[str, QuantizedTensor | Tensor] = {}
    for name, tensor in tensors.items():
        if name == "ve.layer_scales" and isinstance(tensor, Tensor):
            # published as a list of parameters, one per layer
            renamed |= {f"ve_layer_scales.{i}": scale.clone() for i, scale in enumerate(tensor.reshape(-1, 1))}
        else:
            renamed[published_name(name)] = tensor
    return renamed


def _mixed(tensors: _Tensors) -> dict[str, Any]:
    weights: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            weights |= {f"{name}.q": tensor.codes, f"{name}.scale": tensor.scales}
            meta[name] = {"type": f"int{tensor.bits}"}
        else:
            weights[name], meta[name] = tensor, "passthrough"
    return {"w": weights, "m": meta}


def _per_row(tensors: _Tensors) -> dict[str, Any]:
    coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
    kept = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {name: tensor.codes for name, tensor in coded.items()},
        "scales": {name: tensor.scales for name, tensor in coded.items()},
        "dtypes": dict.fromkeys(coded, "float32"),
        # published with control tensors in float32 and large tables in float16
        "passthrough": {name: tensor if _is_table(name) else tensor.float() for name, tensor in kept.items()},
        "qmeta": {name: {"scheme": "per_row", "axis": 0} for name in coded},
        "passthrough_orig_dtypes": {name: "float32" for name in kept if _is_table(name)},
    }


def _w6e16(tensors: _Tensors) -> dict[str, Any]:
    content = _per_row(tensors)
    content["__quant_format__"] = "w6_e16_clean_per_row_v1"
    for name, codes in content["quantized"].items():
        if codes.numel() and not -32 <= int(codes.min()) <= int(codes.max()) <= 31:
            raise UserError(
                f"{name}: format w6e16 holds codes of 6 bits, found {codes.min()}..{codes.max()}: quantize "
                "its run first: python -m train.quantize RUN --matrix_bits 6 --embed_bits 16"
            )
        content["quantized"][name] = int6_pack(codes.reshape(-1))
        content["qmeta"][name] |= {"bits": 6, "shape": list(codes.shape)}
    return content


def _is_table(name: str) -> bool:
    return name.endswith(".weight")


def _tensor_bytes(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    return sum(map(_tensor_bytes, content.values())) if isinstance(content, dict) else 0


PUBLISHED_FORMATS = {
    "baseline": PublishedFormat("int8 rows, torch.save, zlib (the challenge's baseline)", _per_row, 0, "zlib"),
    "pr122": PublishedFormat("w6e16: codes in 6 bits, torch.save, zstd (#122)", _w6e16, 0, "zstd"),
    "pr262": PublishedFormat("one code per byte, torch.save, zstd (#262)", _mixed, 0, "zstd"),
    "pr1392": PublishedFormat("one code per byte, torch.save, brotli (#1392)", _mixed, 0, "brotli"),
    "pr1471": PublishedFormat("one code per byte, torch.save, byte shuffle, brotli (#1471)", _mixed, 2, "brotli"),
}

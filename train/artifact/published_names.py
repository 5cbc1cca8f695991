"""Converts parameter names between this project's models and the published scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from train.config import Config
from train.model.gpt import GPT
from train.quantize.tensors import QuantizedTensor, StoredTensors

_NAMES = {
    "embedding.weight": "tok_emb.weight",
    "bigram.embedding": "bigram.embed.weight",
    "bigram.proj": "bigram.proj.weight",
    "ve.embedding": "ve_shared.embed.weight",
    "ve.proj": "ve_shared.proj.weight",
    "ve.scale": "ve_shared.scale",
    "skips.weights": "skip_weights",
    "skips.gates": "skip_gates",
    "lane_mix": "lane_merge",
    "attention.query": "attn.c_q.weight",
    "attention.key": "attn.c_k.weight",
    "attention.value": "attn.c_v.weight",
    "attention.output": "attn.proj.weight",
    "attention.q_gain": "attn.q_gain",
    "mlp.up": "mlp.fc.weight",
    "mlp.down": "mlp.proj.weight",
}
# parameters for which the published scripts have one parameter per row: ve_layer_scales.0, ve_layer_scales.1, …
_LISTS = {"ve.layer_scales": "ve_layer_scales", "recur_scales": "recur_scales"}


def published_name(name: str) -> str:
    """Return a parameter's name in the published scripts, which may be the same as here."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    prefix, rest = block.groups() if block else ("", name)
    return prefix + _NAMES.get(rest, rest)


def to_published(tensors: Mapping[str, QuantizedTensor | Tensor]) -> StoredTensors:
    """Give stored tensors their published names. A tensor in `_LISTS` is split into its rows."""
    published: StoredTensors = {}
    for name, tensor in tensors.items():
        if name in _LISTS and isinstance(tensor, Tensor):
            rows = tensor.reshape(len(tensor), -1)
            published |= {f"{_LISTS[name]}.{i}": row.clone() for i, row in enumerate(rows)}
        else:
            published[published_name(name)] = tensor
    return published


def from_published(published: Mapping[str, QuantizedTensor | Tensor], config: Config) -> StoredTensors:
    """Undo `to_published` for all parameters of a model with these settings. The order is that of `published`."""
    names: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    for name, parameter in _parameters(config).items():
        # a tensor in `_LISTS` takes the place of its first row
        key = f"{_LISTS[name]}.0" if name in _LISTS else published_name(name)
        names[key], shapes[name] = name, parameter.shape
    tensors: StoredTensors = {}
    for key, tensor in published.items():
        if key not in names:
            continue
        name = names[key]
        if name in _LISTS:
            rows = [published[f"{_LISTS[name]}.{i}"] for i in range(shapes[name][0])]
            tensor = torch.stack([row for row in rows if isinstance(row, Tensor)]).reshape(shapes[name])
        tensors[name] = tensor
    return tensors


def published_parameters(config: Config) -> dict[str, Tensor]:
    """Return the parameters of a published script with these settings: name → tensor on the meta device."""
    return {key: tensor for key, tensor in to_published(_parameters(config)).items() if isinstance(tensor, Tensor)}


def _parameters(config: Config) -> dict[str, Tensor]:
    # on the meta device, making a model takes no memory and draws no weights
    with torch.device("meta"):
        return dict(GPT(config).named_parameters())

"""The model of the variant `published`: a recipe's model with the formulas of the published scripts.

The trainer's model computes queries, keys and values in one product, folds output scales into the weights, and has its
own backward pass for norm and rotation. This model uses three products, scales the outputs, and relies on autograd. It
calls no operator of golf_kernels.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf_kernels import dispatch
from train.model.attention import Attention, KeyValues, Rotary
from train.model.attention_backends import causal_attention
from train.model.compile import write_out
from train.model.documents import Documents
from train.model.gpt import GPT
from train.model.linear import working_weight
from train.model.mlp import MLP
from train.model.norm import rms_norm
from train.model.rope import rotate


class PublishedAttention(nn.Module):
    """Attention with plain autograd and separate products for query, key and value. Uses the parameters of `own`."""

    def __init__(self, own: Attention) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = own.query, own.key, own.value, own.output
        self.q_gain, self.gate = own.q_gain, own.gate
        self.head_dim, self.xsa = own.head_dim, own.xsa
        self.qat, self.backend = own.qat, own.backend

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, working_weight(weight, x.dtype, fake_quantize=self.qat if self.training else None))

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        *,
        extra_value: Tensor | None,
        documents: Documents | None,
        scale: Tensor,
        rows_from: int = 0,
        past: KeyValues | None = None,
    ) -> Tensor:
        assert rows_from == 0 and past is None, "training only"
        query, key, value = (self.product(x, weight) for weight in (self.query, self.key, self.value))
        if extra_value is not None:
            value = value + extra_value
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        query, key = (rotate(rms_norm(part), rotary) for part in (query, key))
        query = query * self.q_gain.to(query.dtype)[:, None]
        output = causal_attention(query, key, value, documents=documents, backend=self.backend)
        if self.xsa:
            output = remove_value_direction(output, value)
        if self.gate is not None:
            gates = torch.sigmoid(0.5 * F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype)))
            output = output * gates[..., None]
        return scale.to(x.dtype) * self.product(output.flatten(-2), self.output)


def remove_value_direction(output: Tensor, value: Tensor) -> Tensor:
    """XSA (exclusive self-attention): y − (y·v̂) v̂, with v̂ = v/‖v‖₂.

    The outputs y are `(B, T, H, D)`, the values v `(B, T, H_kv, D)`. H / H_kv query heads share a value.
    """
    direction = F.normalize(value, dim=-1).unsqueeze(3)
    grouped = output.unflatten(2, (value.shape[2], -1))
    along = (grouped * direction).sum(dim=-1, keepdim=True)
    removed: Tensor = grouped - along * direction
    return removed.flatten(2, 3)


class PublishedMLP(nn.Module):
    """The MLP in plain PyTorch, with the scale applied to its output. Shares the parameters of `own`."""

    def __init__(self, own: MLP) -> None:
        super().__init__()
        self.up, self.down = own.up, own.down
        self.slope, self.gain, self.qat = own.slope, own.gain, own.qat

    def forward(self, x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        up, down = (
            working_weight(weight, x.dtype, fake_quantize=self.qat if self.training else None)
            for weight in (self.up, self.down)
        )
        hidden = F.leaky_relu(F.linear(rms_norm(x) * self.gain, up), self.slope).square()
        return residual + scale * F.linear(hidden, down)


def published_model(model: GPT) -> GPT:
    """Returns a copy of the model with the layers of the published scripts. The parameters keep their names."""
    published = copy.deepcopy(model)
    for block in published.blocks:
        block.add_module("attention", PublishedAttention(block.attention))
        block.add_module("mlp", PublishedMLP(block.mlp))
    write_out(published, frozenset(dispatch.describe()))
    return published

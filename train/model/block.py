"""One layer of the model: residual mix, attention and MLP, in sequence or in parallel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from golf_kernels.mix_rms_norm import mix_rms_norm
from train.config import Config
from train.model.attention import Attention, Heads, KeyValues, Rotary
from train.model.compile import OperatorModule
from train.model.documents import Documents
from train.model.init import parameter
from train.model.mlp import MLP
from train.model.norm import NORM_EPS, layer_scale, rms_norm


class BlockInputs(NamedTuple):
    """The inputs of a layer other than the residual stream."""

    x0: Tensor  # (B, T, d), the embedding, which every layer mixes into its input
    rotary: Rotary
    extra_value: Tensor | None = None  # (B, T, kv_dim), added to the values
    documents: Documents | None = None  # if given, attention stays inside each document
    heads: Heads | None = None  # result of `Attention.heads`, if already computed
    past: KeyValues | None = None  # KV cache, for generation


class Block(OperatorModule):
    """One layer, in one of four published variants.

    "lanes" and "routed" have two residual streams, called lanes: attention reads lane0, the MLP reads lane1.

    serial: h = m₀⊙x + m₁⊙x0; u = h + a⊙Attn(n(h)); x ← u + b⊙MLP(n(u))
    gptj (#1392): h = m₀⊙x + m₁⊙x0; x ← h + a⊙Attn(n(h)) + b⊙MLP(n(h))
    lanes (#1471): h = m₀⊙lane0 + m₁⊙x0; lane0 ← h + a⊙Attn(n(h)); lane1 ← lane1 + b⊙MLP(n(lane1))

    routed (#1530): h = m₀⊙lane0 + m₁⊙x0; Y = a⊙Attn(n(h)); M = b⊙MLP(n(lane1)); laneᵢ ← rᵢ laneᵢ + p₀ᵢ Y + p₁ᵢ M

    x is the residual stream and x0 the embedding. n(x) = g · rms_norm(x), where g = 1/√(layer + 1) with `ln_scale`,
    else 1. m is `resid_mix` `(2, d)`, initially 1 and 0. a is `attn_scale` `(d,)` and b is `mlp_scale` `(d,)`, both
    initially 1.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.gain = layer_scale(layer) if config.ln_scale else 1.0
        self.attention = Attention(config, layer)
        self.mlp = MLP(config, self.gain)
        self.resid_mix = parameter(torch.tensor([[1.0], [0.0]]).repeat(1, config.model_dim))
        self.attn_scale = parameter(torch.ones(config.model_dim))
        self.mlp_scale = parameter(torch.ones(config.model_dim))

    def forward(self, x: Tensor, inputs: BlockInputs, *, form: str, rows_from: int = 0) -> Tensor:
        """Run the variant `form`, "serial" or "gptj", on `x` `(B, T, d)`. Return `(B, T - rows_from, d)`.

        Positions before `rows_from` only provide keys and values.
        """
        mixed, attended = self.attend_and_add(x, inputs, rows_from)
        return self.feed(mixed[:, rows_from:] if form == "gptj" else attended, residual=attended)

    def run_lanes(
        self, attention_lane: Tensor, mlp_lane: Tensor, inputs: BlockInputs, *, rows_from: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run the variant "lanes" on two lanes `(B, T, d)`. For `rows_from` see `forward`."""
        rows = mlp_lane[:, rows_from:]
        _, attended = self.attend_and_add(attention_lane, inputs, rows_from)
        return attended, self.feed(rows, residual=rows)

    def run_routed(
        self, lanes: tuple[Tensor, Tensor], routes: tuple[Tensor, Tensor], inputs: BlockInputs, *, rows_from: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run the variant "routed" on two lanes `(B, T, d)`.

        `routes` are r `(2,)` and p `(2, 2)`. For `rows_from` see `forward`.
        """
        output = self.attend(lanes[0], inputs, rows_from)[1]
        first, second = (lane[:, rows_from:] for lane in lanes)
        fed = self.feed(second, residual=torch.zeros_like(second))
        resid, post = (route.to(first.dtype) for route in routes)
        return (
            resid[0] * first + post[0, 0] * output + post[1, 0] * fed,
            resid[1] * second + post[0, 1] * output + post[1, 1] * fed,
        )

    def mix(self, x: Tensor, x0: Tensor) -> Tensor:
        """Compute h = m₀ ⊙ x + m₁ ⊙ x0."""
        stream, embedding = self.resid_mix.to(x.dtype).unbind()
        return torch.addcmul(stream * x, embedding, x0)

    def mix_and_norm(self, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Compute h = m₀ ⊙ x + m₁ ⊙ x0 and g · rms(h)."""
        if "mix_rms_norm" in self.written_out:
            mixed = self.mix(x, x0)
            return mixed, self.normed(mixed)
        return mix_rms_norm(x, x0, self.resid_mix, eps=NORM_EPS, gain=self.gain)

    def attend_and_add(self, x: Tensor, inputs: BlockInputs, rows_from: int = 0) -> tuple[Tensor, Tensor]:
        """Compute h at all positions, and h + a ⊙ Attn(g · rms(h)) from position `rows_from` on. See `attend`."""
        if "linear_residual" in self.replacements and inputs.heads is None and not rows_from:
            mixed, normed = self.mix_and_norm(x, inputs.x0)
            attended = self.attention(
                normed, inputs.rotary,
                extra_value=inputs.extra_value, documents=inputs.documents, past=inputs.past,
                scale=self.attn_scale, residual=mixed,
            )  # fmt: skip
            return mixed, attended
        mixed, output = self.attend(x, inputs, rows_from)
        return mixed, mixed[:, rows_from:] + output

    def attend(self, x: Tensor, inputs: BlockInputs, rows_from: int = 0) -> tuple[Tensor, Tensor]:
        """Compute h = m₀ ⊙ x + m₁ ⊙ x0 at all positions, and a ⊙ Attn(g · rms(h)) from position `rows_from` on."""
        x0, rotary, extra_value, documents, heads, past = inputs
        if heads is not None:
            # queries and keys in `inputs.heads` are normed already
            mixed = self.mix(x, x0)
            gating = None if self.attention.gate is None else self.normed(mixed)
            output = self.attention.attend(heads, rotary, documents, past, self.attn_scale, gating)
        else:
            mixed, normed = self.mix_and_norm(x, x0)
            output = self.attention(
                normed, rotary,
                extra_value=extra_value, documents=documents, rows_from=rows_from, past=past, scale=self.attn_scale,
            )  # fmt: skip
        return mixed, output

    def feed(self, x: Tensor, *, residual: Tensor) -> Tensor:
        """Compute residual + b ⊙ MLP(g · rms_norm(x))."""
        output: Tensor = self.mlp(x, residual, self.mlp_scale.to(x.dtype))
        return output

    def normed(self, x: Tensor) -> Tensor:
        """Compute g · rms_norm(x), the input of attention."""
        normed = rms_norm(x)
        return normed if self.gain == 1.0 else normed * self.gain

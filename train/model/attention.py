"""Causal grouped-query attention with QK-norm, query gain, partial RoPE and optional XSA."""

from __future__ import annotations

import torch
from torch import Tensor

from golf_kernels.qk_norm_rope import qk_norm_rope
from golf_kernels.qk_norm_rope import written_out as qk_norm_rope_formula
from golf_kernels.xsa import written_out as xsa_formula
from golf_kernels.xsa import xsa
from train.common.wording import counted
from train.config import Config
from train.model.attention_backends import causal_attention
from train.model.compile import OperatorModule
from train.model.documents import Documents
from train.model.init import constant, matrix, zero_matrix
from train.model.linear import joint_linear, linear
from train.model.norm import NORM_EPS, rms_norm
from train.model.rope import rotate

Rotary = tuple[Tensor, Tensor]
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries `(B, R, H, D)`, keys and values `(B, T, H_kv, D)`."""


class KeyValues:
    """The KV cache for generation, keys and values `(runs, B, T, H_kv, D)`; a layer that runs twice has two entries.

    A forward pass over new positions calls `extend` once for each layer run, in order.
    """

    def __init__(
        self, runs: int, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys, self.values = (torch.empty(runs, *shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0
        self._run = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values `(B, n, H_kv, D)` to the next layer run; return all: `(B, length + n, H_kv, D)` views.

        Raises:
            ValueError: the text would be longer than T.
        """
        run, end = self._run, self.length + key.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {counted(self.keys.shape[2], 'token')}, not {end}")
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[run, :, self.length : end] = new
        self._run = (run + 1) % len(self.keys)
        keys, values = self.keys[run, :, :end], self.values[run, :, :end]
        if self._run == 0:
            self.length = end
        return keys, values


class Attention(OperatorModule):
    """The attention of one layer, from the normed input to the output projection.

    q, k ← rms(q), rms(k) per head; RoPE; q ← q · q_gain[head]; causal attention; XSA in the last `xsa_last_n` layers.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        dim, orthogonal = config.model_dim, config.orthogonal_init
        self.query = matrix(dim, dim, orthogonal=orthogonal)
        self.key = matrix(config.kv_dim, dim, orthogonal=orthogonal)
        self.value = matrix(config.kv_dim, dim, orthogonal=orthogonal)
        self.output = zero_matrix(dim, dim)
        self.q_gain = constant(config.qk_gain_init, config.num_heads)
        self.head_dim = config.head_dim
        self.xsa = layer >= config.num_layers - config.xsa_last_n
        self.qat = config.qat
        self.backend = "sdpa"

    def project(self, x: Tensor, extra_value: Tensor | None = None, rows_from: int = 0) -> Heads:
        """Queries, keys and values before norm and rotation; arguments as for `heads`."""
        fake_quantize = self.qat and self.training
        weights = (self.query, self.key, self.value)
        if not rows_from:
            query, key, value = joint_linear(x, weights, fake_quantize=fake_quantize)
        else:
            rows = (x[:, rows_from:], x, x)
            query, key, value = (
                linear(part, weight, fake_quantize=fake_quantize) for part, weight in zip(rows, weights, strict=True)
            )
        if extra_value is not None:
            value = value + extra_value
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        return query, key, value

    def heads(self, x: Tensor, extra_value: Tensor | None = None, rows_from: int = 0) -> Heads:
        """Normed queries and keys, and values, before rotation.

        `x` `(B, T, d)` is the normed input; `extra_value` `(B, T, kv_dim)` is added to the values; queries start at
        position `rows_from`.
        """
        query, key, value = self.project(x, extra_value, rows_from)
        return rms_norm(query), rms_norm(key), value

    def attend(
        self,
        heads: Heads,
        rotary: Rotary,
        documents: Documents | None = None,
        past: KeyValues | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Rotation, attention, XSA and the output projection: from the result of `heads` to `(B, R, d)`.

        The R queries are those of the last R positions. Other arguments as for `forward`.
        """
        query, key, value = heads
        (cosine, sine), first = rotary, key.shape[1] - query.shape[1]
        query = rotate(query, (cosine[first:], sine[first:])) * self.q_gain.to(query.dtype)[:, None]
        return self.output_of((query, rotate(key, rotary), value), documents, past, scale)

    def output_of(
        self,
        heads: Heads,
        documents: Documents | None = None,
        past: KeyValues | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """`attend` after the rotation; queries include the gain."""
        query, key, value = heads
        keys, values = (key, value) if past is None else past.extend(key, value)
        output = causal_attention(query, keys, values, documents=documents, backend=self.backend)
        fake_quantize = self.qat and self.training
        if self.xsa:
            own = value[:, key.shape[1] - query.shape[1] :]
            output = xsa_formula(output, own) if "xsa" in self.written_out else xsa(output, own)
        return linear(output.flatten(-2), self.output, scale=scale, fake_quantize=fake_quantize)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        *,
        extra_value: Tensor | None = None,
        documents: Documents | None = None,
        rows_from: int = 0,
        past: KeyValues | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The layer's attention output `(B, T - rows_from, d)`, without the residual.

        Args:
            x: `(B, T, d)`, normed input.
            rotary: `rotary_table` for T positions, in the dtype of `x`.
            extra_value: `(B, T, kv_dim)`, added to the values.
            documents: if given, attention stays inside each document.
            rows_from: first position to compute; earlier positions only provide keys and values.
            past: KV cache to append to, for generation.
            scale: `(d,)`, factor on each output channel; None: 1.
        """
        # the operator rotates queries and keys by one table: both must cover the same positions
        if rows_from:
            return self.attend(self.heads(x, extra_value, rows_from), rotary, documents, past, scale)
        query, key, value = self.project(x, extra_value)
        norm_and_rotate = qk_norm_rope_formula if "qk_norm_rope" in self.written_out else qk_norm_rope
        query, key = norm_and_rotate(query, key, *rotary, self.q_gain, eps=NORM_EPS)
        return self.output_of((query, key, value), documents, past, scale)

"""Causal grouped-query attention with QK-norm, query gain, partial RoPE and optional XSA (`golf_kernels.xsa`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_kernels.qk_norm_rope import qk_norm_rope
from golf_kernels.qk_norm_rope import written_out as qk_norm_rope_formula
from golf_kernels.qkv_norm_rope import qkv_norm_rope
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
# number of channels of the normed input that the head gates read, and the factor on the weighted sum (#1787)
_GATE_CHANNELS = 12
_GATE_SCALE = 0.5

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries `(B, R, H, D)` of the last R positions, keys `(B, T, H_kv, D)` and values `(B, T, H_kv, D)`."""


class KeyValues:
    """The KV cache for generation. `keys` and `values` are `(runs, B, T, H_kv, D)`.

    `runs` is the number of layer runs in a forward pass. A repeated layer counts once per run. A forward pass over new
    positions calls `extend` once per layer run, in order. `length` is the number of positions in the cache.
    """

    def __init__(
        self, runs: int, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys, self.values = (torch.empty(runs, *shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0
        self._run = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values `(B, n, H_kv, D)` of the next layer run.

        Returns:
            All keys and values of this layer run, as views `(B, length + n, H_kv, D)`.

        Raises:
            ValueError: the cache would hold more than T positions.
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
    """The attention of one layer. Computes the output projection's result from the normed input.

    After the projections: q ← rms(q) and k ← rms(k) per head; RoPE; q ← q · q_gain[head]; causal attention; XSA in the
    last `xsa_last_n` layers; with `head_gate` y ← σ(0.5 G x[:12]) · y per head; output projection. G `(H, 12)` is
    initially 0. If d < 12, the gates read all d channels of x.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        dim, orthogonal = config.model_dim, config.orthogonal_init
        self.query = matrix(dim, dim, orthogonal=orthogonal)
        self.key = matrix(config.kv_dim, dim, orthogonal=orthogonal)
        self.value = matrix(config.kv_dim, dim, orthogonal=orthogonal)
        self.output = zero_matrix(dim, dim)
        self.q_gain = constant(config.qk_gain_init, config.num_heads)
        self.gate = constant(0.0, config.num_heads, min(_GATE_CHANNELS, dim)) if config.head_gate else None
        self.head_dim = config.head_dim
        self.xsa = layer >= config.num_layers - config.xsa_last_n
        self.qat = config.fake_quantization
        self.backend = "sdpa"

    def joint_project(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values in one product, `(B, T, d + 2 kv_dim)`."""
        return joint_linear(x, (self.query, self.key, self.value), fake_quantize=self.qat if self.training else None)

    def project(self, x: Tensor, extra_value: Tensor | None = None, rows_from: int = 0) -> Heads:
        """Compute queries, keys and values before norm and rotation. For the arguments see `heads`."""
        weights = (self.query, self.key, self.value)
        if not rows_from:
            query, key, value = self.joint_project(x).split([len(weight) for weight in weights], dim=-1)
        else:
            fake_quantize = self.qat if self.training else None
            rows = (x[:, rows_from:], x, x)
            query, key, value = (
                linear(part, weight, fake_quantize=fake_quantize) for part, weight in zip(rows, weights, strict=True)
            )
        if extra_value is not None:
            value = value + extra_value
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        return query, key, value

    def heads(self, x: Tensor, extra_value: Tensor | None = None, rows_from: int = 0) -> Heads:
        """Compute values, and normed queries and keys before rotation.

        Args:
            x: `(B, T, d)`, normed input.
            extra_value: `(B, T, kv_dim)`, added to the values.
            rows_from: first position for which a query is computed.
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
        gating: Tensor | None = None,
    ) -> Tensor:
        """Rotate queries and keys, attend, and apply XSA, head gates and the output projection. Return `(B, R, d)`.

        `heads` is the result of the method `heads`. `gating` `(B, R, d)` is the normed input, from which the head gates
        are computed. For the other arguments see `forward`.
        """
        query, key, value = heads
        (cosine, sine), first = rotary, key.shape[1] - query.shape[1]
        query = rotate(query, (cosine[first:], sine[first:])) * self.q_gain.to(query.dtype)[:, None]
        return self.output_of((query, rotate(key, rotary), value), documents, past, scale, gating)

    def output_of(
        self,
        heads: Heads,
        documents: Documents | None = None,
        past: KeyValues | None = None,
        scale: Tensor | None = None,
        gating: Tensor | None = None,
        own_value: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Do the steps of `attend` after the rotation.

        Queries and keys in `heads` are already rotated, and queries are multiplied by the gain.
        `own_value` are the values for XSA. None: those of `heads`. `residual` `(B, R, d)` is added to the result.
        """
        query, key, value = heads
        keys, values = (key, value) if past is None else past.extend(key, value)
        output = causal_attention(query, keys, values, documents=documents, backend=self.backend)
        fake_quantize = self.qat if self.training else None
        if self.xsa:
            own = (value if own_value is None else own_value)[:, key.shape[1] - query.shape[1] :]
            output = xsa_formula(output, own) if "xsa" in self.written_out else xsa(output, own)
        if self.gate is not None and gating is not None:
            logits = F.linear(gating[..., : self.gate.shape[1]], self.gate.to(gating.dtype))
            output = output * torch.sigmoid(_GATE_SCALE * logits)[..., None]
        return linear(output.flatten(-2), self.output, scale=scale, fake_quantize=fake_quantize, residual=residual)

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
        residual: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention output of the layer, `(B, T - rows_from, d)`.

        Args:
            x: `(B, T, d)`, normed input.
            rotary: result of `rotary_table` for the T positions, in the dtype of `x`.
            extra_value: `(B, T, kv_dim)`, added to the values.
            documents: if given, attention stays inside each document.
            rows_from: first position whose output is computed. Earlier positions only provide keys and values.
            past: the KV cache for generation; the new keys and values are appended to it.
            scale: `(d,)`, factor on each output channel; None: 1.
            residual: `(B, T, d)`, added to the result by `linear_residual`; not with `rows_from`.
        """
        # the operator rotates queries and keys with the same table, so both must cover the same positions
        if rows_from:
            return self.attend(self.heads(x, extra_value, rows_from), rotary, documents, past, scale, x[:, rows_from:])
        if "qkv_norm_rope" in self.replacements:
            uses = 2 if self.xsa and extra_value is None else 1
            query, key, value, *again = qkv_norm_rope(
                self.joint_project(x), *rotary, self.q_gain,
                kv_heads=len(self.key) // self.head_dim, dim=self.head_dim, eps=NORM_EPS, uses=uses,
            )  # fmt: skip
            if extra_value is not None:
                value = value + extra_value.unflatten(-1, (-1, self.head_dim))
            own = again[0] if again else None
            return self.output_of((query, key, value), documents, past, scale, x, own, residual)
        query, key, value = self.project(x, extra_value)
        norm_and_rotate = qk_norm_rope_formula if "qk_norm_rope" in self.written_out else qk_norm_rope
        query, key = norm_and_rotate(query, key, *rotary, self.q_gain, eps=NORM_EPS)
        return self.output_of((query, key, value), documents, past, scale, x, residual=residual)

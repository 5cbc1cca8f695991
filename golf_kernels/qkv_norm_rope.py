"""`qk_norm_rope` on the product with the joint weight of queries, keys and values: `golf::qkv_norm_rope`.

Its backward pass writes the gradients of queries, keys and values into one tensor, the product's gradient. So no other
pass copies them together. If values have two users, attention and XSA, their gradients arrive as two tensors, and the
same pass adds them. `golf::qkv_norm_rope_backward` computes this gradient. The formulas are those of `qk_norm_rope`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from golf_kernels import dispatch, operators
from golf_kernels.qk_norm_rope import (
    backward_reference,
    fake,
    gain_floor,
    reference,
    triton_forward,
    triton_problem,
    triton_supports,
)


def qkv_norm_rope(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    *,
    kv_heads: int,
    dim: int,
    eps: float,
    uses: int = 1,
) -> tuple[Tensor, ...]:
    """Prepares queries and keys for attention, like `qk_norm_rope`, and splits off the values.

    qkv and gain have first derivatives, but no second ones. cosine and sine have none.

    Args:
        qkv: `(B, T, (H + 2 H_kv) · D)`, any floating dtype, contiguous: all queries, then all keys, then all values.
        cosine, sine: `(T, 1, r/2)` in the dtype of qkv, as for `qk_norm_rope`.
        gain: `(H,)`, float32 or the dtype of qkv.
        kv_heads: H_kv.
        dim: D.
        eps: epsilon of the norm.
        uses: 1 or 2. With 2 the values are returned twice. If each user takes its own, the backward pass adds their
            gradients.

    Returns:
        q̂ `(B, T, H, D)` and k̂ `(B, T, H_kv, D)`, contiguous, and the values `(B, T, H_kv, D)` as views of qkv.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    heads = gain.shape[0]
    if qkv.ndim != 3 or qkv.shape[2] != (heads + 2 * kv_heads) * dim:
        raise ValueError(
            f"qkv: expected shape (B, T, {(heads + 2 * kv_heads) * dim}) for {heads} + 2 x {kv_heads} heads of {dim}, "
            f"found {tuple(qkv.shape)}"
        )
    if uses not in (1, 2):
        raise ValueError(f"uses: expected 1 or 2, found {uses}")
    found: tuple[Tensor, ...] = _Joint.apply(qkv, cosine, sine, gain, kv_heads, dim, eps, uses)
    return found


def _parts(qkv: Tensor, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """Views of queries, keys and values, `(B, T, heads, D)` each."""
    parts: tuple[Tensor, ...] = qkv.unflatten(-1, (heads + 2 * kv_heads, dim)).split([heads, kv_heads, kv_heads], dim=2)
    return parts


class _Joint(torch.autograd.Function):
    # no operator, because an operator must not return a view of its input
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cosine: Tensor,
        sine: Tensor,
        gain: Tensor,
        kv_heads: int,
        dim: int,
        eps: float,
        uses: int,
    ) -> tuple[Tensor, ...]:
        q, k, v = _parts(qkv, gain.shape[0], kv_heads, dim)
        q_hat, k_hat, rstd = torch.ops.golf.qkv_norm_rope(q, k, cosine, sine, gain, eps)
        ctx.save_for_backward(q_hat, k_hat, cosine, sine, gain, rstd)
        return q_hat, k_hat, v, *([v.view_as(v)] if uses == 2 else [])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_hat: Tensor, dk_hat: Tensor, *dvs: Tensor) -> tuple[Any, ...]:
        dv, other = (*dvs, None)[:2]
        dqkv, dgain = torch.ops.golf.qkv_norm_rope_backward(dq_hat, dk_hat, dv, other, *ctx.saved_tensors)
        return dqkv, None, None, dgain, None, None, None, None


def _backward_fake(
    dq_hat: Tensor,
    dk_hat: Tensor,
    dv: Tensor,
    other_dv: Tensor | None,
    q_hat: Tensor,
    k_hat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, dim = q_hat.shape
    return q_hat.new_empty((batch, length, (heads + 2 * k_hat.shape[2]) * dim)), gain.new_empty(gain.shape)


def _backward_reference(
    dq_hat: Tensor, dk_hat: Tensor, dv: Tensor, other_dv: Tensor | None, q_hat: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    dq, dk, dgain = backward_reference(dq_hat, dk_hat, q_hat, *rest)
    if other_dv is not None:
        dv = (dv.to(rest[-1].dtype) + other_dv.to(rest[-1].dtype)).to(q_hat.dtype)
    return torch.cat([dq.flatten(2), dk.flatten(2), dv.flatten(2)], dim=-1), dgain


def _triton_backward(
    dq_hat: Tensor, dk_hat: Tensor, dv: Tensor, other_dv: Tensor | None, q_hat: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    from golf_kernels import qk_norm_rope_triton

    dvs = [dv] if other_dv is None else [dv, other_dv]
    return qk_norm_rope_triton.joint_backward(dq_hat, dk_hat, dvs, q_hat, *rest, floor=gain_floor(q_hat.dtype))


def _triton_backward_supports(*args: Any) -> str | None:
    return dispatch.triton_problem() or (triton_problem(*args[4:6]) if args else None)


def _inputs(
    make: operators.Make,
    batch: int = 2,
    length: int = 19,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    rotary: int = 8,
    uses: int = 2,
) -> operators.Inputs:
    qkv = make(batch, length, (heads + 2 * kv_heads) * dim)
    angles = 100 * make(length, 1, rotary // 2, dtype=torch.float32)
    return {
        "qkv": qkv.requires_grad_(),
        "cosine": angles.cos().to(qkv.dtype),
        "sine": angles.sin().to(qkv.dtype),
        "gain": (5 + make(heads, dtype=torch.float32)).requires_grad_(),
        "kv_heads": kv_heads,
        "dim": dim,
        "eps": 1e-6,
        "uses": uses,
    }


dispatch.define(
    "qkv_norm_rope",
    "(Tensor q, Tensor k, Tensor cosine, Tensor sine, Tensor gain, float eps) "
    "-> (Tensor q_hat, Tensor k_hat, Tensor rstd)",
    reference=reference,
    fake=fake,
)
dispatch.define(
    "qkv_norm_rope_backward",
    "(Tensor dq_hat, Tensor dk_hat, Tensor dv, Tensor? other_dv, Tensor q_hat, Tensor k_hat, Tensor cosine, Tensor sine, "
    "Tensor gain, Tensor rstd) -> (Tensor dqkv, Tensor dgain)",
    reference=_backward_reference,
    fake=_backward_fake,
)
for _op in ("qkv_norm_rope", "qkv_norm_rope_backward"):
    dispatch.refuse_gradient(_op, f"golf::{_op} has no derivative of its own: call golf_kernels.qkv_norm_rope")
dispatch.register("qkv_norm_rope", "triton", triton_forward, supports=triton_supports)
dispatch.register("qkv_norm_rope_backward", "triton", _triton_backward, supports=_triton_backward_supports)
operators.declare(
    operators.Operator(
        "qkv_norm_rope",
        qkv_norm_rope,
        _inputs,
        cases=[
            {"batch": 48, "length": 2048, "heads": h, "kv_heads": kv, "dim": d, "rotary": r, "uses": uses}
            for (h, kv, d, r), uses in (
                ((8, 8, 64, 0), 1), ((8, 4, 64, 16), 2), ((6, 3, 80, 40), 2), ((16, 1, 256, 64), 2), ((64, 8, 128, 128), 2)
            )
        ],
        members=("qkv_norm_rope", "qkv_norm_rope_backward"),
        called_by="model",
    )
)  # fmt: skip

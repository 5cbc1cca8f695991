"""Triton kernels of QK-norm, rotary embedding and query gain: one pass over queries and keys each way.

    rotate     q̂ = g · R n(q), k̂ = R n(k), and the rstd of each head and position
    unrotate   dq, dk and each program's share of dg, from dq̂, q̂, dk̂, k̂ and rstd

A program takes some positions with all their heads, so that the tables are read once for all of them. A head's vector
is held in three pieces, the halves that turn and the rest, because a rotation then needs no exchange between threads.
"""

# triton gives the arguments of a kernel their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(address, stride, inside, FIRST: tl.constexpr, COUNT: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    dim = tl.arange(0, PADDED)[None, None, :]
    return tl.load(address + (FIRST + dim) * stride, mask=inside & (dim < COUNT), other=0.0).to(tl.float32)


@triton.jit
def _store(address, value, inside, FIRST: tl.constexpr, COUNT: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    dim = tl.arange(0, PADDED)[None, None, :]
    tl.store(address + FIRST + dim, value.to(address.dtype.element_ty), mask=inside & (dim < COUNT))


@triton.jit
def _gain(gain_ptr, dtype: tl.constexpr, floor, HEADS: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(HEADS)
    head = tl.arange(0, PADDED)
    gain = tl.load(gain_ptr + head, mask=head < HEADS, other=1.0).to(dtype).to(tl.float32)
    return tl.where(tl.abs(gain) < floor, tl.where(gain < 0, -floor, floor), gain)[None, :]


@triton.jit
def _places(position, positions, length, HEADS: tl.constexpr):
    # tiles are (position, head, dimension)
    PADDED: tl.constexpr = triton.next_power_of_2(HEADS)
    head = tl.arange(0, PADDED)
    inside = (position < positions)[:, None] & (head < HEADS)[None, :]
    return head[None, :], (position // length).to(tl.int64)[:, None], (position % length).to(tl.int64)[:, None], inside


@triton.jit
def _table(table_ptr, position, positions, length, other, HALF: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(HALF)
    dim = tl.arange(0, PADDED)[None, None, :]
    inside = (position < positions)[:, None, None] & (dim < HALF)
    address = table_ptr + (position % length)[:, None, None] * HALF + dim
    return tl.load(address, mask=inside, other=other).to(tl.float32)


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    rstd_ptr,
    gain,
    cosine,
    sine,
    position,
    positions,
    length,
    eps,
    stride_b,
    stride_t,
    stride_h,
    stride_d,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    REST: tl.constexpr = DIM - 2 * HALF
    head, batch, time, here = _places(position, positions, length, HEADS)
    source = (x_ptr + (batch * stride_b + time * stride_t + head * stride_h))[:, :, None]
    row = position.to(tl.int64)[:, None]
    target = (out_ptr + (row * HEADS + head) * DIM)[:, :, None]
    inside = here[:, :, None]
    total = tl.zeros(here.shape, tl.float32)
    if HALF > 0:
        first = _load(source, stride_d, inside, 0, HALF)
        second = _load(source, stride_d, inside, HALF, HALF)
        total += tl.sum(first * first + second * second, axis=2)
    if REST > 0:
        rest = _load(source, stride_d, inside, 2 * HALF, REST)
        total += tl.sum(rest * rest, axis=2)
    rstd = tl.rsqrt(total / DIM + eps)
    tl.store(rstd_ptr + row * ALL_HEADS + head, rstd, mask=here)
    if HALF > 0:
        first *= rstd[:, :, None]
        second *= rstd[:, :, None]
        _store(target, gain[:, :, None] * (first * cosine + second * sine), inside, 0, HALF)
        _store(target, gain[:, :, None] * (second * cosine - first * sine), inside, HALF, HALF)
    if REST > 0:
        _store(target, gain[:, :, None] * (rest * rstd[:, :, None]), inside, 2 * HALF, REST)


@triton.jit
def _unrotate_heads(
    upstream_ptr,
    output_ptr,
    gradient_ptr,
    rstd_ptr,
    gain,
    cosine,
    sine,
    position,
    positions,
    length,
    stride_b,
    stride_t,
    stride_h,
    stride_d,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    # returns ⟨upstream, output / gain⟩ of each position and head
    REST: tl.constexpr = DIM - 2 * HALF
    head, batch, time, here = _places(position, positions, length, HEADS)
    source = (upstream_ptr + (batch * stride_b + time * stride_t + head * stride_h))[:, :, None]
    row = position.to(tl.int64)[:, None]
    place = ((row * HEADS + head) * DIM)[:, :, None]
    output, target = output_ptr + place, gradient_ptr + place
    inside = here[:, :, None]
    inverse = (1.0 / gain)[:, :, None]
    along = tl.zeros(here.shape, tl.float32)
    if HALF > 0:
        first = _load(source, stride_d, inside, 0, HALF)
        second = _load(source, stride_d, inside, HALF, HALF)
        first_unit = _load(output, 1, inside, 0, HALF) * inverse
        second_unit = _load(output, 1, inside, HALF, HALF) * inverse
        along += tl.sum(first * first_unit + second * second_unit, axis=2)
    if REST > 0:
        rest = _load(source, stride_d, inside, 2 * HALF, REST)
        rest_unit = _load(output, 1, inside, 2 * HALF, REST) * inverse
        along += tl.sum(rest * rest_unit, axis=2)
    rstd = tl.load(rstd_ptr + row * ALL_HEADS + head, mask=here, other=0.0)
    factor = (rstd * gain)[:, :, None]
    mean = (along * (1.0 / DIM))[:, :, None]
    if HALF > 0:
        share = mean / (cosine * cosine + sine * sine)
        first -= share * first_unit
        second -= share * second_unit
        _store(target, factor * (first * cosine - second * sine), inside, 0, HALF)
        _store(target, factor * (second * cosine + first * sine), inside, HALF, HALF)
    if REST > 0:
        _store(target, factor * (rest - mean * rest_unit), inside, 2 * HALF, REST)
    return along


@triton.jit
def rotate_kernel(
    q_ptr,
    k_ptr,
    cosine_ptr,
    sine_ptr,
    gain_ptr,
    q_hat_ptr,
    k_hat_ptr,
    rstd_ptr,
    positions,
    length,
    eps,
    floor,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_d,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q̂, k̂ and rstd of BLOCK positions; without key heads (or query heads) of the others alone."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ALL: tl.constexpr = HEADS + KV_HEADS
    cosine = 1.0
    sine = 0.0
    if HALF > 0:
        cosine = _table(cosine_ptr, position, positions, length, 1.0, HALF)
        sine = _table(sine_ptr, position, positions, length, 0.0, HALF)
    if HEADS > 0:
        gain = _gain(gain_ptr, q_ptr.dtype.element_ty, floor, HEADS)
        _rotate_heads(
            q_ptr, q_hat_ptr, rstd_ptr, gain, cosine, sine, position, positions, length, eps,
            q_stride_b, q_stride_t, q_stride_h, q_stride_d, HEADS, ALL, DIM, HALF,
        )  # fmt: skip
    if KV_HEADS > 0:
        one = tl.full((1, triton.next_power_of_2(KV_HEADS)), 1.0, tl.float32)
        _rotate_heads(
            k_ptr, k_hat_ptr, rstd_ptr + HEADS, one, cosine, sine, position, positions, length, eps,
            k_stride_b, k_stride_t, k_stride_h, k_stride_d, KV_HEADS, ALL, DIM, HALF,
        )  # fmt: skip


@triton.jit
def unrotate_kernel(
    dq_hat_ptr,
    dk_hat_ptr,
    q_hat_ptr,
    k_hat_ptr,
    cosine_ptr,
    sine_ptr,
    gain_ptr,
    rstd_ptr,
    dq_ptr,
    dk_ptr,
    share_ptr,
    positions,
    length,
    floor,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_d,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dq and dk of BLOCK positions, and the program's line of `share` `(programs, HEADS)`, whose sum is dg."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ALL: tl.constexpr = HEADS + KV_HEADS
    cosine = 1.0
    sine = 0.0
    if HALF > 0:
        cosine = _table(cosine_ptr, position, positions, length, 1.0, HALF)
        sine = _table(sine_ptr, position, positions, length, 0.0, HALF)
    if HEADS > 0:
        gain = _gain(gain_ptr, q_hat_ptr.dtype.element_ty, floor, HEADS)
        along = _unrotate_heads(
            dq_hat_ptr, q_hat_ptr, dq_ptr, rstd_ptr, gain, cosine, sine, position, positions, length,
            q_stride_b, q_stride_t, q_stride_h, q_stride_d, HEADS, ALL, DIM, HALF,
        )  # fmt: skip
        head = tl.arange(0, triton.next_power_of_2(HEADS))
        tl.store(share_ptr + tl.program_id(0) * HEADS + head, tl.sum(along, axis=0), mask=head < HEADS)
    if KV_HEADS > 0:
        one = tl.full((1, triton.next_power_of_2(KV_HEADS)), 1.0, tl.float32)
        _unrotate_heads(
            dk_hat_ptr, k_hat_ptr, dk_ptr, rstd_ptr + HEADS, one, cosine, sine, position, positions, length,
            k_stride_b, k_stride_t, k_stride_h, k_stride_d, KV_HEADS, ALL, DIM, HALF,
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, eps: float, *, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`golf::qk_norm_rope`: q̂, k̂ and rstd `(B, T, H + H_kv)`, which `backward` needs.

    Args:
        q, k: `(B, T, H, D)` and `(B, T, H_kv, D)` of any strides, bfloat16, float16 or float32.
        cosine, sine: `(T, 1, r/2)` in the dtype of q.
        gain: `(H,)` float32 or in the dtype of q.
        eps: of the norm.
        floor: smallest gain, so that q̂ keeps its direction.
    """
    q_hat, k_hat = q.new_empty(q.shape), k.new_empty(k.shape)
    rstd = q.new_empty((*q.shape[:2], q.shape[2] + k.shape[2]), dtype=torch.float32)
    tables = (cosine.contiguous(), sine.contiguous(), gain.contiguous())
    if rstd.numel():
        block, warps = _blocks(q, k)
        positions, length = q.shape[0] * q.shape[1], q.shape[1]
        with torch.cuda.device_of(q):
            rotate_kernel[(triton.cdiv(positions, block),)](
                q, k, *tables, q_hat, k_hat, rstd, positions, length, eps, floor, *q.stride(), *k.stride(),
                **_sizes(q, k, cosine), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return q_hat, k_hat, rstd


def backward(
    dq_hat: Tensor,
    dk_hat: Tensor,
    q_hat: Tensor,
    k_hat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    rstd: Tensor,
    *,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`golf::qk_norm_rope_backward`: dq, dk and dgain, whose shares are added in one order always."""
    q_hat, k_hat, rstd = q_hat.contiguous(), k_hat.contiguous(), rstd.contiguous()
    dq, dk = torch.empty_like(q_hat), torch.empty_like(k_hat)
    if not rstd.numel():
        return dq, dk, torch.zeros_like(gain)
    block, warps = _blocks(q_hat, k_hat)
    positions, length = q_hat.shape[0] * q_hat.shape[1], q_hat.shape[1]
    programs = triton.cdiv(positions, block)
    share = rstd.new_empty((programs, q_hat.shape[2]))
    tables = (cosine.contiguous(), sine.contiguous(), gain.contiguous())
    with torch.cuda.device_of(q_hat):
        unrotate_kernel[(programs,)](
            dq_hat, dk_hat, q_hat, k_hat, *tables, rstd, dq, dk, share, positions, length, floor,
            *dq_hat.stride(), *dk_hat.stride(), **_sizes(q_hat, k_hat, cosine), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dq, dk, share.sum(dim=0).to(gain.dtype)


def _sizes(q: Tensor, k: Tensor, cosine: Tensor) -> dict[str, int]:
    return {"HEADS": q.shape[2], "KV_HEADS": k.shape[2], "DIM": q.shape[3], "HALF": cosine.shape[2]}


def _blocks(q: Tensor, k: Tensor) -> tuple[int, int]:
    return choose_block(max(q.shape[2], k.shape[2]), q.shape[3])


def choose_block(heads: int, dim: int) -> tuple[int, int]:
    """Positions and warps of a program: 16 numbers of a tensor per thread, padding counted; more cost registers."""
    numbers = triton.next_power_of_2(heads) * triton.next_power_of_2(dim)
    return max(1, 2048 // numbers), max(4, numbers // 512)

"""Triton kernels of QK-norm, rotary embedding and query gain. Each kernel makes one pass over queries and keys.

    rotate     q̂ = g · R n(q), k̂ = R n(k), and rstd of each head and position
    unrotate   dq, dk and each program's partial sum of dg, from dq̂, q̂, dk̂, k̂ and rstd; also dv, the sum of the
               gradients of one or two users of the values

A program takes a block of positions with all their heads, so that it reads cosine and sine once for all heads. It reads
the rotated dimensions a second time, from the cache, in the order of their partners in the rotation. So threads need
not exchange numbers.
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(address, stride, dim, inside):
    return tl.load(address + dim * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gain(gain_ptr, dtype: tl.constexpr, floor, HEADS: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(HEADS)
    head = tl.arange(0, PADDED)
    gain = tl.load(gain_ptr + head, mask=head < HEADS, other=1.0).to(dtype).to(tl.float32)
    return tl.where(tl.abs(gain) < floor, tl.where(gain < 0, -floor, floor), gain)[None, :]


@triton.jit
def _indices_and_mask(position, positions, length, HEADS: tl.constexpr):
    # tiles are (position, head, dimension)
    PADDED: tl.constexpr = triton.next_power_of_2(HEADS)
    head = tl.arange(0, PADDED)
    inside = (position < positions)[:, None] & (head < HEADS)[None, :]
    return head[None, :], (position // length).to(tl.int64)[:, None], (position % length).to(tl.int64)[:, None], inside


@triton.jit
def _dims(DIM: tl.constexpr, HALF: tl.constexpr):
    # returns each dimension, and its partner in the rotation
    PADDED: tl.constexpr = triton.next_power_of_2(DIM)
    dim = tl.arange(0, PADDED)[None, None, :]
    return dim, tl.where(dim < HALF, dim + HALF, dim - HALF)


@triton.jit
def _tables(cosine_ptr, sine_ptr, position, positions, length, DIM: tl.constexpr, HALF: tl.constexpr):
    # R x = cosine · x + sine · partner's x; a dimension that is not rotated has cosine 1 and sine 0
    dim, _partner = _dims(DIM, HALF)
    inside = (position < positions)[:, None, None] & (dim < 2 * HALF)
    place = (position % length)[:, None, None] * HALF + tl.where(dim < HALF, dim, dim - HALF)
    cosine = tl.load(cosine_ptr + place, mask=inside, other=1.0).to(tl.float32)
    sine = tl.load(sine_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return cosine, tl.where(dim < HALF, sine, -sine)


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
    head, batch, time, here = _indices_and_mask(position, positions, length, HEADS)
    dim, partner = _dims(DIM, HALF)
    source = (x_ptr + (batch * stride_b + time * stride_t + head * stride_h))[:, :, None]
    row = position.to(tl.int64)[:, None]
    inside = here[:, :, None] & (dim < DIM)
    x = _load(source, stride_d, dim, inside)
    rstd = tl.rsqrt(tl.sum(x * x, axis=2) / DIM + eps)
    tl.store(rstd_ptr + row * ALL_HEADS + head, rstd, mask=here)
    if HALF > 0:
        x = cosine * x + sine * _load(source, stride_d, partner, here[:, :, None] & (dim < 2 * HALF))
    target = (out_ptr + (row * HEADS + head) * DIM)[:, :, None]
    tl.store(target + dim, ((gain * rstd)[:, :, None] * x).to(out_ptr.dtype.element_ty), mask=inside)


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
    gradient_stride,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    # returns ⟨upstream, output / gain⟩ of each position and head
    head, batch, time, here = _indices_and_mask(position, positions, length, HEADS)
    dim, partner = _dims(DIM, HALF)
    source = (upstream_ptr + (batch * stride_b + time * stride_t + head * stride_h))[:, :, None]
    row = position.to(tl.int64)[:, None]
    place = ((row * HEADS + head) * DIM)[:, :, None]
    inside = here[:, :, None] & (dim < DIM)
    turning = here[:, :, None] & (dim < 2 * HALF)
    upstream, output = _load(source, stride_d, dim, inside), _load(output_ptr + place, 1, dim, inside)
    along = tl.sum(upstream * output, axis=2) / gain
    rstd = tl.load(rstd_ptr + row * ALL_HEADS + head, mask=here, other=0.0)
    coefficient = (along / (DIM * gain))[:, :, None]
    if HALF > 0:
        coefficient *= 1.0 / (cosine * cosine + sine * sine)
    gradient = upstream - coefficient * output
    if HALF > 0:
        other = _load(source, stride_d, partner, turning) - coefficient * _load(output_ptr + place, 1, partner, turning)
        gradient = cosine * gradient - sine * other
    gradient *= (rstd * gain)[:, :, None]
    target = (gradient_ptr + (row * gradient_stride + head * DIM))[:, :, None]
    tl.store(target + dim, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
    return along


@triton.jit
def _load_heads(x_ptr, head, batch, time, dim, inside, stride_b, stride_t, stride_h, stride_d):
    return _load((x_ptr + (batch * stride_b + time * stride_t + head * stride_h))[:, :, None], stride_d, dim, inside)


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
    """Computes q̂, k̂ and rstd of BLOCK positions. HEADS or KV_HEADS may be 0."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ALL: tl.constexpr = HEADS + KV_HEADS
    cosine = 1.0
    sine = 0.0
    if HALF > 0:
        cosine, sine = _tables(cosine_ptr, sine_ptr, position, positions, length, DIM, HALF)
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
    first_ptr,
    second_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    partial_ptr,
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
    first_stride_b,
    first_stride_t,
    first_stride_h,
    first_stride_d,
    second_stride_b,
    second_stride_t,
    second_stride_h,
    second_stride_d,
    dq_stride,
    dk_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    USES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes dq and dk of BLOCK positions, and a partial sum of dg over these positions.

    `partial` `(programs, HEADS)` holds the partial sums of all programs. Positions of dq and of dk are `dq_stride` and
    `dk_stride` apart. With USES, dv is `first`, or the sum of `first` and `second`, and its positions are as far apart
    as those of dk.
    """
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ALL: tl.constexpr = HEADS + KV_HEADS
    cosine = 1.0
    sine = 0.0
    if HALF > 0:
        cosine, sine = _tables(cosine_ptr, sine_ptr, position, positions, length, DIM, HALF)
    if HEADS > 0:
        gain = _gain(gain_ptr, q_hat_ptr.dtype.element_ty, floor, HEADS)
        along = _unrotate_heads(
            dq_hat_ptr, q_hat_ptr, dq_ptr, rstd_ptr, gain, cosine, sine, position, positions, length,
            q_stride_b, q_stride_t, q_stride_h, q_stride_d, dq_stride, HEADS, ALL, DIM, HALF,
        )  # fmt: skip
        head = tl.arange(0, triton.next_power_of_2(HEADS))
        tl.store(partial_ptr + tl.program_id(0) * HEADS + head, tl.sum(along, axis=0), mask=head < HEADS)
    if KV_HEADS > 0:
        one = tl.full((1, triton.next_power_of_2(KV_HEADS)), 1.0, tl.float32)
        _unrotate_heads(
            dk_hat_ptr, k_hat_ptr, dk_ptr, rstd_ptr + HEADS, one, cosine, sine, position, positions, length,
            k_stride_b, k_stride_t, k_stride_h, k_stride_d, dk_stride, KV_HEADS, ALL, DIM, HALF,
        )  # fmt: skip
        if USES > 0:
            head, batch, time, here = _indices_and_mask(position, positions, length, KV_HEADS)
            dim, _partner = _dims(DIM, HALF)
            inside = here[:, :, None] & (dim < DIM)
            dv = _load_heads(
                first_ptr, head, batch, time, dim, inside,
                first_stride_b, first_stride_t, first_stride_h, first_stride_d,
            )  # fmt: skip
            if USES == 2:
                dv += _load_heads(
                    second_ptr, head, batch, time, dim, inside,
                    second_stride_b, second_stride_t, second_stride_h, second_stride_d,
                )  # fmt: skip
            target = (dv_ptr + (position.to(tl.int64)[:, None] * dk_stride + head * DIM))[:, :, None]
            tl.store(target + dim, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def forward(
    q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, eps: float, *, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `golf::qk_norm_rope`: returns q̂, k̂ and, for `backward`, rstd `(B, T, H + H_kv)`.

    Args:
        q, k: `(B, T, H, D)` and `(B, T, H_kv, D)`, bfloat16, float16 or float32, with any strides.
        cosine, sine: `(T, 1, r/2)` in the dtype of q.
        gain: `(H,)`, float32 or the dtype of q.
        eps: epsilon of the norm.
        floor: smallest magnitude of a gain. With a smaller gain q̂ would lose its direction.
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
    """Implements `golf::qk_norm_rope_backward`: returns dq, dk and dgain. dgain is always summed in the same order."""
    dq, dk = q_hat.new_empty(q_hat.shape), k_hat.new_empty(k_hat.shape)
    dgain = _unrotate(dq_hat, dk_hat, [], q_hat, k_hat, cosine, sine, gain, rstd, (dq, dk, dk), floor)
    return dq, dk, dgain


def joint_backward(
    dq_hat: Tensor,
    dk_hat: Tensor,
    dvs: Sequence[Tensor],
    q_hat: Tensor,
    k_hat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    rstd: Tensor,
    *,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Implements `golf::qkv_norm_rope_backward`: returns dqkv `(B, T, (H + 2 H_kv) · D)` and dgain.

    `dvs` has one or two gradients of the values, `(B, T, H_kv, D)`. They and the other gradients may have any strides.
    """
    (batch, length, heads, dim), kv_heads = q_hat.shape, k_hat.shape[2]
    joint = q_hat.new_empty((batch, length, heads + 2 * kv_heads, dim))
    parts = joint.split([heads, kv_heads, kv_heads], dim=2)
    return joint.flatten(2), _unrotate(dq_hat, dk_hat, dvs, q_hat, k_hat, cosine, sine, gain, rstd, parts, floor)


def _unrotate(
    dq_hat: Tensor,
    dk_hat: Tensor,
    dvs: Sequence[Tensor],
    q_hat: Tensor,
    k_hat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    rstd: Tensor,
    results: Sequence[Tensor],
    floor: float,
) -> Tensor:
    """Writes dq, dk and, with `dvs`, dv into `results`, whose positions are evenly spaced. Returns dgain."""
    if not rstd.numel():
        return torch.zeros_like(gain)
    q_hat, k_hat, rstd = q_hat.contiguous(), k_hat.contiguous(), rstd.contiguous()
    block, warps = _blocks(q_hat, k_hat)
    positions, length = q_hat.shape[0] * q_hat.shape[1], q_hat.shape[1]
    programs = triton.cdiv(positions, block)
    partial = rstd.new_empty((programs, q_hat.shape[2]))
    tables = (cosine.contiguous(), sine.contiguous(), gain.contiguous())
    # a kernel without values gets another tensor in their place
    first, second = (*dvs, dk_hat, dk_hat)[:2]
    with torch.cuda.device_of(q_hat):
        unrotate_kernel[(programs,)](
            dq_hat, dk_hat, q_hat, k_hat, *tables, rstd, first, second, *results, partial, positions, length, floor,
            *dq_hat.stride(), *dk_hat.stride(), *first.stride(), *second.stride(),
            results[0].stride(1), results[1].stride(1),
            **_sizes(q_hat, k_hat, cosine), USES=len(dvs), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return partial.sum(dim=0).to(gain.dtype)


def _sizes(q: Tensor, k: Tensor, cosine: Tensor) -> dict[str, int]:
    return {"HEADS": q.shape[2], "KV_HEADS": k.shape[2], "DIM": q.shape[3], "HALF": cosine.shape[2]}


def _blocks(q: Tensor, k: Tensor) -> tuple[int, int]:
    return choose_block(max(q.shape[2], k.shape[2]), q.shape[3])


def choose_block(heads: int, dim: int) -> tuple[int, int]:
    """Returns a program's positions and warps, so that a thread has 16 elements of a tensor, padding included."""
    numbers = triton.next_power_of_2(heads) * triton.next_power_of_2(dim)
    return max(1, 2048 // numbers), max(4, numbers // 512)

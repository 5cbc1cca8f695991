"""Triton kernels of the residual mix and its norm. Each kernel reads x and x0 once.

    mix      h = m₀ ⊙ x + m₁ ⊙ x0 and n = gain · rms(h)
    unmix    dx, dx0 and each program's partial sums of dm₀ and dm₁, from dh, dn, x and x0

A program holds whole rows, because the norm needs them. A program of `unmix` takes `PARTIAL_ROWS` rows, a few at a
time, and keeps their partial sums in registers. The partial sums are always added in the same order.
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIAL_ROWS = 64
"""Rows per partial sum of dm. 98,304 rows give 1,536 partial sums, 1 % of the bytes that `unmix` reads and writes."""


@triton.jit
def _load(address, row, column, rows, length, stride_b, stride_t, stride_d, WIDTH: tl.constexpr):
    offset = (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_t
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    # 64 bits, because a column times its stride may exceed 2³¹
    places = offset[:, None] + (column.to(tl.int64) * stride_d)[None, :]
    return tl.load(address + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(address, value, row, column, rows, WIDTH: tl.constexpr):
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    places = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(address + places, value.to(address.dtype.element_ty), mask=inside)


@triton.jit
def _mix(mix_ptr, column, dtype: tl.constexpr, WIDTH: tl.constexpr):
    inside = column < WIDTH
    first = tl.load(mix_ptr + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
    second = tl.load(mix_ptr + WIDTH + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _rstd(h, row, rows, eps, WIDTH: tl.constexpr):
    mean_square = tl.sum(h * h, axis=1) / WIDTH
    # rows beyond the last are 0, and rsqrt(0) would be infinite if eps is 0
    return tl.rsqrt(tl.where(row < rows, mean_square + eps, 1.0))


@triton.jit
def mix_kernel(
    x_ptr,
    x0_ptr,
    mix_ptr,
    h_ptr,
    n_ptr,
    rows,
    length,
    eps,
    gain,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    x0_stride_b,
    x0_stride_t,
    x0_stride_d,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes h and n of BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    m0, m1 = _mix(mix_ptr, column, x_ptr.dtype.element_ty, WIDTH)
    h = m0 * _load(x_ptr, row, column, rows, length, x_stride_b, x_stride_t, x_stride_d, WIDTH)
    h += m1 * _load(x0_ptr, row, column, rows, length, x0_stride_b, x0_stride_t, x0_stride_d, WIDTH)
    factor = gain * _rstd(h, row, rows, eps, WIDTH)
    _store(h_ptr, h, row, column, rows, WIDTH)
    _store(n_ptr, h * factor[:, None], row, column, rows, WIDTH)


@triton.jit
def unmix_kernel(
    dh_ptr,
    dn_ptr,
    x_ptr,
    x0_ptr,
    mix_ptr,
    dx_ptr,
    dx0_ptr,
    partial_ptr,
    rows,
    length,
    eps,
    gain,
    dh_stride_b,
    dh_stride_t,
    dh_stride_d,
    dn_stride_b,
    dn_stride_t,
    dn_stride_d,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    x0_stride_b,
    x0_stride_t,
    x0_stride_d,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Computes dx and dx0 of PARTIAL rows, and a partial sum of dm over these rows.

    `partial` `(programs, 2, WIDTH)` holds the partial sums of all programs.
    """
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    m0, m1 = _mix(mix_ptr, column, x_ptr.dtype.element_ty, WIDTH)
    dm0 = tl.zeros((BLOCK, column.shape[0]), tl.float32)
    dm1 = tl.zeros((BLOCK, column.shape[0]), tl.float32)
    # num_stages: the next rows are loaded while these rows are computed
    for first in tl.range(0, PARTIAL, BLOCK, num_stages=3):
        row = tl.program_id(0) * PARTIAL + first + tl.arange(0, BLOCK)
        x = _load(x_ptr, row, column, rows, length, x_stride_b, x_stride_t, x_stride_d, WIDTH)
        x0 = _load(x0_ptr, row, column, rows, length, x0_stride_b, x0_stride_t, x0_stride_d, WIDTH)
        dn = _load(dn_ptr, row, column, rows, length, dn_stride_b, dn_stride_t, dn_stride_d, WIDTH)
        dh = _load(dh_ptr, row, column, rows, length, dh_stride_b, dh_stride_t, dh_stride_d, WIDTH)
        h = m0 * x + m1 * x0
        rstd = _rstd(h, row, rows, eps, WIDTH)
        along = rstd * rstd * (tl.sum(dn * h, axis=1) / WIDTH)
        total = dh + (gain * rstd)[:, None] * (dn - h * along[:, None])
        _store(dx_ptr, m0 * total, row, column, rows, WIDTH)
        _store(dx0_ptr, m1 * total, row, column, rows, WIDTH)
        dm0 += total * x
        dm1 += total * x0
    place = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
    tl.store(place, tl.sum(dm0, axis=0), mask=column < WIDTH)
    tl.store(place + WIDTH, tl.sum(dm1, axis=0), mask=column < WIDTH)


def forward(x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """Implements `golf::mix_rms_norm`: returns h and n.

    Args:
        x, x0: `(B, T, d)`, bfloat16, float16 or float32, with any strides.
        mix: `(2, d)`, float32 or the dtype of x.
        eps: epsilon of the norm.
        gain: factor on n.
    """
    h, n = x.new_empty(x.shape), x.new_empty(x.shape)
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    if rows:
        block, warps = choose_block(width, 2048)
        with torch.cuda.device_of(x):
            mix_kernel[(triton.cdiv(rows, block),)](
                x, x0, mix.contiguous(), h, n, rows, x.shape[1], eps, gain, *x.stride(), *x0.stride(),
                WIDTH=width, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return h, n


def backward(
    dh: Tensor, dn: Tensor, x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `golf::mix_rms_norm_backward`: returns dx, dx0 and dmix."""
    dx, dx0 = x.new_empty(x.shape), x.new_empty(x.shape)
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    if not rows:
        return dx, dx0, torch.zeros_like(mix)
    block, warps = choose_block(width, 1024)
    programs = triton.cdiv(rows, PARTIAL_ROWS)
    partial = x.new_empty((programs, 2, width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        unmix_kernel[(programs,)](
            dh, dn, x, x0, mix.contiguous(), dx, dx0, partial, rows, x.shape[1], eps, gain,
            *dh.stride(), *dn.stride(), *x.stride(), *x0.stride(),
            WIDTH=width, BLOCK=block, PARTIAL=PARTIAL_ROWS, num_warps=warps,
        )  # fmt: skip
    return dx, dx0, partial.sum(dim=0).to(mix.dtype)


def choose_block(width: int, numbers: int) -> tuple[int, int]:
    """Returns the rows that a program takes at a time, and its number of warps.

    A program should hold `numbers` elements of each tensor in registers, padding included.
    """
    padded = triton.next_power_of_2(width)
    return min(max(1, numbers // padded), PARTIAL_ROWS), max(4, padded // 512)

"""Triton kernels for the parts of a Muon step before and after Newton-Schulz. Each launch takes all matrices.

    momentum  m ← β·m + g (dampened: m + (1 − β)·(g − m)); u = m or the Nesterov direction, with or without normalized
              rows; stores u as X in the workspace of newton_schulz_triton.py, with the largest entry and the sum of
              squares of each block of rows
    moments   NorMuon: s ← β₂·s + (1 − β₂)·mean_row(X²); stores each block's sums of X² and of (X / (√s + 1e-10))²
    apply     w ← w·(1 − lr·weight_decay) − lr·ratio·X; with NorMuon, first divides the rows of X by √s + 1e-10 and
              rescales X to its former norm

The kernels read β and lr from device memory, so that replays of a CUDA graph can use new values.
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from golf_kernels.newton_schulz_triton import CHUNK, LAYOUT, add_squares, on_device, pointer_to, reciprocal_power

OPTIONS = {"num_warps": 8}
# number of addresses per matrix: gradient, momentum, weight, second moment
ADDRESSES = tl.constexpr(4)
# added to the divisors of NorMuon
TINY = tl.constexpr(1e-10)


@triton.jit
def momentum_kernel(
    addresses_ptr, layout_ptr, blocks_ptr, x_ptr, stats_ptr, beta_ptr, row_eps, nesterov, dampened,
    ROW_NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    matrix = tl.load(blocks_ptr + 3 * block)
    at = tl.load(blocks_ptr + 3 * block + 1) + tl.arange(0, ROWS)[:, None]
    layout = layout_ptr + matrix * LAYOUT
    rows, columns = tl.load(layout), tl.load(layout + 1)
    ld, start = tl.multiple_of(tl.load(layout + 2), 16), tl.multiple_of(tl.load(layout + 3), 16)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    gradients = pointer_to(tl.load(addresses_ptr + matrix * ADDRESSES), tl.float32, ALIGNED)
    momenta = pointer_to(tl.load(addresses_ptr + matrix * ADDRESSES + 1), tl.float32, ALIGNED)
    beta = tl.load(beta_ptr)
    # nesterov and dampened are 0 or 1: m ← β·m + take·g, u = look·g + keep·m
    take = 1 - dampened * beta
    look, keep = nesterov * take, 1 - nesterov * (1 - beta)
    factor = tl.full((ROWS, 1), 1.0, dtype=tl.float32)
    if ROW_NORMALIZE:
        peaks = tl.zeros((ROWS,), dtype=tl.float32)
        sums = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, ld, CHUNK):
            column = first + tl.arange(0, CHUNK)[None, :]
            inside = (at < rows) & (column < columns)
            gradient = tl.load(gradients + at * columns + column, mask=inside, other=0.0)
            momentum = tl.load(momenta + at * columns + column, mask=inside, other=0.0)
            value = look * gradient + keep * (beta * momentum + take * gradient)
            peaks, sums = add_squares(peaks, sums, value, 1)
        # rows with large entries stay divided by a power of two, because their squares would overflow float32
        unit = reciprocal_power(peaks)
        scale = tl.minimum(unit, 1.0)
        sums = sums * (scale / unit) * (scale / unit) + row_eps * scale * scale
        factor = (scale * tl.rsqrt(sums))[:, None]
    largest = 0.0
    squares = 0.0
    for first in range(0, ld, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        inside = (at < rows) & (column < columns)
        gradient = tl.load(gradients + at * columns + column, mask=inside, other=0.0)
        momentum = tl.load(momenta + at * columns + column, mask=inside, other=0.0)
        momentum = beta * momentum + take * gradient
        tl.store(momenta + at * columns + column, momentum, mask=inside)
        value = (look * gradient + keep * momentum) * factor
        # the padding must stay 0, but the factor of a row of zeros is infinite if row_eps is 0
        value = tl.where(inside, value, 0.0)
        largest, squares = add_squares(largest, squares, value)
        tl.store(x_ptr + start + at * ld + column, value.to(x_ptr.dtype.element_ty), mask=column < ld)
    tl.store(stats_ptr + 2 * block, largest)
    tl.store(stats_ptr + 2 * block + 1, squares)


@triton.jit
def moments_kernel(
    addresses_ptr, layout_ptr, blocks_ptr, x_ptr, stats_ptr, factors_ptr, beta2,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    matrix = tl.load(blocks_ptr + 3 * block)
    within = tl.arange(0, ROWS)
    at = tl.load(blocks_ptr + 3 * block + 1) + within
    layout = layout_ptr + matrix * LAYOUT
    rows, columns = tl.load(layout), tl.load(layout + 1)
    ld, start = tl.multiple_of(tl.load(layout + 2), 16), tl.multiple_of(tl.load(layout + 3), 16)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, ld, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        # no mask for rows and columns: the padding is zero
        value = tl.load(x_ptr + start + at[:, None] * ld + column, mask=column < ld, other=0.0).to(tl.float32)
        sums += tl.sum(value * value, axis=1)
    moments = pointer_to(tl.load(addresses_ptr + matrix * ADDRESSES + 3), tl.float32, False) + at
    moment = tl.load(moments, mask=at < rows, other=0.0)
    moment = moment + (1 - beta2) * (sums / columns.to(tl.float32) - moment)
    tl.store(moments, moment, mask=at < rows)
    factor = 1.0 / (tl.sqrt(moment) + TINY)
    tl.store(factors_ptr + block * ROWS + within, factor)
    tl.store(stats_ptr + 2 * block, tl.sum(sums))
    tl.store(stats_ptr + 2 * block + 1, tl.sum(tl.where(at < rows, sums * factor * factor, 0.0)))


@triton.jit
def apply_kernel(
    addresses_ptr, layout_ptr, blocks_ptr, x_ptr, stats_ptr, factors_ptr, ratios_ptr, lr_ptr, weight_decay,
    NORMUON: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    matrix = tl.load(blocks_ptr + 3 * block)
    within = tl.arange(0, ROWS)[:, None]
    at = tl.load(blocks_ptr + 3 * block + 1) + within
    layout = layout_ptr + matrix * LAYOUT
    rows, columns = tl.load(layout), tl.load(layout + 1)
    ld, start = tl.multiple_of(tl.load(layout + 2), 16), tl.multiple_of(tl.load(layout + 3), 16)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    weights = pointer_to(tl.load(addresses_ptr + matrix * ADDRESSES + 2), tl.float32, ALIGNED)
    lr = tl.load(lr_ptr)
    rate = lr * tl.load(ratios_ptr + matrix)
    factor = tl.full((ROWS, 1), 1.0, dtype=tl.float32)
    if NORMUON:
        first_block, count = tl.load(layout + 4), tl.load(layout + 5)
        before = 0.0
        after = 0.0
        for first in range(0, count, CHUNK):
            index = first + tl.arange(0, CHUNK)
            before += tl.sum(tl.load(stats_ptr + 2 * (first_block + index), mask=index < count, other=0.0))
            after += tl.sum(tl.load(stats_ptr + 2 * (first_block + index) + 1, mask=index < count, other=0.0))
        factor = tl.load(factors_ptr + block * ROWS + within) * (tl.sqrt(before) / (tl.sqrt(after) + TINY))
    for first in range(0, ld, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        inside = (at < rows) & (column < columns)
        value = tl.load(x_ptr + start + at * ld + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + at * columns + column, mask=inside, other=0.0)
        weight = weight * (1 - lr * weight_decay) - rate * factor * value
        tl.store(weights + at * columns + column, weight, mask=inside)


@functools.lru_cache(maxsize=32)
def ratio_table(ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns each matrix's factor on the learning rate as a tensor on the device. Only the first call copies it."""
    return on_device(torch.tensor(ratios, dtype=torch.float32), device)


def momentum(
    plan: Any,
    x: Tensor,
    stats: Tensor,
    addresses: Tensor,
    rows: int,
    *,
    beta: Tensor,
    row_eps: float | None,
    nesterov: bool,
    dampened: bool,
    aligned: bool,
) -> None:
    """Updates every momentum and writes every update direction to the workspace.

    Args:
        plan: result of `newton_schulz_triton.make_plan` for these shapes.
        x: workspace for the directions.
        stats: float32, two numbers per block of the plan: receives the block's largest entry and sum of squares.
        addresses: `(matrices, 4)` int64: addresses of gradient, momentum, weight and second moment of each matrix, all
            contiguous float32. Without NorMuon the second moment is not read.
        rows: number of rows in a block.
        beta: scalar float32 on the device.
        row_eps: number added to a row's squared length; None: rows are not normalized.
        nesterov: whether to take the Nesterov direction instead of u = m.
        dampened: whether to take the dampened momentum formula in the module's docstring.
        aligned: whether all addresses are multiples of 16 and all numbers of columns are multiples of 8.
    """
    momentum_kernel[(len(plan.blocks),)](
        addresses, plan.layout, plan.blocks, x, stats, beta, row_eps or 0.0, float(nesterov),
        float(dampened), ROW_NORMALIZE=row_eps is not None, ALIGNED=aligned, ROWS=rows, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip


def apply(
    plan: Any,
    x: Tensor,
    stats: Tensor,
    addresses: Tensor,
    rows: int,
    *,
    lr: Tensor,
    ratios: Tensor,
    weight_decay: float,
    beta2: float | None,
    aligned: bool,
) -> None:
    """Updates every weight, and NorMuon's second moments, from the orthogonalized directions in the workspace.

    Args:
        plan, x, stats, addresses, rows, aligned: see `momentum`.
        lr: learning rate, scalar float32 on the device.
        ratios: `(matrices,)` float32 on the device: factor on the learning rate of each matrix.
        weight_decay: decoupled weight decay: w ← w·(1 − lr·weight_decay).
        beta2: decay of NorMuon's second moments; None: no NorMuon.
    """
    grid = (len(plan.blocks),)
    factors = torch.empty(len(plan.blocks) * rows if beta2 is not None else 0, dtype=torch.float32, device=x.device)
    if beta2 is not None:
        moments_kernel[grid](
            addresses, plan.layout, plan.blocks, x, stats, factors, beta2, ROWS=rows, CHUNK=CHUNK, **OPTIONS
        )
    apply_kernel[grid](
        addresses, plan.layout, plan.blocks, x, stats, factors, ratios, lr, weight_decay,
        NORMUON=beta2 is not None, ALIGNED=aligned, ROWS=rows, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip

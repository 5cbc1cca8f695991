"""Triton kernels of the softcapped head: one replaces logits by their gradients, one needs no logits in memory.

    loss_and_gradient   a program holds a row in registers: it reads the logits once and overwrites them with d logits
    row_nll             a program computes the logits of a tile of rows, some columns at a time, and keeps only a running
                        logsumexp and the target's logit

Both compute tanh(x) as 1 − 2s with s = 1 / (1 + e^2x), and its derivative as 4s(1 − s).
"""

# triton gives the arguments of a kernel their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# a power of 2 is one instruction, a power of e five
LOG2_E = tl.constexpr(math.log2(math.e))
MAX_VOCABULARY = 8192
"""Longest row that a program of `loss_and_gradient` can hold."""


@triton.jit
def _folded_tanh(x, softcap):
    # the square of rsqrt is two instructions, a quotient eight; an infinite power gives 0, which is right
    root = tl.rsqrt(1.0 + tl.exp2(x * (2.0 * LOG2_E / softcap)))
    return root * root


@triton.jit
def _round_to_bf16(x):
    # to nearest even, in integers, because the interpreter's conversion truncates
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def loss_and_gradient_kernel(
    logits_ptr,
    targets_ptr,
    scale_ptr,
    loss_ptr,
    vocabulary,
    softcap,
    z_loss,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    """Loss of one row, times scale; overwrites its logits `(rows, vocabulary)` with d logits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < vocabulary
    address = logits_ptr + row * vocabulary + column
    target = tl.load(targets_ptr + row)
    scale = tl.load(scale_ptr)
    # read before the row's maximum and sum, after which other threads may have overwritten it
    known = (target >= 0) & (target < vocabulary)
    hit = tl.load(logits_ptr + row * vocabulary + target, mask=known, other=0.0).to(tl.float32)
    picked = softcap - 2.0 * softcap * _folded_tanh(hit, softcap)
    folded = _folded_tanh(tl.load(address, mask=inside, other=0.0).to(tl.float32), softcap)
    z = tl.where(inside, softcap - 2.0 * softcap * folded, float("-inf"))
    top = tl.max(z, axis=0)
    weight = tl.exp2(z * LOG2_E - top * LOG2_E)
    total = tl.sum(weight, axis=0)
    lse = top + tl.log(total)
    # where, not a product: an ignored row may hold NaN
    kept = target != ignore_index
    tl.store(loss_ptr + row, tl.where(kept, scale * (lse - picked + z_loss * lse * lse), 0.0))
    steep = 4.0 * scale
    gradient = weight * (steep * (1.0 + 2.0 * z_loss * lse) / total) - tl.where(column == target, steep, 0.0)
    gradient *= folded - folded * folded
    tl.store(address, tl.where(kept, gradient, 0.0).to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_nll_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    lse_ptr,
    picked_ptr,
    rows,
    width,
    vocabulary,
    span,
    softcap,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logsumexp of BLOCK_M rows over `span` columns, and the target's logit if it is among them, otherwise 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets_ptr + row, mask=row < rows, other=-1)
    # rows and columns beyond the ends read the last one, and are not stored: masks would cost registers
    hidden_rows = hidden_ptr + tl.minimum(row, rows - 1)[:, None] * width
    first = tl.program_id(1) * span
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, tl.minimum(first + span, vocabulary), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        weight_rows = weight_ptr + tl.minimum(column, vocabulary - 1)[:, None].to(tl.int64) * width
        logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            depth = (k + tl.arange(0, BLOCK_K))[None, :]
            hidden = tl.load(hidden_rows + depth, mask=depth < width, other=0.0)
            weight = tl.load(weight_rows + depth, mask=depth < width, other=0.0)
            logits = tl.dot(hidden, weight.T, logits, input_precision="ieee")
        if ROUND:
            logits = _round_to_bf16(logits)
        z = softcap - 2.0 * softcap * _folded_tanh(logits, softcap)
        z = tl.where((column < vocabulary)[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        total *= tl.exp2((top - higher) * LOG2_E)
        total += tl.sum(tl.exp2(z * LOG2_E - (higher * LOG2_E)[:, None]), axis=1)
        picked += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)
        top = higher
    part = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(lse_ptr + part, top + tl.log(total), mask=row < rows)
    tl.store(picked_ptr + part, picked, mask=row < rows)


ROW_BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
# two programs on an SM: one multiplies while the other computes exponentials
ROW_OPTIONS = {"num_warps": 8, "num_stages": 5, "maxnreg": 128}


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    loss: Tensor,
    softcap: float,
    z_loss: float,
    ignore_index: int,
) -> None:
    """Replaces logits by the gradients of `scale` · loss, in place; see `golf::softcapped_cross_entropy`.

    Args:
        logits: `(rows, V)` contiguous, bfloat16, float16 or float32, V at most `MAX_VOCABULARY`; overwritten.
        targets: `(rows,)` contiguous, int32 or int64.
        scale: scalar float32 on the device.
        loss: `(rows,)` contiguous float32; overwritten by each row's loss times `scale`, 0 for an ignored row.
        softcap: cap of the logits.
        z_loss: weight of logsumexp².
        ignore_index: target of ignored rows.
    """
    rows, vocabulary = logits.shape
    if not rows:
        return
    block = _row_block(vocabulary)
    with torch.cuda.device_of(logits):
        loss_and_gradient_kernel[(rows,)](
            logits, targets, scale, loss, vocabulary, softcap, z_loss, ignore_index, BLOCK_V=block, **_row_options(block)
        )  # fmt: skip


def row_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, round_to_bf16: bool
) -> tuple[Tensor, Tensor]:
    """Logsumexp and target logit of every row; their difference is `golf::window_nll`.

    Args:
        hidden: `(M, d)`, bfloat16, float16 or float32.
        weight: `(V, d)`, the dtype of `hidden`.
        targets: `(M,)`, int32 or int64; a target outside [0, V) has logit 0.
        softcap: cap of the logits.
        round_to_bf16: round the logits to bfloat16 first.

    Returns:
        Two times `(M,)` float32.
    """
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    tiles = triton.cdiv(rows, ROW_BLOCKS["BLOCK_M"])
    # one SM in the interpreter, so that it splits a short vocabulary
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 1
    span = column_span(tiles, vocabulary, 2 * processors)
    parts = triton.cdiv(vocabulary, span)
    lse = torch.empty((parts, rows), dtype=torch.float32, device=hidden.device)
    picked = torch.empty_like(lse)
    if rows:
        with torch.cuda.device_of(hidden):
            row_nll_kernel[(tiles, parts)](
                hidden, weight, targets, lse, picked, rows, width, vocabulary, span, softcap,
                ROUND=round_to_bf16, **ROW_BLOCKS, **ROW_OPTIONS,
            )  # fmt: skip
    return torch.logsumexp(lse, 0), picked.sum(0)


def column_span(row_tiles: int, vocabulary: int, programs: int) -> int:
    """Columns of a program, in whole tiles: fewer where rows are few, so that there are about `programs` programs."""
    tiles = triton.cdiv(vocabulary, ROW_BLOCKS["BLOCK_N"])
    parts = min(max(programs // max(row_tiles, 1), 1), tiles)
    return int(triton.cdiv(tiles, parts) * ROW_BLOCKS["BLOCK_N"])


def _row_block(vocabulary: int) -> int:
    return max(1024, int(triton.next_power_of_2(vocabulary)))


def _row_options(block: int) -> dict[str, int]:
    # 32 columns per thread, and at least two rows on an SM: one is read while another is computed
    return {"num_warps": block // 1024, "maxnreg": 128}

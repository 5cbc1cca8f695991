"""Triton kernels of the output head with softcapped logits.

    loss_and_gradient   a program reads one row of logits into registers and overwrites the row with its gradient
    row_nll             a program computes the logits of a block of rows, some columns at a time, and keeps only a
                        running logsumexp and the target's logit

Both kernels compute tanh(x) as 1 − 2s with s = 1 / (1 + e^2x), and its derivative as 4s(1 − s).
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# kernels use powers of 2, which take one instruction; a power of e takes five
LOG2_E = tl.constexpr(math.log2(math.e))
MAX_VOCABULARY = 8192
"""Largest vocabulary that `loss_and_gradient` takes, because a program holds a whole row of logits."""


@triton.jit
def _folded_tanh(x, softcap):
    # s is the square of rsqrt, which takes two instructions; a quotient takes eight. If the power is infinite, s is
    # correctly 0
    root = tl.rsqrt(1.0 + tl.exp2(x * (2.0 * LOG2_E / softcap)))
    return root * root


@triton.jit
def _round_to_bf16(x):
    # rounds to nearest even with integers, because the interpreter's conversion truncates
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
    """Computes the loss of one row, times scale, and overwrites the row of logits with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < vocabulary
    address = logits_ptr + row * vocabulary + column
    target = tl.load(targets_ptr + row)
    scale = tl.load(scale_ptr)
    # the target's logit is read before the reductions; after them, another thread may have overwritten it
    known = (target >= 0) & (target < vocabulary)
    hit = tl.load(logits_ptr + row * vocabulary + target, mask=known, other=0.0).to(tl.float32)
    picked = softcap - 2.0 * softcap * _folded_tanh(hit, softcap)
    folded = _folded_tanh(tl.load(address, mask=inside, other=0.0).to(tl.float32), softcap)
    z = tl.where(inside, softcap - 2.0 * softcap * folded, float("-inf"))
    top = tl.max(z, axis=0)
    weight = tl.exp2(z * LOG2_E - top * LOG2_E)
    total = tl.sum(weight, axis=0)
    lse = top + tl.log(total)
    # tl.where instead of a product with 0, because an ignored row may hold NaN
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
    """Computes the logsumexp of BLOCK_M rows over `span` columns, and the target's logit or, if it is elsewhere, 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets_ptr + row, mask=row < rows, other=-1)
    # rows and columns beyond the end read the last row or column and are not stored, because masks would cost registers
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
        if ROUND >= 1:
            logits = _round_to_bf16(logits)
        if ROUND == 3:
            tanh = 1.0 - 2.0 * _folded_tanh(_round_to_bf16(logits / softcap), 1.0)
            z = _round_to_bf16(softcap * _round_to_bf16(tanh))
        else:
            z = softcap - 2.0 * softcap * _folded_tanh(logits, softcap)
        if ROUND == 2:
            z = _round_to_bf16(z)
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
ROW_OPTIONS = {"num_warps": 8, "num_stages": 5}
# two programs fit on an SM: one multiplies while the other computes exponentials
TWO_PROGRAMS = {**ROW_OPTIONS, "maxnreg": 128}


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    loss: Tensor,
    softcap: float,
    z_loss: float,
    ignore_index: int,
) -> None:
    """Overwrites logits with the gradients of `scale` · loss; see `golf::softcapped_cross_entropy`.

    Args:
        logits: `(rows, V)` contiguous, bfloat16, float16 or float32, V at most `MAX_VOCABULARY`; overwritten.
        targets: `(rows,)` contiguous, int32 or int64.
        scale: scalar float32 on the device.
        loss: `(rows,)` contiguous float32; receives each row's loss times `scale`, 0 for an ignored row.
        softcap: bound on the magnitude of the logits.
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


def row_nll(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, rounding: int) -> tuple[Tensor, Tensor]:
    """Returns the logsumexp and the target's logit of every row. Their difference is the result of `golf::window_nll`.

    Args:
        hidden: `(M, d)`, bfloat16, float16 or float32.
        weight: `(V, d)` in the dtype of `hidden`.
        targets: `(M,)`, int32 or int64. The logit of a target outside [0, V) is 0.
        softcap: bound on the magnitude of the logits.
        rounding: index in `LOGITS_ROUNDINGS` of window_nll.py; 0 keeps the logits in float32.

    Returns:
        Two tensors `(M,)` float32.
    """
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    tiles = triton.cdiv(rows, ROW_BLOCKS["BLOCK_M"])
    # the interpreter counts as one SM, so that two programs divide the vocabulary of a single block of rows
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 1
    span = column_span(tiles, vocabulary, 2 * processors)
    parts = triton.cdiv(vocabulary, span)
    lse = torch.empty((parts, rows), dtype=torch.float32, device=hidden.device)
    picked = torch.empty_like(lse)
    if rows:
        with torch.cuda.device_of(hidden):
            # other tensor cores than Hopper's need more registers, for operands
            other = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9
            options = ROW_OPTIONS if other else TWO_PROGRAMS
            row_nll_kernel[(tiles, parts)](
                hidden, weight, targets, lse, picked, rows, width, vocabulary, span, softcap,
                ROUND=rounding, **ROW_BLOCKS, **options,
            )  # fmt: skip
    return torch.logsumexp(lse, 0), picked.sum(0)


def column_span(row_tiles: int, vocabulary: int, programs: int) -> int:
    """Returns how many columns a program takes: whole tiles, so that about `programs` programs cover all rows."""
    tiles = triton.cdiv(vocabulary, ROW_BLOCKS["BLOCK_N"])
    parts = min(max(programs // max(row_tiles, 1), 1), tiles)
    return int(triton.cdiv(tiles, parts) * ROW_BLOCKS["BLOCK_N"])


def _row_block(vocabulary: int) -> int:
    return max(1024, int(triton.next_power_of_2(vocabulary)))


def _row_options(block: int) -> dict[str, int]:
    # 32 columns per thread; an SM holds at least two rows, so that it reads one while it computes another
    return {"num_warps": block // 1024, "maxnreg": 128}

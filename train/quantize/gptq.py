"""GPTQ: rounding column by column, each column's error pushed onto the columns not yet rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from golf_kernels.gptq_block import gptq_block
from train.quantize.row_scales import largest_code, rtn

__all__ = ["DAMPING_STEPS", "GPTQResult", "gptq", "rtn"]

DAMPING_STEPS = (1.0, 10.0, 100.0)
"""Factors on the damping that are tried in turn until the Cholesky factorization succeeds."""

# what 10 and 100 multiply when the damping asked for is smaller, or none
_LEAST_RAISED_DAMPING = 0.001


class GPTQResult(NamedTuple):
    """Codes, and what it took to get them.

    Attributes:
        codes: `(..., rows, columns)` int8.
        damping: for each matrix of the batch in order the damping that was used, as a fraction of the mean diagonal;
            None where no damping made the Hessian factorizable and the matrix was rounded to nearest.
    """

    codes: Tensor
    damping: list[float | None]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    bits: int,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
) -> GPTQResult:
    """Round a matrix so that its product with typical inputs changes least.

    With U the upper Cholesky factor of (H + damp · mean(diag H) · I)⁻¹, for columns j in order of falling H_jj:
    q_j = round(clamp(w_j / s)), e = (w_j − q_j s) / U_jj, w_k ← w_k − e U_jk for all k > j. Columns whose input was
    always zero (H_jj = 0) get code 0. Errors go to the columns of the same block one by one, in
    `golf_kernels.gptq_block`, and to all later ones in one product per block, which is the same sum. Matrices of one
    shape may be given as a batch.

    On one machine the codes have the same bits whichever back end runs the blocks. Between a CPU and a GPU
    factorization and products round differently, and a weight that falls on the other side of a half changes what comes
    after it in its row.

    Args:
        weight: `(..., rows, columns)`, float32 or float64; the dtype of the arithmetic.
        hessian: `(..., columns, columns)`, Σ x xᵀ of the inputs, times any constant.
        scales: `(..., rows)`, positive.
        bits: bits of the codes, 2 to 8.
        damp: damping, as a fraction of the mean diagonal. Where the factorization fails, 10 and 100 times as much is
            tried (of 0.001 at least), then the matrix is rounded to nearest; the result says which it was.
        block_size: columns per block; up to 128 are rounded natively.
        act_order: order the columns by falling diagonal (stable), not as they lie.

    Returns:
        Codes and the damping of each matrix.

    Raises:
        ValueError: shapes do not belong together, or a scale is not positive.

    Source: Frantar et al., arXiv:2210.17323; act-order and SDClip scales as in #1394 and #1471.
    """
    rows, columns = weight.shape[-2:]
    batch = weight.shape[:-2]
    if hessian.shape != (*batch, columns, columns) or scales.shape != (*batch, rows):
        raise ValueError(
            f"weight {tuple(weight.shape)} needs a Hessian {(*batch, columns, columns)} and scales {(*batch, rows)}, "
            f"got {tuple(hessian.shape)} and {tuple(scales.shape)}"
        )
    if not bool((scales > 0).all()):
        raise ValueError("scales must be positive")
    flat = weight.reshape(-1, rows, columns)
    steps = scales.reshape(-1, rows).to(weight.dtype)
    curvature = hessian.reshape(-1, columns, columns).to(weight.dtype, copy=True)
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)

    order = torch.arange(columns, device=weight.device).expand(len(flat), columns)
    if act_order:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        curvature = curvature.gather(1, order[:, :, None].expand_as(curvature))
        curvature = curvature.gather(2, order[:, None, :].expand_as(curvature))
    factor, damping = _inverse_factor(curvature, damp)

    # columns become rows, so that each step works on contiguous memory
    work = flat.masked_fill(dead[:, None, :], 0).mT.gather(1, order[:, :, None].expand(-1, -1, rows))
    ordered = _round_columns(work, factor, steps, largest_code(bits), block_size)
    codes = torch.empty_like(ordered).scatter_(1, order[:, :, None].expand_as(ordered), ordered).mT.contiguous()
    for index, used in enumerate(damping):
        if used is None:
            codes[index] = rtn(flat[index], steps[index], bits)
    return GPTQResult(codes.reshape(weight.shape), damping)


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, list[float | None]]:
    """Upper Cholesky factors U of the inverses of damped Hessians `(batch, n, n)`, UᵀU = H⁻¹; identity on failure."""
    # reversed in both dimensions, H = L Lᵀ has U = L⁻¹: one factorization and no explicit inverse
    reversed_hessian = hessian.flip(1, 2)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
    identity = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    factor = identity.repeat(len(hessian), 1, 1)
    damping: list[float | None] = [None] * len(hessian)
    pending = torch.arange(len(hessian), device=hessian.device)
    for step in DAMPING_STEPS:
        fraction = damp if step == 1 else step * max(damp, _LEAST_RAISED_DAMPING)
        lower, failed = torch.linalg.cholesky_ex(
            reversed_hessian[pending] + fraction * mean[pending, None, None] * identity
        )
        done = failed == 0
        solved = torch.linalg.solve_triangular(lower[done], identity, upper=False).flip(1, 2)
        factor[pending[done]] = solved
        for index in pending[done].tolist():
            damping[index] = fraction
        pending = pending[~done]
        if not len(pending):
            break
    return factor, damping


def _round_columns(work: Tensor, factor: Tensor, scales: Tensor, limit: int, block_size: int) -> Tensor:
    """The column loop on transposed matrices `(batch, columns, rows)`, which it overwrites; returns int8 codes of that shape."""
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = factor[:, start:stop]
        codes[:, start:stop], errors = gptq_block(work[:, start:stop], block[:, :, start:stop], scales, limit)
        if stop < columns:
            work[:, stop:].baddbmm_(block[:, :, stop:].mT, errors, alpha=-1)
    return codes

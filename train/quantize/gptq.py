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

# 10 and 100 multiply at least this damping
_LEAST_RAISED_DAMPING = 0.001


class GPTQResult(NamedTuple):
    """Codes `(..., rows, columns)` int8, and the damping used for each matrix, as a fraction of its mean diagonal.

    Damping None: the factorization failed at every damping, and the matrix was rounded to nearest.
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
    """Round a matrix, or a batch of them, so that its product with typical inputs changes least.

    With U the upper Cholesky factor of (H + damp · mean(diag H) · I)⁻¹, for columns j in order of falling H_jj:
    q_j = round(clamp(w_j / s)), e = (w_j − q_j s) / U_jj, w_k ← w_k − e U_jk for all k > j. Columns whose input was
    always zero (H_jj = 0) get code 0. Inside a block `golf_kernels.gptq_block` updates column by column; all later columns
    are updated in one product per block, which is the same sum.

    On one machine every backend gives the same codes. A CPU and a GPU round factorization and products differently; if that
    rounds one weight to another code, the rest of its row changes too.

    Args:
        weight: `(..., rows, columns)`, float32 or float64; the dtype of the arithmetic.
        hessian: `(..., columns, columns)`, Σ x xᵀ of the inputs, times any constant.
        scales: `(..., rows)`, positive.
        bits: bits of the codes, 2 to 8.
        damp: damping, as a fraction of the mean diagonal. If the factorization fails, 10 and 100 times max(damp, 0.001)
            are tried, then the matrix is rounded to nearest.
        block_size: columns per block; a native kernel takes up to 128.
        act_order: round columns by falling diagonal (stable) instead of left to right.

    Raises:
        ValueError: shapes do not match, or a scale is not positive.

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

    # transposed, so that each column is contiguous
    work = flat.masked_fill(dead[:, None, :], 0).mT.gather(1, order[:, :, None].expand(-1, -1, rows))
    ordered = _round_columns(work, factor, steps, largest_code(bits), block_size)
    codes = torch.empty_like(ordered).scatter_(1, order[:, :, None].expand_as(ordered), ordered).mT.contiguous()
    for index, used in enumerate(damping):
        if used is None:
            codes[index] = rtn(flat[index], steps[index], bits)
    return GPTQResult(codes.reshape(weight.shape), damping)


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, list[float | None]]:
    """Upper Cholesky factors U of the inverses of damped Hessians `(batch, n, n)`, UᵀU = H⁻¹; identity on failure."""
    # flip H in both dimensions, factorize into L Lᵀ, flip L⁻¹: that is U, without an explicit inverse
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
    """The column loop: int8 codes `(batch, columns, rows)` of transposed matrices, which it overwrites."""
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = factor[:, start:stop]
        codes[:, start:stop], errors = gptq_block(work[:, start:stop], block[:, :, start:stop], scales, limit)
        if stop < columns:
            work[:, stop:].baddbmm_(block[:, :, stop:].mT, errors, alpha=-1)
    return codes

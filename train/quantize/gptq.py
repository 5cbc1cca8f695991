"""GPTQ: rounds a matrix column by column. The remaining columns compensate each column's rounding error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from golf_kernels.gptq_block import gptq_block
from train.quantize.row_scales import largest_code, rtn

DAMPING_STEPS = (1.0, 10.0, 100.0)
"""Factors on the damping. They are tried in this order until the Cholesky factorization succeeds."""

# smallest damping that the factors 10 and 100 multiply
_LEAST_RAISED_DAMPING = 0.001


class GPTQResult(NamedTuple):
    """Result of `gptq`."""

    codes: Tensor  # (..., rows, columns) int8
    damping: list[float | None]  # damping of each matrix; None: all failed, and the matrix was rounded to nearest


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    bits: int,
    *,
    damp: float = 0.01,
    block_size: int = 128,
) -> GPTQResult:
    """Round a matrix, or a batch of matrices, so that products with typical inputs change little.

    U is the upper Cholesky factor of (H + damp · mean(diag H) · I)⁻¹. Columns j are rounded in order of falling H_jj
    (ties from left to right): q_j = round(clamp(w_j / s)), e = (w_j − q_j s) / U_jj, w_k ← w_k − e U_jk for all columns
    k after j. If the input of a column was always zero (H_jj = 0), its codes are 0. `golf_kernels.gptq_block` rounds
    the columns of a block one by one. Then one matrix product updates all columns after the block.

    All backends give the same codes on the same machine. A CPU and a GPU round the factorization and the products
    differently. If one weight gets another code because of this, the later weights of its row may change too.

    Args:
        weight: `(..., rows, columns)`, float32 or float64. The arithmetic has the same dtype.
        hessian: `(..., columns, columns)`, Σ x xᵀ over the inputs x, times any positive constant.
        scales: `(..., rows)`, positive.
        bits: bits of the codes, 2 to 8.
        damp: damping, as a fraction of the Hessian's mean diagonal. If the factorization fails, 10 and 100 times
            max(damp, 0.001) are tried. If these also fail, the matrix is rounded to nearest.
        block_size: columns per block. The C++ and CUDA backends take at most 128.

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

    order = diagonal.argsort(dim=1, descending=True, stable=True)
    curvature = curvature.gather(1, order[:, :, None].expand_as(curvature))
    curvature = curvature.gather(2, order[:, None, :].expand_as(curvature))
    factor, damping = _inverse_factor(curvature, damp)

    # transpose the weights, so that each column is contiguous in memory
    work = flat.masked_fill(dead[:, None, :], 0).mT.gather(1, order[:, :, None].expand(-1, -1, rows))
    ordered = _round_columns(work, factor, steps, largest_code(bits), block_size)
    codes = torch.empty_like(ordered).scatter_(1, order[:, :, None].expand_as(ordered), ordered).mT.contiguous()
    for index, used in enumerate(damping):
        if used is None:
            codes[index] = rtn(flat[index], steps[index], bits)
    return GPTQResult(codes.reshape(weight.shape), damping)


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, list[float | None]]:
    """Damp Hessians H `(batch, n, n)`. Return U, upper triangular with UᵀU = H⁻¹, and the damping of each Hessian.

    If the factorization of a Hessian fails with every damping, its U is the identity and its damping is None.
    """
    # flip H in both dimensions, factorize it into L Lᵀ, and flip L⁻¹: this gives U without the inverse of H
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
    """Round transposed matrices `work` `(batch, columns, rows)` column by column to int8 codes.

    `work` is overwritten.
    """
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = factor[:, start:stop]
        codes[:, start:stop], errors = gptq_block(work[:, start:stop], block[:, :, start:stop], scales, limit)
        if stop < columns:
            work[:, stop:].baddbmm_(block[:, :, stop:].mT, errors, alpha=-1)
    return codes

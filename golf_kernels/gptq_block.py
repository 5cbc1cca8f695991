"""GPTQ's inner loop (`golf::gptq_block`): rounds columns in order and corrects the later columns for each error.

For columns j = 0, 1, … of a block of weights w, independently in each row with scale s:

    q_j = round(clamp(w_j / s, −limit, limit)),  e_j = (w_j − q_j s) / U_jj,  w_k ← w_k − U_jk e_j for all k > j

U is the block's submatrix of the upper Cholesky factor of the inverse Hessian. Halves round to even. Each product,
difference and quotient is rounded separately, and differences are taken in the order of j, so PyTorch, C++ and CUDA
give the same bits. The caller corrects the columns after the block, by a matrix product with the errors e.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from golf_kernels import dispatch, native, operators

MAX_COLUMNS = 128
"""Most columns of a block that the C++ and CUDA backends take. Must equal GOLF_GPTQ_MAX_COLUMNS in csrc/launchers.h."""

# codes of GolfDtype in csrc/launchers.h
_DTYPES = {torch.float32: 0, torch.float64: 3}


def gptq_block(work: Tensor, factor: Tensor, scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Rounds a block of columns with error feedback, by the formula in the module's docstring.

    Args:
        work: `(batch, columns, rows)`, float32 or float64: the weights w of each block, transposed.
        factor: `(batch, columns, columns)` in the dtype of `work`: U. Entries below the diagonal are not read.
        scales: `(batch, rows)` in the dtype of `work`: s, which must be positive. The sign is not checked, because a
            check would wait for the GPU.
        limit: largest code, 1 to 127. The smallest code is −limit.

    Returns:
        The codes q, `(batch, columns, rows)` int8, and the errors e, in the shape and dtype of `work`.

    Raises:
        ValueError: a wrong shape, dtype, device or limit.
        RuntimeError: an input requires a gradient outside `torch.no_grad()`; the operator has no gradient.

    Source: Frantar et al., arXiv:2210.17323.
    """
    codes, errors = torch.ops.golf.gptq_block(work, factor, scales, limit)
    return codes, errors


def _check(work: Tensor, factor: Tensor, scales: Tensor, limit: int) -> None:
    if work.dtype not in _DTYPES or not work.dtype == factor.dtype == scales.dtype:
        raise ValueError(
            "expected work, factor and scales all of float32 or all of float64, found "
            f"{work.dtype}, {factor.dtype} and {scales.dtype}"
        )
    shape = tuple(work.shape)
    if work.ndim != 3 or factor.shape != (shape[0], shape[1], shape[1]) or scales.shape != (shape[0], work.shape[-1]):
        raise ValueError(
            "expected work (batch, columns, rows), factor (batch, columns, columns) and scales (batch, rows), found "
            f"{shape}, {tuple(factor.shape)} and {tuple(scales.shape)}"
        )
    if not work.device == factor.device == scales.device:
        raise ValueError(f"devices: expected one, found {work.device}, {factor.device} and {scales.device}")
    if not 1 <= limit <= 127:
        raise ValueError(f"limit: expected 1 to 127, found {limit}")


def _allocate(work: Tensor, factor: Tensor, scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    _check(work, factor, scales, limit)
    return work.new_empty(work.shape, dtype=torch.int8), work.new_empty(work.shape)


def _reference(work: Tensor, factor: Tensor, scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    codes, errors = _allocate(work, factor, scales, limit)
    work = work.clone()
    for j in range(work.shape[1]):
        rounded = (work[:, j] / scales).clamp_(-limit, limit).round_()
        codes[:, j] = rounded
        errors[:, j] = (work[:, j] - rounded * scales) / factor[:, j, j, None]
        work[:, j + 1 :] -= factor[:, j, j + 1 :, None] * errors[:, j, None]
    return codes, errors


def _native(work: Tensor, factor: Tensor, scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    codes, errors = _allocate(work, factor, scales, limit)
    batch, columns, rows = work.shape
    # U is transposed, because the loops read its columns, which are then contiguous
    work, lower, scales = work.contiguous(), factor.mT.contiguous(), scales.contiguous()
    arguments = [tensor.data_ptr() for tensor in (work, lower, scales, codes, errors)]
    arguments += [batch, columns, rows, limit, _DTYPES[work.dtype]]
    if not work.is_cuda:
        native.extension().gptq_block_cpu(*arguments)
        return codes, errors
    with torch.cuda.device(work.device):
        native.extension().gptq_block_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    return codes, errors


def _supports(backend: Literal["cpp", "cuda"], *args: Any) -> str | None:
    unavailable = native.problem(backend)
    if unavailable is not None or not args:
        return unavailable
    columns = args[0].shape[1] if args[0].ndim == 3 else 0
    return f"it takes blocks of at most {MAX_COLUMNS} columns, found {columns}" if columns > MAX_COLUMNS else None


def _inputs(make: operators.Make, batch: int = 2, columns: int = 7, rows: int = 37) -> operators.Inputs:
    work = 0.1 * make(batch, columns, rows, dtype=torch.float32)
    factor = make(batch, columns, columns, dtype=torch.float32) / columns + torch.eye(columns, device=work.device)
    return {"work": work, "factor": factor, "scales": work.new_full((batch, rows), 0.0625), "limit": 31}


dispatch.define(
    "gptq_block",
    "(Tensor work, Tensor factor, Tensor scales, int limit) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_allocate,
)
for _backend in ("cpp", "cuda"):
    dispatch.register("gptq_block", _backend, _native, supports=functools.partial(_supports, _backend))
operators.declare(operators.Operator("gptq_block", gptq_block, _inputs, called_by="quantize", gpu_dtype=torch.float32))

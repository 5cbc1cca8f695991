"""Negative log-likelihood of each target under softcapped logits, for evaluation: `golf::window_nll`.

    z = softcap · tanh(hidden · weightᵀ / softcap),  nll[i] = logsumexp(z[i]) − z[i, targets[i]]

The operator has no gradient. It never stores the logits of all rows at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from golf_kernels import dispatch, operators
from golf_kernels.autocast import as_autocast
from golf_kernels.softcapped_cross_entropy import (
    accumulation_dtype,
    check_head,
    check_targets,
    chunk_rows,
    head_inputs,
    triton_problem,
    wide_product,
)

LOGITS_ROUNDINGS = ("none", "bf16", "bf16_capped", "bf16_each")
"""Values of `logits_rounding`. The operator `golf::window_nll` takes a value's index."""
_BEFORE, _CAPPED, _EACH = 1, 2, 3


def window_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 30.0,
    logits_rounding: str = "none",
) -> Tensor:
    """Computes for every target the nll −log softmax(softcap·tanh(hidden·weightᵀ / softcap))[target].

    Args:
        hidden: `(M, d)`, any floating dtype: hidden states.
        weight: `(V, d)` in the dtype of `hidden`: weight of the output projection.
        targets: `(M,)`, int64 or int32, in [0, V). Targets are checked on the CPU, but not on CUDA, where a check would
            wait for the GPU.
        softcap: bound on the magnitude of the logits, > 0.
        logits_rounding: `none` keeps the logits in float32 (float64 for float64 inputs). `bf16` rounds the logits to
            bfloat16 before the softcap, as the published evaluations do. `bf16_capped` rounds them again after the
            softcap. `bf16_each` rounds after the product and after each operation of the softcap.

    Returns:
        `(M,)` in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a wrong shape, dtype, device or option, or (on the CPU) a target outside [0, V).
        RuntimeError: an input requires a gradient outside `torch.no_grad()`; the operator has no gradient.
    """
    if logits_rounding not in LOGITS_ROUNDINGS:
        raise ValueError(f"logits_rounding: expected one of {', '.join(LOGITS_ROUNDINGS)}, found {logits_rounding!r}")
    rounding = LOGITS_ROUNDINGS.index(logits_rounding)
    hidden, weight = as_autocast(hidden, weight)
    nll: Tensor = torch.ops.golf.window_nll(hidden, weight, targets, softcap, rounding)
    return nll


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, rounding: int) -> Tensor:
    check_head(hidden, weight, targets, softcap)
    return hidden.new_empty((hidden.shape[0],), dtype=accumulation_dtype(hidden.dtype))


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, rounding: int) -> Tensor:
    check_head(hidden, weight, targets, softcap)
    check_targets(targets, weight.shape[0], None)
    dtype = accumulation_dtype(hidden.dtype)
    picked = targets.long().unsqueeze(1)
    nll = hidden.new_empty((hidden.shape[0],), dtype=dtype)
    step = chunk_rows(hidden.device, weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        # a product in 16 bits would round the logits even if logits_rounding is `none`
        logits = wide_product(hidden[rows], weight.T)
        if rounding >= _BEFORE:
            logits = logits.bfloat16().to(dtype)
        if rounding == _EACH:
            quotient = logits.div_(softcap).bfloat16()
            z = (quotient.tanh() * softcap).to(dtype)
        else:
            z = logits.div_(softcap).tanh_().mul_(softcap)
        if rounding == _CAPPED:
            z = z.bfloat16().to(dtype)
        nll[rows] = torch.logsumexp(z, dim=1) - z.gather(1, picked[rows]).squeeze(1)
    return nll


def _triton(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, rounding: int) -> Tensor:
    from golf_kernels.softcapped_cross_entropy_triton import row_nll

    check_head(hidden, weight, targets, softcap)
    check_targets(targets, weight.shape[0], None)
    lse, picked = row_nll(hidden, weight, targets, softcap, rounding)
    return lse - picked


def _triton_supports(*args: Any) -> str | None:
    return dispatch.triton_problem() or (triton_problem(args[0]) if args else None)


def _inputs(make: operators.Make, logits_rounding: str = "none", **sizes: int) -> operators.Inputs:
    inputs = head_inputs(make, **sizes)
    return {name: tensor.detach() for name, tensor in inputs.items()} | {"logits_rounding": logits_rounding}


dispatch.define(
    "window_nll",
    "(Tensor hidden, Tensor weight, Tensor targets, float softcap, int rounding) -> Tensor",
    reference=_reference,
    fake=_fake,
)
dispatch.refuse_gradient(
    "window_nll",
    "golf::window_nll has no gradient, but an input requires one; call it under torch.no_grad(), or train with "
    "golf_kernels.softcapped_cross_entropy",
)
dispatch.register("window_nll", "triton", _triton, supports=_triton_supports)
operators.declare(
    operators.Operator(
        "window_nll",
        window_nll,
        _inputs,
        cases=[
            {"rows": 98304, "width": 640, "vocabulary": 1984, "logits_rounding": rounding}
            for rounding in LOGITS_ROUNDINGS
        ],
        called_by="evaluate",
    )
)

"""Products with weight matrices. GPTQ's calibration observes the inputs of these products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf_kernels.linear_residual import linear_residual
from train.model.straight_through import fake_quantize_rows

Callback = Callable[[str, Tensor], None]
"""A function of a matrix's parameter name and the input `(..., in_features)` that the matrix multiplies."""


class _Observation(NamedTuple):
    names: dict[int, str]
    callback: Callback


_observation: _Observation | None = None


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    fake_quantize: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute y = scale ⊙ (x Wᵀ) `(..., out_features)` for x `(..., in_features)`, in the dtype of x.

    The scale multiplies the rows of W instead of y, so that its gradient is a sum over the weight, not over all tokens.
    For the other arguments see `working_weight`.
    """
    observe(weight, x)
    rows = working_weight(weight, x.dtype, scale=scale, fake_quantize=fake_quantize)
    return F.linear(x, rows) if residual is None else linear_residual(x, rows, residual)


def joint_linear(x: Tensor, weights: Sequence[Tensor], *, fake_quantize: str | None = None) -> Tensor:
    """Compute y_i = x W_iᵀ for several weights `(rows_i, in_features)` in one product `(..., Σ rows_i)`.

    The gradient of x is also one product, so the sum over all weights is rounded once.
    """
    for weight in weights:
        observe(weight, x)
    rows = [working_weight(weight, x.dtype, fake_quantize=fake_quantize) for weight in weights]
    return F.linear(x, torch.cat(rows))


def working_weight(
    weight: Tensor, dtype: torch.dtype, *, scale: Tensor | None = None, fake_quantize: str | None = None
) -> Tensor:
    """Prepare the weight `(out_features, in_features)` for a product, in `dtype`.

    With `fake_quantize`, the weight is first rounded to int6 rows (see `train.model.straight_through`): "float32"
    rounds the parameter itself, "compute" rounds its copy in `dtype`. Then the rows are multiplied by `scale`
    `(out_features,)`, and the result is cast to `dtype`.
    """
    rows = weight.to(dtype) if fake_quantize == "compute" else weight
    if fake_quantize:
        rows = fake_quantize_rows(rows)
    return (rows if scale is None else scale.unsqueeze(1) * rows).to(dtype)


def observe(weight: Tensor, x: Tensor) -> None:
    """If `observe_inputs` is active, report the input `x` of the matrix `weight` to its callback."""
    if _observation is not None and (name := _observation.names.get(id(weight))) is not None:
        _observation.callback(name, x.detach())


def observing() -> bool:
    """Whether `observe_inputs` is active.

    If so, the caller must not use a fused operator that hides a matrix's input.
    """
    return _observation is not None


@contextmanager
def observe_inputs(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Inside the context, call `callback(name, input)` for every product with a matrix. The input is detached.

    The model must not be compiled. The query, key and value matrices are reported one after another, with the same
    input. A layer that runs twice is reported twice. The tied embedding is reported as `embedding.weight`, with the
    input of the output head.

    Raises:
        RuntimeError: another `observe_inputs` is active.
    """
    global _observation
    if _observation is not None:
        raise RuntimeError("inputs are already being observed: leave the other observe_inputs first")
    _observation = _Observation({id(parameter): name for name, parameter in model.named_parameters()}, callback)
    try:
        yield
    finally:
        _observation = None

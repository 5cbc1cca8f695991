"""Products with weight matrices, whose inputs calibration can observe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.straight_through import fake_quantize_rows

Callback = Callable[[str, Tensor], None]
"""Called with a matrix's parameter name and its input `(..., in_features)`."""


class _Observation(NamedTuple):
    names: dict[int, str]
    callback: Callback


_observation: _Observation | None = None


def linear(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, fake_quantize: bool = False) -> Tensor:
    """Multiply by a weight cast to the dtype of x: y = scale ⊙ (x Wᵀ).

    The scale multiplies the weight's rows and not y: its gradient then sums over the weight and not over all tokens.

    Args:
        x: `(..., in_features)`, compute dtype.
        weight: `(out_features, in_features)`, the float32 parameter.
        scale: `(out_features,)`, any floating dtype, or None for 1.
        fake_quantize: round the weight to int6 rows first, straight-through.

    Returns:
        `(..., out_features)` in the dtype of `x`.
    """
    observe(weight, x)
    return F.linear(x, working_weight(weight, x.dtype, scale=scale, fake_quantize=fake_quantize))


def joint_linear(x: Tensor, weights: Sequence[Tensor], *, fake_quantize: bool = False) -> tuple[Tensor, ...]:
    """Multiply by several weights in one product: y_i = x W_iᵀ.

    The gradient of x is one product, too: it sums over all weights before it is rounded.

    Args:
        x: `(..., in_features)`, compute dtype.
        weights: `(rows_i, in_features)` each, the float32 parameters.
        fake_quantize: round the weights to int6 rows first, straight-through.

    Returns:
        `(..., rows_i)` each, in the dtype of `x`; views of one tensor.
    """
    for weight in weights:
        observe(weight, x)
    rows = [working_weight(weight, x.dtype, fake_quantize=fake_quantize) for weight in weights]
    found: tuple[Tensor, ...] = F.linear(x, torch.cat(rows)).split([len(weight) for weight in weights], dim=-1)
    return found


def working_weight(
    weight: Tensor, dtype: torch.dtype, *, scale: Tensor | None = None, fake_quantize: bool = False
) -> Tensor:
    """The weight as products use it: fake-quantized, its rows scaled, then cast.

    Args:
        weight: `(out_features, in_features)`, the float32 parameter.
        dtype: compute dtype.
        scale: `(out_features,)`, or None for 1.
        fake_quantize: round to int6 rows first, straight-through.

    Returns:
        `(out_features, in_features)` in `dtype`.
    """
    rows = fake_quantize_rows(weight) if fake_quantize else weight
    return (rows if scale is None else scale.unsqueeze(1) * rows).to(dtype)


def observe(weight: Tensor, x: Tensor) -> None:
    """Report a matrix's input to the observer, if there is one."""
    if _observation is None:
        return
    name = _observation.names.get(id(weight))
    if name is not None:
        _observation.callback(name, x.detach())


def observing() -> bool:
    """Whether inputs are being observed; fused operators that hide an input must not be called then."""
    return _observation is not None


@contextmanager
def observe_inputs(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Call back with the input of every matrix of a model inside the context.

    Query, key and value are reported separately, with the same tensor. A layer that runs twice reports twice. The tied
    embedding is reported as `embedding.weight`, with the head's input.

    Args:
        model: the model, not compiled.
        callback: called with the parameter's name and the detached input, in the compute dtype.

    Raises:
        RuntimeError: inputs are already being observed.
    """
    global _observation
    if _observation is not None:
        raise RuntimeError("inputs are being observed already: leave the other observe_inputs first")
    _observation = _Observation({id(parameter): name for name, parameter in model.named_parameters()}, callback)
    try:
        yield
    finally:
        _observation = None

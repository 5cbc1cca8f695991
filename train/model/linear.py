"""The one way a block multiplies by a weight matrix, so that calibration can watch the inputs of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.straight_through import fake_quantize_rows

Callback = Callable[[str, Tensor], None]
"""Called with a matrix's parameter name and an input `(..., in_features)` of it."""


class _Observation(NamedTuple):
    names: dict[int, str]
    callback: Callback


_observation: _Observation | None = None


def linear(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, fake_quantize: bool = False) -> Tensor:
    """Multiply by a master weight cast to the dtype of the activations: y = scale ⊙ (x Wᵀ).

    The scale joins the weight, not y: its gradient is then a sum over the weight's gradient and not over all rows.

    Args:
        x: `(..., in_features)`, compute dtype.
        weight: `(out_features, in_features)`, the master parameter itself.
        scale: `(out_features,)`, any floating dtype, or None for 1.
        fake_quantize: round the weight to int6 rows first, straight-through.

    Returns:
        `(..., out_features)` in the dtype of `x`.
    """
    observe(weight, x)
    return F.linear(x, working_weight(weight, x.dtype, scale=scale, fake_quantize=fake_quantize))


def joint_linear(x: Tensor, weights: Sequence[Tensor], *, fake_quantize: bool = False) -> tuple[Tensor, ...]:
    """Multiply by several master weights at once: y_i = x W_iᵀ, from one product with all rows below each other.

    The gradient of x is one product, too, which sums over all of them before it is rounded.

    Args:
        x: `(..., in_features)`, compute dtype.
        weights: of `(rows_i, in_features)`, the master parameters themselves.
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
    """The weight as products use it: fake-quantized if asked, its rows scaled if asked, then cast.

    Args:
        weight: `(out_features, in_features)`, master.
        dtype: compute dtype.
        scale: `(out_features,)`, or None for 1.
        fake_quantize: round to int6 rows first, straight-through.

    Returns:
        `(out_features, in_features)` in `dtype`.
    """
    rows = fake_quantize_rows(weight) if fake_quantize else weight
    return (rows if scale is None else scale.unsqueeze(1) * rows).to(dtype)


def observe(weight: Tensor, x: Tensor) -> None:
    """Report an input of a matrix to the observer, if there is one."""
    if _observation is None:
        return
    name = _observation.names.get(id(weight))
    if name is not None:
        _observation.callback(name, x.detach())


def observing() -> bool:
    """Whether inputs are being observed; parts that fuse several products then take a plain path."""
    return _observation is not None


@contextmanager
def observe_inputs(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Call back with every input of every matrix of a model while the context is open.

    Matrices that share an input (query, key, value) are reported one after the other with the same tensor. A layer
    that runs twice reports twice. The tied embedding is reported with the head's input, under `embedding.weight`.

    Args:
        model: the model, not compiled.
        callback: gets the parameter's name and the input `(..., in_features)`, detached, in the compute dtype.

    Raises:
        RuntimeError: inputs are already being observed.
    """
    global _observation
    if _observation is not None:
        raise RuntimeError("inputs are already being observed: close the other observe_inputs first")
    _observation = _Observation({id(parameter): name for name, parameter in model.named_parameters()}, callback)
    try:
        yield
    finally:
        _observation = None

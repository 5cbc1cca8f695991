"""Products with weight matrices; calibration can observe their inputs."""

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
    """y = scale ⊙ (x Wᵀ), `(..., in_features)` to `(..., out_features)`; the weight is cast to the dtype of x.

    The scale multiplies the weight's rows instead of y, so its gradient sums over the weight and not over all tokens.
    Arguments as for `working_weight`.
    """
    observe(weight, x)
    return F.linear(x, working_weight(weight, x.dtype, scale=scale, fake_quantize=fake_quantize))


def joint_linear(x: Tensor, weights: Sequence[Tensor], *, fake_quantize: bool = False) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ for several weights `(rows_i, in_features)` in one product; the results `(..., rows_i)` are views.

    The gradient of x is also one product: it sums over all weights before it is rounded.
    """
    for weight in weights:
        observe(weight, x)
    rows = [working_weight(weight, x.dtype, fake_quantize=fake_quantize) for weight in weights]
    found: tuple[Tensor, ...] = F.linear(x, torch.cat(rows)).split([len(weight) for weight in weights], dim=-1)
    return found


def working_weight(
    weight: Tensor, dtype: torch.dtype, *, scale: Tensor | None = None, fake_quantize: bool = False
) -> Tensor:
    """The weight as products use it, `(out_features, in_features)` in `dtype`.

    The float32 parameter is fake-quantized to int6 rows (straight-through) if asked for, its rows are multiplied by `scale`
    `(out_features,)`, then it is cast.
    """
    rows = fake_quantize_rows(weight) if fake_quantize else weight
    return (rows if scale is None else scale.unsqueeze(1) * rows).to(dtype)


def observe(weight: Tensor, x: Tensor) -> None:
    """Report a matrix's input to the observer, if there is one."""
    if _observation is not None and (name := _observation.names.get(id(weight))) is not None:
        _observation.callback(name, x.detach())


def observing() -> bool:
    """Whether inputs are being observed; if so, do not call a fused operator that hides an input."""
    return _observation is not None


@contextmanager
def observe_inputs(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Inside the context, call back with the name and the detached input of every matrix of a model, not compiled.

    Query, key and value are reported one by one, with the same tensor. A layer that runs twice reports twice. The tied
    embedding is reported as `embedding.weight`, with the head's input.

    Raises:
        RuntimeError: inputs are already being observed.
    """
    global _observation
    if _observation is not None:
        raise RuntimeError("inputs are already being observed: leave the other observe_inputs first")
    _observation = _Observation({id(parameter): name for name, parameter in model.named_parameters()}, callback)
    try:
        yield
    finally:
        _observation = None

"""Makes parameters with initial values that are rounded to bfloat16, as in the published scripts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def parameter(values: Tensor, dtype: torch.dtype = torch.float32, *, trained: bool = True) -> nn.Parameter:
    """Make a parameter of `values`, rounded to bfloat16 and then cast to `dtype`."""
    return nn.Parameter(values.to(torch.bfloat16).to(dtype), requires_grad=trained)


def constant(value: float, *shape: int) -> nn.Parameter:
    """Make a float32 parameter of the given shape, filled with `value`. Without a shape it is a scalar."""
    return parameter(torch.full(shape, value))


def normal_table(rows: int, columns: int, deviation: float, dtype: torch.dtype) -> nn.Parameter:
    """Make an embedding table `(rows, columns)` with values drawn from N(0, deviation²)."""
    return parameter(torch.empty(rows, columns).normal_(0.0, deviation), dtype)


def matrix(rows: int, columns: int, *, orthogonal: bool, gain: float = 1.0) -> nn.Parameter:
    """Make a float32 weight `(rows, columns)`, that is, (out_features, in_features).

    With `orthogonal`, rows or columns are orthonormal. Otherwise values are drawn as for `torch.nn.Linear`, from
    U(−1/√columns, 1/√columns). All values are multiplied by `gain`.
    """
    values = torch.empty(rows, columns)
    # skip orthogonal_, which would run its QR decomposition even on the meta device
    if values.is_meta:
        return parameter(values)
    if orthogonal:
        nn.init.orthogonal_(values, gain=gain)
    else:
        bound = gain / math.sqrt(columns)
        values.uniform_(-bound, bound)
    return parameter(values)


def zero_matrix(rows: int, columns: int) -> nn.Parameter:
    """Make a float32 weight `(rows, columns)` of zeros.

    With zero output projections, a block initially adds nothing.
    """
    return parameter(torch.zeros(rows, columns))

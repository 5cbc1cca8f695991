"""A product with a weight and the sum with the residual stream as one operator: `golf::linear_residual`.

    y = residual + x · weightᵀ

The sum is in the product's epilogue, which is rounded once. The Triton backend is the MLP's down kernel
(`golf_kernels.leaky_relu2_mlp_triton`). The gradients are products of PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from golf_kernels import dispatch, operators
from golf_kernels.autocast import as_autocast


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Computes residual + x · weightᵀ, such as the output projection of attention with the residual stream.

    All tensors have derivatives.

    Args:
        x: `(..., k)`, any floating dtype.
        weight: `(d, k)` in the dtype of x, with k > 0 and d > 0.
        residual: `(..., d)` in the dtype of x.

    Returns:
        `(..., d)` in the dtype of x. Under `torch.autocast`, the product uses autocast's dtype, and the residual is added
        in its own.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    narrow, weight = as_autocast(x, weight)
    if narrow.dtype != residual.dtype and narrow.dtype != x.dtype:
        return residual + narrow @ weight.T
    y: Tensor = torch.ops.golf.linear_residual(
        narrow.reshape(-1, narrow.shape[-1]), weight, residual.reshape(-1, residual.shape[-1])
    )
    return y.reshape(residual.shape)


def _check(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    if x.ndim != 2 or not x.dtype.is_floating_point or x.shape[1] == 0:
        raise ValueError(f"x: expected shape (..., k) and a floating dtype, found {tuple(x.shape)} and {x.dtype}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (d, {x.shape[1]}) with d > 0, found {tuple(weight.shape)}")
    if residual.shape != (x.shape[0], weight.shape[0]):
        expected = (x.shape[0], weight.shape[0])
        raise ValueError(f"residual: expected shape {expected} for x and weight, found {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {x.dtype} on {x.device} like x, found {tensor.dtype} on {tensor.device}"
            )


def _fake(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    _check(x, weight, residual)
    return residual.new_empty(residual.shape)


def _reference(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    _check(x, weight, residual)
    return torch.addmm(residual, x, weight.T)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return dy @ weight if needs[0] else None, dy.T @ x if needs[1] else None, dy if needs[2] else None


def _triton_supports(*args: Any) -> str | None:
    unavailable = dispatch.triton_problem(tma=True)
    if unavailable is not None or not args:
        return unavailable
    x, weight, _ = args
    # Triton's interpreter would multiply the bit patterns of bfloat16 numbers without raising an error
    dtypes = (torch.bfloat16, torch.float16) if x.is_cuda else (torch.float16, torch.float32)
    if x.dtype not in dtypes:
        return f"x is {x.dtype}, the Triton kernel takes {' and '.join(map(str, dtypes))}"
    if weight.ndim != 2 or weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"the Triton kernel takes a weight with both sizes in multiples of 8, found {tuple(weight.shape)}"
    return None


def _triton(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    from golf_kernels import leaky_relu2_mlp_triton

    _check(x, weight, residual)
    return leaky_relu2_mlp_triton.down(x, weight, residual)


def _inputs(make: operators.Make, rows: int = 37, depth: int = 40, width: int = 24) -> operators.Inputs:
    x, weight, residual = make(rows, depth), make(width, depth) * depth**-0.5, make(rows, width)
    return {
        "x": x.requires_grad_(),
        "weight": weight.detach().requires_grad_(),
        "residual": residual.requires_grad_(),
    }


dispatch.define(
    "linear_residual", "(Tensor x, Tensor weight, Tensor residual) -> Tensor", reference=_reference, fake=_fake
)
torch.library.register_autograd("golf::linear_residual", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
dispatch.register("linear_residual", "triton", _triton, supports=_triton_supports)
operators.declare(
    operators.Operator(
        "linear_residual",
        linear_residual,
        _inputs,
        # the first width is a multiple of wide tiles, the second is not
        cases=[{"rows": 98304, "depth": depth, "width": width} for depth, width in ((512, 512), (320, 640))],
        called_by="model",
    )
)

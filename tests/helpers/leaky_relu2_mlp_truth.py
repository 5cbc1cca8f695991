"""The MLP block in plain PyTorch: the truth for the tests of every backend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from operator_truth import Tensors
from torch import Tensor

NAMES = ("x", "w_up", "w_down", "residual", "scale")


def formula(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    slope: float = 0.5,
    norm_eps: float | None = None,
    gain: float = 1.0,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The block's formula in the dtype of its inputs. The norm is in float32 at least, as in PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = x if norm_eps is None else (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm_eps)).to(x.dtype)
    pre = (gain * n) @ w_up.T
    out = torch.where(pre > 0, pre, slope * pre) ** 2 @ w_down.T
    out = out if scale is None else scale * out
    return out if residual is None else residual + out


def run(function: Callable[..., Tensor], tensors: Mapping[str, Tensor | None], dy: Tensor, **options: Any) -> Tensors:
    """The result of `function` and the gradients of its inputs, by name."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    y = function(**given, **options)
    return {"y": y.detach(), **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))}


def as_the_kernels_round(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dy: Tensor,
    *,
    slope: float,
    norm_eps: float,
    gain: float = 1.0,
    scale: Tensor | None = None,
) -> Tensors:
    """Result and gradients of the block with residual x, rounded where the Triton kernels round.

    Values inside a kernel are float32; values that a kernel stores have the dtype of x. So this function shows the
    kernels' error in bfloat16, which Triton's interpreter cannot show.
    """
    dtype, wide = x.dtype, torch.float32
    columns = (w_down if scale is None else scale[:, None] * w_down).to(wide)
    x, w_up, dy = (t.detach().to(wide) for t in (x, w_up, dy))
    rstd = (x.square().mean(1, keepdim=True) + norm_eps).rsqrt()
    factor = gain * rstd
    pre = factor * (x @ w_up.T)
    post = torch.maximum(pre, slope * pre).square().to(dtype).to(wide)
    y = (post @ columns.T + x).to(dtype)
    dpost = dy @ columns
    along = (post * dpost).sum(1, keepdim=True)
    dpre = (2 * factor * torch.where(pre > 0, 1.0, -slope) * (post.sqrt() * dpost)).to(dtype).to(wide)
    dx = (dpre @ w_up + dy - x * (2 * rstd**2 / x.shape[1] * along)).to(dtype)
    d_up, d_down = (dpre.T @ x).to(dtype), (dy.T @ post).to(dtype)
    found = {"y": y, "x": dx, "w_up": d_up, "w_down": d_down if scale is None else scale[:, None] * d_down}
    return found if scale is None else found | {"scale": torch.linalg.vecdot(d_down, w_down)}

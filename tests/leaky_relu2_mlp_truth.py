"""The MLP block as people write it, and how results are compared with float64, for every back end."""

import torch

NAMES = ("x", "w_up", "w_down", "residual", "scale")


def formula(x, w_up, w_down, *, slope=0.5, norm_eps=None, gain=1.0, residual=None, scale=None):
    """The block as people write it, in the dtype of its inputs; the norm in float32 at least, as torch does it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = x if norm_eps is None else (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm_eps)).to(x.dtype)
    pre = (gain * n) @ w_up.T
    out = torch.where(pre > 0, pre, slope * pre) ** 2 @ w_down.T
    out = out if scale is None else scale * out
    return out if residual is None else residual + out


def run(function, tensors, dy, **options):
    """Result and gradients by name."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    y = function(**given, **options)
    return {"y": y.detach(), **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))}


def exactly(tensors):
    return {name: None if t is None else t.detach().double().requires_grad_() for name, t in tensors.items()}


def errors(got, want):
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}

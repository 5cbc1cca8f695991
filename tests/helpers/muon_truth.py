"""Muon's formulas in float64, one matrix at a time, and steps with made gradients."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import COEFFICIENTS

SHAPES = ((6, 10), (10, 6), (8, 8), (6, 10))

QUINTIC = COEFFICIENTS["quintic"].triples[0]


def parameters(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def train(optimizer, steps=4, start=0, change=lambda group, step: None):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(start, start + steps):
        set_gradients(params, step)
        for group in optimizer.param_groups:
            change(group, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def orthogonalized(matrix, triples=(QUINTIC,) * 5, eps=1e-7):
    """Newton-Schulz through the singular value decomposition."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / matrix.norm().clamp_min(eps)
    for a, b, c in triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return u * sigma @ vh


def reference(*, lr, weight_decay=0.1, dampened=True, nesterov=True, row_eps=None, beta2=None, momenta=(0.95,) * 4):
    """Four steps written down straight, one matrix at a time."""
    params = parameters()
    weights = [param.detach().clone() for param in params]
    momentum = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros(w.shape[0], 1).double() for w in weights]
    for step, beta in enumerate(momenta):
        set_gradients(params, step)
        for i, (w, g) in enumerate(zip(weights, (param.grad for param in params), strict=True)):
            momentum[i] = beta * momentum[i] + ((1 - beta) if dampened else 1) * g
            u = momentum[i]
            if nesterov:
                u = (1 - beta) * g + beta * u if dampened else g + beta * u
            if row_eps is not None:
                u = u / torch.sqrt((u * u).sum(1, keepdim=True) + row_eps)
            o = orthogonalized(u)
            if beta2 is not None:
                norm = o.norm()
                second[i] = beta2 * second[i] + (1 - beta2) * (o * o).mean(1, keepdim=True)
                o = o / (second[i].sqrt() + 1e-10)
                o = o * norm / (o.norm() + 1e-10)
            rate = lr[step] if isinstance(lr, tuple) else lr
            w.mul_(1 - rate * weight_decay).sub_(rate * math.sqrt(max(1, w.shape[0] / w.shape[1])) * o)
    return weights


def assert_close(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


class Launches(TorchDispatchMode):
    """Number of matrices in every call of golf::newton_schulz."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.golf.newton_schulz.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))

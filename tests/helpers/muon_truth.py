"""Muon's formulas in float64, one matrix at a time, and optimizer steps with random gradients."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import COEFFICIENTS

SHAPES = ((6, 10), (10, 6), (8, 8), (6, 10))

QUINTIC = COEFFICIENTS["quintic"].triples[0]


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params: Iterable[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def train(
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    start: int = 0,
    change: Callable[[dict[str, Any], int], object] = lambda group, step: None,
) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(start, start + steps):
        set_gradients(params, step)
        for group in optimizer.param_groups:
            change(group, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def orthogonalized(
    matrix: Tensor, triples: Iterable[tuple[float, float, float]] = (QUINTIC,) * 5, eps: float = 1e-7
) -> Tensor:
    """The result of Newton-Schulz, computed by the singular value decomposition."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / matrix.norm().clamp_min(eps)
    for a, b, c in triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    result: Tensor = u * sigma @ vh
    return result


def reference(
    *,
    lr: float | tuple[float, ...],
    weight_decay: float = 0.1,
    dampened: bool = True,
    nesterov: bool = True,
    row_eps: float | None = None,
    beta2: float | None = None,
    momenta: tuple[float, ...] = (0.95,) * 4,
) -> list[Tensor]:
    """The weights after four steps of Muon, computed one matrix at a time from the formulas."""
    params = parameters()
    weights = [param.detach().clone() for param in params]
    momentum = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros(w.shape[0], 1).double() for w in weights]
    for step, beta in enumerate(momenta):
        set_gradients(params, step)
        for i, (w, param) in enumerate(zip(weights, params, strict=True)):
            g = param.grad
            assert g is not None
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


def assert_close(got: Iterable[Tensor], want: Iterable[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


class Launches(TorchDispatchMode):
    """Records in `sizes` how many matrices each call of golf::newton_schulz gets."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.golf.newton_schulz.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))

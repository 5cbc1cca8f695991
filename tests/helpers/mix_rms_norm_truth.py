"""The residual mix and its norm as people write them, for every backend."""

from collections.abc import Callable

import torch
from operator_truth import Tensors, errors, exactly, random
from torch import Tensor

from golf_kernels.mix_rms_norm import mix_rms_norm

LEAVES = ("x", "x0", "mix")
EPS = 1e-6


def formula(x: Tensor, x0: Tensor, mix: Tensor, *, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """The chain as people write it, in the dtype of its inputs; the norm in float32 at least, as torch does it."""
    first, second = mix.to(x.dtype).unbind()
    h = torch.addcmul(first * x, second, x0)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(h.dtype)
    return h, normed * gain


def streams(batch: int, length: int, width: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensors:
    """Random tensors of one call by name, all of which require gradients."""
    shapes = {"x": (batch, length, width), "x0": (batch, length, width), "mix": (2, width)}
    return {
        name: random(*shape, seed=seed, dtype=dtype, device=device).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }


def upstream(tensors: Tensors) -> list[Tensor]:
    """Random gradients of both results."""
    x = tensors["x"]
    return [random(*x.shape, seed=seed, dtype=x.dtype, device=x.device) for seed in (9, 10)]


def run(
    function: Callable[..., tuple[Tensor, Tensor]],
    tensors: Tensors,
    gradients: list[Tensor],
    eps: float = EPS,
    gain: float = 0.5,
) -> Tensors:
    """Results and gradients by name."""
    results = function(**tensors, eps=eps, gain=gain)
    found = torch.autograd.grad(results, [tensors[name] for name in LEAVES], gradients)
    return dict(zip(("h", "n", "dx", "dx0", "dmix"), [*(r.detach() for r in results), *found], strict=True))


def truth(tensors: Tensors) -> Tensors:
    """Results and gradients of the chain in float64."""
    return run(formula, exactly(tensors), [g.double() for g in upstream(tensors)])


def errors_of_both(tensors: Tensors) -> list[dict[str, float]]:
    """Relative errors of the operator and of the plain chain in the same dtype."""
    want = truth(tensors)
    return [errors(run(f, tensors, upstream(tensors)), want) for f in (mix_rms_norm, formula)]

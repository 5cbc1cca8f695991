"""The residual mix and its norm in plain PyTorch: the truth for the tests of every backend."""

from collections.abc import Callable

import torch
from operator_truth import Tensors, errors, exactly, random
from torch import Tensor

from golf_kernels.mix_rms_norm import mix_rms_norm

LEAVES = ("x", "x0", "mix")
EPS = 1e-6


def formula(x: Tensor, x0: Tensor, mix: Tensor, *, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """The operator's formula in the dtype of its inputs. The norm is in float32 at least, as in PyTorch."""
    first, second = mix.to(x.dtype).unbind()
    h = torch.addcmul(first * x, second, x0)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(h.dtype)
    return h, normed * gain


def streams(batch: int, length: int, width: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensors:
    """Random inputs of one call, by name. All require gradients."""
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
    """The results of `function` and the gradients of its inputs, by name."""
    results = function(**tensors, eps=eps, gain=gain)
    found = torch.autograd.grad(results, [tensors[name] for name in LEAVES], gradients)
    return dict(zip(("h", "n", "dx", "dx0", "dmix"), [*(r.detach() for r in results), *found], strict=True))


def truth(tensors: Tensors) -> Tensors:
    """Results and gradients of `formula` in float64, by name."""
    return run(formula, exactly(tensors), [g.double() for g in upstream(tensors)])


def errors_of_both(tensors: Tensors) -> list[dict[str, float]]:
    """Relative errors of the operator and of `formula`, both in the dtype of `tensors`."""
    want = truth(tensors)
    return [errors(run(f, tensors, upstream(tensors)), want) for f in (mix_rms_norm, formula)]

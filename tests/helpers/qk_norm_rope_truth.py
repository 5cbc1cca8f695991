"""QK-norm, rotation and gain in plain PyTorch: the truth for the tests of every backend."""

from collections.abc import Callable

import torch
from operator_truth import Tensors, errors, exactly, random
from torch import Tensor

from golf_kernels.qk_norm_rope import qk_norm_rope

LEAVES = ("q", "k", "gain")
EPS = 1e-6


def formula(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The operator's formula in the dtype of its inputs. The norm is in float32 at least, as in PyTorch."""

    def normed(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def turned(x: Tensor) -> Tensor:
        half = cosine.shape[-1]
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cosine + b * sine, -a * sine + b * cosine, x[..., 2 * half :]], dim=-1)

    return turned(normed(q)) * gain.to(q.dtype)[:, None], turned(normed(k))


def run(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: Tensors, gradients: list[Tensor], eps: float = EPS
) -> Tensors:
    """The results of `function` and the gradients of its inputs, by name."""
    results = function(**tensors, eps=eps)
    found = torch.autograd.grad(results, [tensors[name] for name in LEAVES], gradients)
    return dict(zip(("q_hat", "k_hat", *LEAVES), [*(r.detach() for r in results), *found], strict=True))


def heads(
    batch: int = 2,
    length: int = 5,
    queries: int = 4,
    keys: int = 2,
    dim: int = 6,
    rotary: int = 4,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Tensors:
    """Random inputs of one call, by name. q, k and gain require gradients."""
    angles = 3 * random(length, 1, rotary // 2, seed=2, device=device)
    return {
        "q": random(batch, length, queries, dim, seed=0, dtype=dtype, device=device).requires_grad_(),
        "k": random(batch, length, keys, dim, seed=1, dtype=dtype, device=device).requires_grad_(),
        "cosine": angles.cos().to(dtype),
        "sine": angles.sin().to(dtype),
        "gain": (1.5 * random(queries, seed=3, device=device)).to(dtype).requires_grad_(),
    }


def upstream(tensors: Tensors) -> list[Tensor]:
    """Random gradients of both results."""
    q, k = tensors["q"], tensors["k"]
    return [random(*x.shape, seed=seed, dtype=x.dtype, device=x.device) for seed, x in ((9, q), (10, k))]


def truth(tensors: Tensors) -> Tensors:
    """Results and gradients of `formula` in float64, by name."""
    return run(formula, exactly(tensors), [g.double() for g in upstream(tensors)])


def errors_of_both(tensors: Tensors) -> list[dict[str, float]]:
    """Relative errors of the operator and of `formula`, both in the dtype of `tensors`."""
    want = truth(tensors)
    return [errors(run(f, tensors, upstream(tensors)), want) for f in (qk_norm_rope, formula)]

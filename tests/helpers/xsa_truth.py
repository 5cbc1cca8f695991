"""XSA (exclusive self-attention) in plain PyTorch: the truth for the tests of every backend."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from operator_truth import Tensors, errors, exactly, random
from torch import Tensor

from golf_kernels.xsa import xsa

LEAVES = ("output", "value")


def formula(output: Tensor, value: Tensor) -> Tensor:
    """The operator's formula in the dtype of its inputs. Each value head is repeated for the heads that share it."""
    direction = F.normalize(value.repeat_interleave(output.shape[2] // value.shape[2], dim=2), dim=-1)
    return output - (output * direction).sum(dim=-1, keepdim=True) * direction


def run(function: Callable[..., Tensor], tensors: Tensors, dy: Tensor) -> Tensors:
    """The result of `function` and the gradients of its inputs, by name."""
    y = function(**tensors)
    found = torch.autograd.grad(y, [tensors[name] for name in LEAVES], dy)
    return dict(zip(("y", *LEAVES), [y.detach(), *found], strict=True))


def heads(
    batch: int = 2,
    length: int = 5,
    queries: int = 4,
    values: int = 2,
    dim: int = 6,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensors, Tensor]:
    """Random inputs of one call, by name, and a random gradient of the result."""
    output, value, dy = (
        random(batch, length, count, dim, seed=seed, dtype=dtype, device=device)
        for seed, count in enumerate((queries, values, queries))
    )
    return {"output": output.requires_grad_(), "value": value.requires_grad_()}, dy


def errors_of_both(tensors: Tensors, dy: Tensor) -> list[dict[str, float]]:
    """Relative errors of the operator and of `formula`, both in the dtype of `tensors`."""
    want = run(formula, exactly(tensors), dy.double())
    return [errors(run(function, tensors, dy), want) for function in (xsa, formula)]

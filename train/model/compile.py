"""Compiles the model with torch.compile.

The compiler cannot fuse an operator of golf_kernels with the code around it. Therefore a compiled model calls an
operator only if the operator has a kernel for the device. Otherwise it computes the operator's formula with PyTorch
functions. So does an uncompiled model on a CPU: operators without a kernel save memory, but are slower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from golf_kernels import dispatch
from train.config import Config

# operators that do the work of other operators or of PyTorch functions; a model calls them only if their kernels run
_REPLACEMENTS = frozenset({"linear_residual", "qkv_norm_rope"})
# operators whose PyTorch reference saves memory and is not slower: it never holds all logits
_MEMORY_SAVERS = frozenset({"softcapped_cross_entropy"})


class OperatorModule(nn.Module):
    """A module that calls operators of golf_kernels. Operators in `written_out` are computed with PyTorch functions.

    Operators that replace others are called only if they are in `replacements`.
    """

    written_out: frozenset[str] = frozenset()
    replacements: frozenset[str] = frozenset()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the setting `compile` says to compile the model. "auto" means: only on a GPU."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def compiled_loss(model: nn.Module, config: Config, device: torch.device) -> Callable[..., Tensor]:
    """Return a function that computes the model's loss, compiled if `compiles` returns True.

    A compiled model has one static graph with recurrence and another without.
    """
    if not compiles(config, device):
        if device.type == "cpu":
            write_out(model, without_kernel(device) - _MEMORY_SAVERS)
        return model
    write_out(model, without_kernel(device))
    compiled: Callable[..., Tensor] = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


def without_kernel(device: torch.device) -> frozenset[str]:
    """Return the names of the operators without a kernel for `device`. They run their PyTorch reference."""
    return frozenset(op for op in dispatch.describe() if dispatch.choose(op, device=device.type).backend == "torch")


def write_out(model: nn.Module, operators: frozenset[str]) -> None:
    """Make `model` compute the formulas of `operators` with PyTorch functions, and call all other operators."""
    for module in model.modules():
        if isinstance(module, OperatorModule):
            module.written_out = operators
            module.replacements = _REPLACEMENTS - operators

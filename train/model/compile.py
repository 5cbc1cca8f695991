"""Compiles the model with torch.compile.

The compiler cannot fuse an operator of golf_kernels with the code around it. So a compiled model calls an operator only
if the operator has a kernel on this device. Otherwise the model computes the operator's formula with PyTorch functions.
An uncompiled model on a CPU does so, too, because operators without a kernel spend time there to save memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from golf_kernels import dispatch
from train.config import Config

# operators whose PyTorch reference saves memory, because it never holds all logits, at no cost of time
_MEMORY_SAVERS = frozenset({"softcapped_cross_entropy"})


class OperatorModule(nn.Module):
    """A module that calls operators of golf_kernels, but computes those in `written_out` with PyTorch functions."""

    written_out: frozenset[str] = frozenset()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the setting `compile` compiles the model. "auto" compiles it on a GPU only."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def compiled_loss(model: nn.Module, config: Config, device: torch.device) -> Callable[..., Tensor]:
    """Return a function that computes the model's loss, compiled if `compiles` is true.

    A compiled model has one static graph with recurrence and one without.
    """
    if not compiles(config, device):
        if device.type == "cpu":
            write_out(model, without_kernel(device) - _MEMORY_SAVERS)
        return model
    write_out(model, without_kernel(device))
    compiled: Callable[..., Tensor] = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


def without_kernel(device: torch.device) -> frozenset[str]:
    """Names of the operators that have no kernel on `device`, where they run their PyTorch reference."""
    return frozenset(op for op in dispatch.describe() if dispatch.choose(op, device=device.type).backend == "torch")


def write_out(model: nn.Module, operators: frozenset[str]) -> None:
    """Make `model` compute the formulas of these operators with PyTorch functions, and call all other operators."""
    for module in model.modules():
        if isinstance(module, OperatorModule):
            module.written_out = operators

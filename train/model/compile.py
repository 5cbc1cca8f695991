"""torch.compile for the model.

The compiler cannot fuse an operator with the code around it. So a compiled model calls an operator of golf_kernels only if
the operator has a kernel on this device; else the model writes the operator's formula out. On a CPU without a compiler,
too: there an operator's reference spends time on the memory that its kernel saves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from golf_kernels import dispatch
from train.config import Config

# operators whose reference never holds all logits, and takes no longer
_MEMORY_SAVERS = frozenset({"softcapped_cross_entropy"})


class OperatorModule(nn.Module):
    """A module that calls operators of golf_kernels, but writes out the formulas of those in `written_out`."""

    written_out: frozenset[str] = frozenset()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the model is compiled: the setting `compile`, where auto means on a GPU."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def compiled_loss(model: nn.Module, config: Config, device: torch.device) -> Callable[..., Tensor]:
    """The model's loss, compiled if `compiles`: one static graph with recurrence and one without."""
    if not compiles(config, device):
        if device.type == "cpu":
            write_out(model, without_kernel(device) - _MEMORY_SAVERS)
        return model
    write_out(model, without_kernel(device))
    compiled: Callable[..., Tensor] = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


def without_kernel(device: torch.device) -> frozenset[str]:
    """Operators that have no kernel on `device` and run on their PyTorch reference."""
    return frozenset(op for op in dispatch.describe() if dispatch.choose(op, device=device.type).backend == "torch")


def write_out(model: nn.Module, operators: frozenset[str]) -> None:
    """Let `model` write out the formulas of these operators and call all others."""
    for module in model.modules():
        if isinstance(module, OperatorModule):
            module.written_out = operators

"""torch.compile for the model: whether, and which of golf_kernels' operators it calls.

A compiler cannot look into an operator. Where an operator would run on its PyTorch reference, the same formula written out in
the model is faster, because the compiler fuses it with its surroundings. So a compiled model calls only operators that have a
kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from golf_kernels import dispatch
from train.config import Config


class OperatorModule(nn.Module):
    """A module that calls operators of golf_kernels, or writes their formulas out.

    Attributes:
        written_out: names of the operators whose formulas are written out.
    """

    written_out: frozenset[str] = frozenset()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the setting `compile` compiles the model on `device`; auto does on a GPU."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def compiled_loss(model: nn.Module, config: Config, device: torch.device) -> Callable[..., Tensor]:
    """The model's loss, compiled if the settings say so: one static graph with recurrence and one without."""
    if not compiles(config, device):
        return model
    write_out(model, without_kernel(device))
    compiled: Callable[..., Tensor] = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


def without_kernel(device: torch.device) -> frozenset[str]:
    """The operators that run on their PyTorch reference on `device`."""
    return frozenset(op for op in dispatch.describe() if dispatch.choose(op, device=device.type).backend == "torch")


def write_out(model: nn.Module, operators: frozenset[str]) -> None:
    """Write the formulas of these operators out in `model`, and let it call all others."""
    for module in model.modules():
        if isinstance(module, OperatorModule):
            module.written_out = operators

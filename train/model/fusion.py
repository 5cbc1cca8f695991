"""Whether a model is compiled, and whether it then calls the package's operators or writes their formulas out for the compiler."""

from __future__ import annotations

import torch
from torch import nn

from golf_kernels import dispatch
from train.config import Config
from train.model.attention import Attention
from train.model.block import Block
from train.model.head import Head
from train.model.mlp import MLP

CALLERS: dict[str, tuple[type[nn.Module], str]] = {
    "leaky_relu2_mlp": (MLP, "fused"),
    "mix_rms_norm": (Block, "fused"),
    "qk_norm_rope": (Attention, "fused_qk_norm_rope"),
    "softcapped_cross_entropy": (Head, "fused"),
    "xsa": (Attention, "fused_xsa"),
}
"""The operators of a training step, by whom they are called, and the attribute there that says whether they are."""


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the settings compile the model on `device`: `compile`, where auto is on a GPU only."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def write_out_references(model: nn.Module, device: str) -> list[str]:
    """Let a model that will be compiled call an operator only where a kernel stands behind it.

    A compiler cannot look into an operator. Where its back end would be PyTorch's own products and passes, the formula
    in plain PyTorch is the faster form, because the compiler fuses the passes with their surroundings.

    Args:
        model: the model, not yet compiled.
        device: type of the device it will run on.

    Returns:
        The operators that are written out.
    """
    has_kernel = {op: dispatch.choose(op, device=device).backend != "torch" for op in CALLERS}
    for op, (caller, flag) in CALLERS.items():
        for module in model.modules():
            if isinstance(module, caller):
                setattr(module, flag, has_kernel[op])
    return [op for op, kernel in has_kernel.items() if not kernel]

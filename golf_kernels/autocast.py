"""Casts an operator's inputs under `torch.autocast`, as PyTorch casts the operands of its matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors as autocast casts the operands of a matrix product.

    If autocast is on for the device of the first tensor, float32, bfloat16 and float16 tensors are cast to autocast's
    dtype. Tensors of other dtypes stay unchanged. If autocast is off, all tensors stay unchanged.
    """
    device = tensors[0].device.type
    # asking whether autocast is on raises an error for devices that have none
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(tensor.to(dtype) if tensor.dtype in narrow else tensor for tensor in tensors)

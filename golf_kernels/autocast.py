"""Makes an operator follow `torch.autocast` as the PyTorch lines that it replaces."""

from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors as autocast gives them to a matrix product.

    Where autocast is on for the first tensor's device, float32 and half-precision tensors get autocast's dtype. Float64
    and integer tensors stay. Where it is off, all tensors are returned unchanged.
    """
    device = tensors[0].device.type
    # asking whether autocast is on raises an error for devices that have none
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(tensor.to(dtype) if tensor.dtype in narrow else tensor for tensor in tensors)

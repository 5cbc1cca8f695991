"""RMS norm without gain, and the LN scale per layer that some recipes apply after it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

# float32's epsilon; explicit, because torch's default depends on its version and the input's dtype
NORM_EPS = 2.0**-23


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """rms(x) = x / √(mean(x²) + ε) over the last dimension, in the dtype of `x`."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def layer_scale(layer: int) -> float:
    """LN scale of a physical layer, the factor on both of its norms: g = 1/√(layer + 1), counted from 0."""
    return 1.0 / math.sqrt(layer + 1)

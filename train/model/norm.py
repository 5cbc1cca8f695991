"""RMS norm without gain, and the LN scale, a factor per layer by which some recipes multiply the norm's output."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

# float32's epsilon; explicit, because torch's default depends on torch's version and the input's dtype
NORM_EPS = 2.0**-23


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Compute rms(x) = x / √(mean(x²) + ε) over the last dimension, in the dtype of x."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def layer_scale(layer: int) -> float:
    """The LN scale g = 1/√(layer + 1) of a physical layer, counted from 0. It multiplies the outputs of both norms."""
    return 1.0 / math.sqrt(layer + 1)

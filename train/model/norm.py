"""RMS norm without gain, and the LN scale: a factor per layer on the norm's output, which some recipes use."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

# epsilon of float32. torch's default would depend on its version and on the input's dtype.
NORM_EPS = 2.0**-23


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Compute rms(x) = x / √(mean(x²) + ε) over the last dimension, in the dtype of x."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def layer_scale(layer: int) -> float:
    """Return g = 1/√(layer + 1), the factor on both norms of a physical layer. Layers are counted from 0."""
    return 1.0 / math.sqrt(layer + 1)

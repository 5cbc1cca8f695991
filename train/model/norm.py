"""RMS norm without gain, and the scale per layer that some systems apply after it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

# float32's epsilon; explicit, because torch's default depends on the version and the input's dtype
NORM_EPS = 2.0**-23


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Scale the last dimension to a root mean square of one.

    rms(x) = x / √(mean(x²) + ε)

    Args:
        x: `(..., d)`, any floating dtype.
        eps: ε.

    Returns:
        `(..., d)` in the dtype of `x`.
    """
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def layer_scale(layer: int) -> float:
    """LN scale of a physical layer: g = 1/√(layer + 1).

    Args:
        layer: 0-based index of the layer.

    Returns:
        The factor of both norms of the layer.
    """
    return 1.0 / math.sqrt(layer + 1)

"""Root-mean-square norm without gain, and the per-layer scale that some systems put behind it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Scale each vector of the last dimension to a root mean square of one.

    rms(x) = x / √(mean(x²) + ε)

    Args:
        x: `(..., d)`, any floating dtype.
        eps: ε; always explicit, because torch's own default changed with 2.7 and with the input's dtype.

    Returns:
        `(..., d)` in the dtype of `x`.
    """
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def layer_scale(layer: int) -> float:
    """LN scale of a physical layer: g = 1/√(layer + 1).

    Args:
        layer: 0-based index of the layer.

    Returns:
        The factor behind both norms of the layer.
    """
    return 1.0 / math.sqrt(layer + 1)

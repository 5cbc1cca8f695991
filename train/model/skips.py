"""U-Net skips: layers in the second half of the model add outputs of layers in the first half."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.model.init import constant


class UNetSkips(nn.Module):
    """Adds an encoder layer's output s to the residual stream x: x + w ⊙ s. With gates: w ⊙ s + σ(g) ⊙ (x − w ⊙ s).

    The weights w `(count, d)` are initially 1. The gates g `(count, d)` are initially 0, so the result is initially the
    mean of x and w ⊙ s.
    """

    def __init__(self, count: int, dim: int, *, gated: bool) -> None:
        super().__init__()
        self.weights = constant(1.0, count, dim)
        self.gates = constant(0.0, count, dim) if gated else None

    def forward(self, x: Tensor, stored: Tensor, row: int) -> Tensor:
        """Add the encoder output `stored` to `x`, both `(B, T, d)`, with the weights and gates of skip `row`."""
        weight = self.weights[row].to(x.dtype)
        if self.gates is None:
            return torch.addcmul(x, weight, stored)
        return torch.lerp(weight * stored, x, torch.sigmoid(self.gates[row]).to(x.dtype))

"""U-Net skips: later layers take up what earlier ones put out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.model.init import constant


class UNetSkips(nn.Module):
    """Adds a stored output s to the stream: x + w ⊙ s, or with gates w ⊙ s + σ(g) ⊙ (x − w ⊙ s).

    Weights `(count, d)` start at 1, gates `(count, d)` at 0, which blends half and half.

    Args:
        count: number of skips.
        dim: d.
        gated: whether there are gates.
    """

    def __init__(self, count: int, dim: int, *, gated: bool) -> None:
        super().__init__()
        self.weights = constant(1.0, count, dim)
        self.gates = constant(0.0, count, dim) if gated else None

    def forward(self, x: Tensor, stored: Tensor, row: int) -> Tensor:
        """Take up a skip.

        Args:
            x: `(B, T, d)`, the stream.
            stored: `(B, T, d)`, the earlier layer's output.
            row: which weights and gates.

        Returns:
            `(B, T, d)`.
        """
        weight = self.weights[row].to(x.dtype)
        if self.gates is None:
            return torch.addcmul(x, weight, stored)
        return torch.lerp(weight * stored, x, torch.sigmoid(self.gates[row]).to(x.dtype))

"""SmearGate: adds the previous token's embedding to each token's, in two published variants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.init import constant

_GATE_CHANNELS = 12


def predecessor(x: Tensor, starts: Tensor | None = None) -> Tensor:
    """Shift `x` `(B, T, d)` by one position: the result is x[t−1], or zero at t = 0 and where a document begins.

    `starts` `(B, T)` bool is True where a document begins; None ignores document boundaries.
    """
    shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
    return shifted if starts is None else shifted.masked_fill(starts[..., None], 0.0)


class SmearGate(nn.Module):
    """The variant of #262 and #1392: y[t] = (1 − σ(γ)) ⊙ x[t] + σ(γ) ⊙ x[t−1]. γ `(d,)` is initially 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = constant(0.0, dim)

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """Compute y for `x` `(B, T, d)`. For `starts` see `predecessor`. The published script has no `starts`."""
        return torch.lerp(x, predecessor(x, starts), torch.sigmoid(self.gate).to(x.dtype))


class PositionSmearGate(nn.Module):
    """The variant of #1667, with one gate per position: y[t] = x[t] + λ σ(w · x[t, :12]) x[t−1].

    λ and w `(1, 12)` are initially 0, so initially y = x. If d < 12, the gate reads all d channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = constant(0.0, 1, min(_GATE_CHANNELS, dim))
        self.scale = constant(0.0)

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """Compute y for `x` `(B, T, d)`. For `starts` see `predecessor`."""
        gate = torch.sigmoid(F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype)))
        return x + self.scale.to(x.dtype) * gate * predecessor(x, starts)

"""The output head: computes softcapped logits from the tied embedding, and their loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_kernels.softcapped_cross_entropy import softcapped_cross_entropy
from train.model.compile import OperatorModule


def softcap(values: Tensor, cap: float) -> Tensor:
    """Compute cap · tanh(values / cap), which lies in (−cap, cap)."""
    return cap * torch.tanh(values / cap)


def head_logits(hidden: Tensor, weight: Tensor, cap: float) -> Tensor:
    """Compute softcapped logits cap · tanh(hidden Wᵀ / cap) `(..., V)` from `hidden` `(..., d)` and W `(V, d)`.

    The product has the dtype of `hidden`. Softcap and result are float32 (float64 for float64 input).
    """
    logits = hidden @ weight.T
    return softcap(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)


class Head(OperatorModule):
    """The loss of softcapped logits. This module has no parameters, because its weight is the tied embedding."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy in nats per token, a float32 scalar (float64 for float64 input).

        `hidden` is `(M, d)`, `weight` `(V, d)`, and `targets` `(M,)`.
        """
        if "softcapped_cross_entropy" in self.written_out:
            return F.cross_entropy(head_logits(hidden, weight, self.cap), targets.long())
        return softcapped_cross_entropy(hidden, weight, targets, softcap=self.cap, reduction="mean")

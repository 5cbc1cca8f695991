"""The head: logits from the tied embedding, capped softly."""

from __future__ import annotations

import torch
from torch import Tensor


def softcap(values: Tensor, cap: float) -> Tensor:
    """cap · tanh(values / cap), which stays inside (−cap, cap)."""
    return cap * torch.tanh(values / cap)


def head_logits(hidden: Tensor, weight: Tensor, cap: float) -> Tensor:
    """Softcapped logits: cap · tanh(hidden Wᵀ / cap), the product in the compute dtype, the cap in float32.

    Args:
        hidden: `(..., d)`, after the final norm.
        weight: `(V, d)` in the dtype of `hidden`.
        cap: softcap.

    Returns:
        `(..., V)` float32; float64 for float64 input.
    """
    logits = hidden @ weight.T
    return softcap(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)

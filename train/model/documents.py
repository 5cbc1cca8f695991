"""Where documents begin in a row of tokens, and which positions may see each other if documents are kept apart."""

from __future__ import annotations

import torch
from torch import Tensor

from train.data.shards import BOS


def document_starts(ids: Tensor) -> Tensor:
    """True where a document begins: ids = BOS.

    Args:
        ids: `(B, T)` token ids.

    Returns:
        `(B, T)` bool.
    """
    return ids == BOS


def document_mask(ids: Tensor) -> Tensor:
    """Causal mask that stays inside documents: key ≤ query, and no document begins between them.

    Args:
        ids: `(B, T)` token ids.

    Returns:
        `(B, 1, T, T)` bool, True where a query (row) may see a key (column); the second dimension is the heads'.
    """
    document = document_starts(ids).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return (same & causal)[:, None]

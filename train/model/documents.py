"""Where documents begin in a row of tokens, and which positions may see each other if documents are kept apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.shards import BOS

# documents of web text are longer on average than this by far; a batch of shorter ones is refused, not merged
MEAN_DOCUMENT_TOKENS = 32


def document_starts(ids: Tensor) -> Tensor:
    """True where a document begins: ids = BOS.

    Args:
        ids: `(B, T)` token ids.

    Returns:
        `(B, T)` bool.
    """
    return ids == BOS


class Documents(NamedTuple):
    """Attention's two ways to stay inside documents: a mask, or the lengths of the pieces to attend in.

    A compiled graph computes only the one that its attention reads.

    Attributes:
        starts: `(B, T)` bool, True where a document begins.
    """

    starts: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> Documents:
        """The documents of `ids` `(B, T)`."""
        return cls(document_starts(ids))

    def mask(self) -> Tensor:
        """Causal mask that stays inside documents: key ≤ query, and no document begins between them.

        Returns:
            `(B, 1, T, T)` bool, True where a query (row) may see a key (column); the second dimension is the heads'.
        """
        document = self.starts.cumsum(dim=1)
        same = document[:, :, None] == document[:, None, :]
        length = self.starts.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.starts.device).tril()
        return (same & causal)[:, None]

    def offsets(self) -> Tensor:
        """Where the pieces begin in the rows laid end to end: every document, and what a row continues of one.

        The number of offsets is the same for every batch of a shape, as a static graph needs: behind the last piece
        they repeat the end, which makes empty pieces.

        Returns:
            `(B + ⌈B T / 32⌉ + 1,)` int32, from 0 to B · T.

        Raises:
            RuntimeError: more documents than that, on the device as soon as the work arrives there.
        """
        batch, length = self.starts.shape
        begins = self.starts.clone()
        begins[:, 0] = True
        most = batch + -(-batch * length // MEAN_DOCUMENT_TOKENS)
        flat = begins.flatten()
        torch._assert_async(
            flat.sum() <= most,
            f"document_masking: more than {most} documents in {batch} x {length} tokens, shorter than {MEAN_DOCUMENT_TOKENS} "
            "tokens on average: use an attention back end with a mask, ATTENTION=sdpa",
        )
        places = torch.nonzero_static(flat, size=most, fill_value=flat.numel()).flatten()
        # a constant of the host would be waited for in every layer
        return F.pad(places, (0, 1), value=flat.numel()).int()

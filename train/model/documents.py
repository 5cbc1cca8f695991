"""Documents in a batch of tokens, and attention that stays inside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.shards import BOS

# web documents are far longer on average; a batch of shorter ones is an error
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
    """The documents of a batch, as a mask or as offsets, whichever an attention backend takes.

    A compiled graph computes only the one that it uses.

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
        """Offsets of the sequences to attend in, in the flattened batch: every document, cut at the ends of rows.

        A static graph needs a fixed number of offsets; unused ones repeat the end, as empty sequences.

        Returns:
            `(B + ⌈B T / 32⌉ + 1,)` int32, from 0 to B · T.

        Raises:
            RuntimeError: more documents than that; on a GPU asynchronously.
        """
        batch, length = self.starts.shape
        begins = self.starts.clone()
        begins[:, 0] = True
        most = batch + -(-batch * length // MEAN_DOCUMENT_TOKENS)
        flat = begins.flatten()
        torch._assert_async(
            flat.sum() <= most,
            f"document_masking: more than {most} documents in {batch} x {length} tokens, shorter than {MEAN_DOCUMENT_TOKENS} "
            "tokens on average: use an attention backend with a mask, ATTENTION=sdpa",
        )
        places = torch.nonzero_static(flat, size=most, fill_value=flat.numel()).flatten()
        # padded on the device: a host constant would synchronize in every layer
        return F.pad(places, (0, 1), value=flat.numel()).int()

"""Finds the documents in a batch of tokens, so that attention stays inside each document."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.shards import BOS

# smallest allowed mean length of a batch's documents; web documents are far longer
MEAN_DOCUMENT_TOKENS = 32


def document_starts(ids: Tensor) -> Tensor:
    """Return `(B, T)` bool: True where a document begins, that is, where the token is BOS."""
    return ids == BOS


class Documents(NamedTuple):
    """The documents of a batch, for attention backends: as a mask or as offsets."""

    starts: Tensor  # (B, T) bool, True where a document begins
    longest: int = 0  # no document is longer; 0: no document is longer than a row

    @classmethod
    def of(cls, ids: Tensor, longest: int = 0) -> Documents:
        """Find the documents of `ids` `(B, T)`. If `longest` is not 0, longer documents are cut into several ones."""
        starts = document_starts(ids)
        if not longest:
            return cls(starts)
        positions = torch.arange(ids.shape[1], device=ids.device)
        begins = torch.where(starts, positions, 0).cummax(dim=1).values
        return cls((positions - begins) % longest == 0, longest)

    def mask(self) -> Tensor:
        """Return `(B, 1, T, T)` bool: True where a query (row) sees a key (column).

        A query sees the keys of its document at its own and earlier positions.
        """
        document = self.starts.cumsum(dim=1)
        same = document[:, :, None] == document[:, None, :]
        length = self.starts.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.starts.device).tril()
        return (same & causal)[:, None]

    def offsets(self) -> Tensor:
        """Return the offsets of the documents in the flattened batch, `(B + ⌈B T / 32⌉ + 1,)` int32 from 0 to B · T.

        A document ends at the end of its row. A static graph needs a fixed number of offsets, so surplus offsets repeat
        the last offset, which means empty sequences.

        Raises:
            RuntimeError: there are too many documents. A GPU raises the error asynchronously.
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
        offsets = torch.nonzero_static(flat, size=most, fill_value=flat.numel()).flatten()
        # F.pad works on the device; a constant from the host would synchronize in every layer
        return F.pad(offsets, (0, 1), value=flat.numel()).int()

from __future__ import annotations

import pytest
import torch

from train.model.documents import MEAN_DOCUMENT_TOKENS, Documents, document_starts

IDS = torch.tensor([[1, 5, 6, 1, 7], [8, 9, 1, 1, 4]])


def test_mask_is_causal_and_stays_inside_documents() -> None:
    document_of = [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    expected = torch.tensor(
        [[[documents[k] == documents[q] and k <= q for k in range(5)] for q in range(5)] for documents in document_of]
    )
    assert torch.equal(Documents.of(IDS).mask(), expected[:, None])
    assert document_starts(IDS).tolist() == [[True, False, False, True, False], [False, False, True, True, False]]


def test_offsets_cut_at_documents_and_rows_and_end_in_empty_documents() -> None:
    ids = torch.full((2, 64), 9)
    ids[0, 7] = ids[0, 40] = ids[1, 0] = 1
    offsets = Documents.of(ids).offsets()
    assert offsets.dtype == torch.int32
    assert len(offsets) == 2 + 128 // MEAN_DOCUMENT_TOKENS + 1
    assert offsets.tolist() == [0, 7, 40, 64, 128, 128, 128]


def test_more_documents_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"more than 4 documents in 2 x 32 tokens.*ATTENTION"):
        Documents.of(torch.ones(2, 32, dtype=torch.long)).offsets()

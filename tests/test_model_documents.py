from __future__ import annotations

import torch

from train.model.documents import document_mask, document_starts


def test_mask_is_causal_and_stays_inside_documents() -> None:
    ids = torch.tensor([[1, 5, 6, 1, 7], [8, 9, 1, 1, 4]])
    document_of = [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    expected = torch.tensor(
        [[[documents[k] == documents[q] and k <= q for k in range(5)] for q in range(5)] for documents in document_of]
    )
    assert torch.equal(document_mask(ids), expected[:, None])
    assert document_starts(ids).tolist() == [[True, False, False, True, False], [False, False, True, True, False]]

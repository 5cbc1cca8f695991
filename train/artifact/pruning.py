"""Pruning, the published last resort if an artifact is too large: codes ±1 in the rows of smallest scale become 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from train.artifact.storage import EncodedArtifact
from train.quantize.tensors import QuantizedTensor, StoredTensors

# the search finds the number of codes to one part in this many
_RESOLUTION = 4096


def count_ones(tensors: Mapping[str, object]) -> int:
    """Number of codes that are 1 or −1."""
    return sum(int((tensor.codes.abs() == 1).sum()) for tensor in _coded(tensors).values())


def prune_ones(tensors: StoredTensors, count: int) -> StoredTensors:
    """A copy of `tensors` in which the `count` codes ±1 with the least squared error, scale² each, are 0.

    Rows of equal scale go in the tensors' order, codes of a row from the left; float16 tensors are not pruned.

    Source: #1392, which also prunes its int8 tables, and first, as their scales are smaller. #1471 has the same order and
    prunes no tables.
    """
    coded = _coded(tensors)
    if not coded:
        return dict(tensors)
    ones = {name: tensor.codes.abs() == 1 for name, tensor in coded.items()}
    scales = torch.cat([tensor.scales.float() for tensor in coded.values()])
    per_row = torch.cat([mask.sum(dim=1) for mask in ones.values()])
    order = scales.argsort(stable=True)
    before = torch.empty_like(per_row)
    before[order] = per_row[order].cumsum(0) - per_row[order]
    # each row takes what the rows before it left of the count
    quota = (count - before).clamp(min=0)
    pruned = dict(tensors)
    first = 0
    for name, tensor in coded.items():
        rows = quota[first : first + len(tensor.codes)]
        first += len(tensor.codes)
        gone = ones[name] & (ones[name].cumsum(dim=1) <= rows[:, None])
        pruned[name] = QuantizedTensor(tensor.codes.masked_fill(gone, 0), tensor.scales, tensor.bits)
    return pruned


def prunes_needed(
    tensors: StoredTensors,
    max_bytes: int,
    encode: Callable[[StoredTensors], EncodedArtifact],
    encoded: EncodedArtifact | None = None,
) -> tuple[int, EncodedArtifact]:
    """How many codes ±1 to prune until the encoded model has at most `max_bytes`, and the artifact after pruning.

    Bisection finds a count that fits, to one part in 4,096 of all such codes; 0 if the model fits already, all of them if
    that is not enough. `encoded` is the artifact of `tensors`, if already made.
    """
    encoded = encoded or encode(tensors)
    if len(encoded.data) <= max_bytes:
        return 0, encoded
    total = count_ones(tensors)
    step = max(total // _RESOLUTION, 1)
    over, fits = 0, -(-total // step)
    encoded = encode(prune_ones(tensors, total))
    if len(encoded.data) > max_bytes:
        return total, encoded
    while fits - over > 1:
        middle = (over + fits) // 2
        tried = encode(prune_ones(tensors, middle * step))
        if len(tried.data) <= max_bytes:
            fits, encoded = middle, tried
        else:
            over = middle
    return min(fits * step, total), encoded


def _coded(tensors: Mapping[str, object]) -> dict[str, QuantizedTensor]:
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}

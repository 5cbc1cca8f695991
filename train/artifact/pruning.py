"""Prunes an artifact that is too large: sets codes ±1 to 0, first in rows with small scales (#1392, #1471)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from train.artifact.storage import EncodedArtifact
from train.quantize.tensors import QuantizedTensor, StoredTensors

# number of steps of the search: each is 1/4096 of all codes ±1
_RESOLUTION = 4096
# pruning a larger part of all codes gives a warning
_LARGE_PART = 0.1


def count_ones(tensors: Mapping[str, object]) -> int:
    """Return the number of codes 1 and −1 in all tensors."""
    return sum(int((tensor.codes.abs() == 1).sum()) for tensor in _coded(tensors).values())


def prune_ones(tensors: StoredTensors, count: int) -> StoredTensors:
    """Set `count` of the codes ±1 to 0, first those that add the least squared error, scale² per code. Return a copy.

    Rows of equal scale are pruned in the order of the tensors. Within a row, codes are pruned from left to right.

    Source: #1392, which also prunes its int8 embeddings; they come first, because their scales are smaller. #1471 has
    the same order, but prunes no embeddings.
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
    # number of codes to prune in each row: the part of `count` that the earlier rows have not used
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
    note: Callable[[str], object] = lambda _: None,
) -> tuple[int, EncodedArtifact]:
    """Find how many codes ±1 must be pruned so that the artifact takes at most `max_bytes`.

    The number is 0 if the artifact is small enough already, and the number of all codes ±1 if even this does not
    suffice. Otherwise it is found by bisection, rounded up to a multiple of 1/4096 of all codes ±1.

    `encoded` is the artifact of `tensors`, if already made. `note` receives one line per attempt.

    Returns:
        The number, and the artifact after pruning.
    """

    def attempt(count: int) -> EncodedArtifact:
        started = time.perf_counter()
        made = encode(prune_ones(tensors, count))
        note(
            f"prune:tried {count} codes ±1: model of {len(made.data)} bytes, at most {max_bytes} fit, encoded in "
            f"{time.perf_counter() - started:.1f}s"
        )
        return made

    encoded = encoded or encode(tensors)
    if len(encoded.data) <= max_bytes:
        return 0, encoded
    total = count_ones(tensors)
    step = max(total // _RESOLUTION, 1)
    over, fits = 0, -(-total // step)
    encoded = attempt(total)
    if len(encoded.data) > max_bytes:
        return total, encoded
    while fits - over > 1:
        middle = (over + fits) // 2
        tried = attempt(middle * step)
        if len(tried.data) <= max_bytes:
            fits, encoded = middle, tried
        else:
            over = middle
    return min(fits * step, total), encoded


def warn_of_large_part(tensors: Mapping[str, object], count: int, note: Callable[[str], object]) -> None:
    """Give `note` a warning if pruning `count` codes sets a large part of all codes to 0."""
    part = count / max(sum(tensor.codes.numel() for tensor in _coded(tensors).values()), 1)
    if part > _LARGE_PART:
        note(
            f"warning: pruning sets {100 * part:.0f} % of all codes to 0, so the score may be much worse: raise the target, or "
            "train a smaller model"
        )


def _coded(tensors: Mapping[str, object]) -> dict[str, QuantizedTensor]:
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}

"""A slow evaluation as the truth for tests: one window and one token at a time, from full logits."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from train.data.tokenizer import ByteTables


def plain_windows(total: int, length: int, stride: int, rule: str) -> Iterator[tuple[int, list[int]]]:
    """Yields the start of each window and the targets that it scores, by the published rules."""
    start = 0
    while True:
        end = min(start + length, total)
        if stride == 0:
            if start >= total:
                return
            yield start, list(range(start, end))
            start += length
            continue
        if rule == "once":
            if start > 0 and start + length - stride >= total:
                return
            scored = range(start if start == 0 else start + length - stride, end)
        elif rule == "overlap_tail":
            if start >= total:
                return
            scored = range(start if start == 0 else max(end - stride, start), end)
        else:
            if start + length > total:
                return
            scored = range(end - stride, end)
        yield start, list(scored)
        start += stride


def plain_bytes(tokens: np.ndarray, tables: ByteTables) -> np.ndarray:
    """The bytes of each token but the first, by the published rule."""
    sizes = []
    for previous, target in itertools.pairwise(tokens.tolist()):
        space = bool(tables.has_leading_space[target]) and not bool(tables.is_boundary[previous])
        sizes.append(int(tables.base_bytes[target]) + int(space))
    return np.array(sizes)


def plain_score(
    model: Any, tokens: np.ndarray, sizes: np.ndarray, length: int, stride: int, rule: str, softcap: float
) -> tuple[float, int, int]:
    """The nats, tokens and bytes of a text, scored one window and one token at a time from full logits.

    `sizes` are the bytes of each target.
    """
    nats, count, size = 0.0, 0, 0
    total = len(tokens) - 1
    for start, scored in plain_windows(total, length, stride, rule):
        inputs = [int(token) for token in tokens[start : min(start + length, total)]]
        # windows are padded as in the published scripts, because the rotary base depends on their length
        ids = torch.tensor([inputs + [0] * (length - len(inputs))])
        with torch.no_grad():
            logits = model.hidden(ids, recurrence=True)[0] @ model.head_weight.T
        z = (softcap * torch.tanh(logits / softcap)).double()
        for index in scored:
            target = int(tokens[index + 1])
            row = z[index - start]
            nats += math.log(sum(math.exp(float(value)) for value in row)) - float(row[target])
            count += 1
            size += int(sizes[index])
    return nats, count, size

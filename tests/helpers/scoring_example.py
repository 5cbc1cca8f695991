"""A model and a text for the tests of scoring, small enough for the slow loop of `plain_evaluation`."""

import numpy as np
import torch
from torch import Tensor, nn

from train.config import Config

VOCAB = 37
CONFIG = Config(vocab_size=259)


class StandIn(nn.Module):
    """A model that predicts from the mean of the window's tokens so far and from the position in the window."""

    def __init__(self, longest: int = 64, dim: int = 12) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.head_weight = nn.Parameter(torch.randn(VOCAB, dim))
        self.place = nn.Parameter(torch.randn(longest, dim))
        self.mix = nn.Parameter(torch.randn(dim, dim) / 3)
        self.seen: list[Tensor] = []
        self.rows_from: list[int] = []
        self.modes: set[tuple[bool, bool]] = set()

    overlap_problem = "windows share nothing here"

    def overlapping_hidden(self, text: Tensor, **options: object) -> Tensor:
        raise AssertionError("asked for in spite of overlap_problem")

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        return {tuple(ids.shape) for ids in self.seen}

    def hidden(self, ids: Tensor, *, recurrence: bool, rows_from: int = 0) -> Tensor:
        self.seen.append(ids)
        self.rows_from.append(rows_from)
        self.modes.add((recurrence, self.training))
        count = torch.arange(1, ids.shape[1] + 1)[:, None]
        mean = self.head_weight[ids].cumsum(1) / count
        return torch.tanh((mean + self.place[: ids.shape[1]])[:, rows_from:] @ self.mix) * 2


def make_text(count: int, seed: int = 0, vocab_size: int = VOCAB) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, and the bytes of each but the first."""
    random = np.random.default_rng(seed)
    return random.integers(0, vocab_size, count).astype(np.uint16), random.integers(1, 9, count - 1).astype(np.uint16)

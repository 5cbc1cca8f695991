"""The batches that ways of taking a step are measured with: random tokens with something to learn in them, or a dataset's."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from train.config import MICRO_BATCHES, Config
from train.data.loaders import Batch, Stream, unpack
from train.data.shards import find_shards

CPU = torch.device("cpu")


def rank_sequences(config: Config) -> int:
    """Sequences of one GPU's share of a step."""
    return config.train_batch_tokens // (MICRO_BATCHES * config.train_seq_len)


def token_source(config: Config, data: Path | None, device: torch.device) -> Tokens:
    """The share's tokens from the first on, of the shards in a folder or made, from where the device takes them."""
    return MadeTokens(config, device=device) if data is None else ShardTokens(config, data, device)


class Tokens(Protocol):
    """Where batches come from: `(sequences, length + 1)` uint16 each."""

    def next(self) -> np.ndarray: ...


class MadeTokens:
    """Random tokens in the place of a loader, so that a step is measured and not a disk.

    Half of them follow from the one before, by a fixed permutation of the vocabulary; the others are Zipf-like, as text is.
    So there is something to learn that no embedding can hold alone.
    """

    def __init__(self, config: Config, seed: int = 0, device: torch.device = CPU) -> None:
        self.shape = (rank_sequences(config), config.train_seq_len + 1)
        self.vocab_size, self.device = config.vocab_size, device
        self.generator = np.random.default_rng(seed)
        self.follower = self.generator.permutation(config.vocab_size)

    def next(self) -> np.ndarray:
        """`(sequences, length + 1)` uint16."""
        tokens = np.minimum(self.generator.zipf(1.2, self.shape), self.vocab_size - 1)
        follows = self.generator.random(self.shape) < 0.5
        for place in range(1, self.shape[1]):
            tokens[:, place] = np.where(follows[:, place], self.follower[tokens[:, place - 1]], tokens[:, place])
        return loaded(tokens.astype(np.uint16), self.device)


class ShardTokens:
    """The tokens of a dataset's training shards, in their order."""

    def __init__(self, config: Config, folder: Path, device: torch.device = CPU) -> None:
        self.stream = Stream(find_shards(folder, "train"), config.vocab_size)
        self.shape, self.device = (rank_sequences(config), config.train_seq_len + 1), device
        self.place = 0

    def next(self) -> np.ndarray:
        """`(sequences, length + 1)` uint16."""
        rows = self.stream.span(self.place, self.shape[0] * self.shape[1])
        self.place += len(rows)
        return loaded(rows.reshape(self.shape), self.device)


def loaded(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """The rows in pinned memory where the device is a GPU: there the trainer's thread has them before a step begins."""
    if device.type != "cuda":
        return rows
    return torch.from_numpy(rows.view(np.int16)).pin_memory().numpy().view(np.uint16)


class OneBatch:
    """A loader that gives one batch, and sends it to the device as the trainer's does."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        self.rows, self.device = torch.from_numpy(tokens.view(np.int16)), device

    def next_batch(self) -> list[Batch]:
        return [unpack(self.rows, self.device)]

"""Token batches for the benchmarks of training steps: random tokens, or tokens from a dataset's shards."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from train.common.distributed import MICRO_BATCHES
from train.config import Config
from train.data.loaders import Batch, unpack
from train.data.orders import TrainingShards
from train.data.shards import find_shards

CPU = torch.device("cpu")


def rank_sequences(config: Config) -> int:
    """Returns the number of sequences that each of 8 ranks takes from a batch."""
    return config.train_batch_tokens // (MICRO_BATCHES * config.train_seq_len)


def token_source(config: Config, data: Path | None, device: torch.device) -> Tokens:
    """Returns a source of one rank's batches: the shards in the folder `data`, or random tokens if that is None."""
    return MadeTokens(config, device=device) if data is None else ShardTokens(config, data, device)


class Tokens(Protocol):
    """A source of batches. A batch is a uint16 array `(sequences, length + 1)` of token ids."""

    def next(self) -> np.ndarray: ...


class MadeTokens:
    """Random tokens. Half are Zipf-distributed. Half follow from the previous token by a fixed permutation.

    The permutation gives a model something to learn.
    """

    def __init__(self, config: Config, seed: int = 0, device: torch.device = CPU) -> None:
        self.shape = (rank_sequences(config), config.train_seq_len + 1)
        self.vocab_size, self.device = config.vocab_size, device
        self.generator = np.random.default_rng(seed)
        self.follower = self.generator.permutation(config.vocab_size)

    def next(self) -> np.ndarray:
        tokens = np.minimum(self.generator.zipf(1.2, self.shape), self.vocab_size - 1)
        follows = self.generator.random(self.shape) < 0.5
        for place in range(1, self.shape[1]):
            tokens[:, place] = np.where(follows[:, place], self.follower[tokens[:, place - 1]], tokens[:, place])
        return loaded(tokens.astype(np.uint16), self.device)


class ShardTokens:
    """The tokens of a dataset's training shards, in order."""

    def __init__(self, config: Config, folder: Path, device: torch.device = CPU) -> None:
        self.shards = TrainingShards(find_shards(folder, "train"), config.vocab_size)
        self.shape, self.device = (rank_sequences(config), config.train_seq_len + 1), device
        self.place = 0

    def next(self) -> np.ndarray:
        rows = self.shards.span(self.place, self.shape[0] * self.shape[1])
        self.place += len(rows)
        return loaded(rows.reshape(self.shape), self.device)


def loaded(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Returns the rows in pinned memory if the device is a GPU, as the trainer's loader thread does."""
    if device.type != "cuda":
        return rows
    return torch.from_numpy(rows.view(np.int16)).pin_memory().numpy().view(np.uint16)


class OneBatch:
    """A loader that always returns the same batch. It copies the batch to the device as the trainer's loader does."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        self.rows, self.device = torch.from_numpy(tokens.view(np.int16)), device

    def next_batch(self) -> list[Batch]:
        return [unpack(self.rows, self.device)]

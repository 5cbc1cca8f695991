"""Loads training tokens in an order of `train.data.orders`, which does not depend on the number of ranks.

A step has 8 equal micro-batches, because the published runs have 8 ranks. Rank r of W ranks takes micro-batches r, r +
W, … Therefore every step has the same tokens for any W, and W = 8 gives exactly the published order.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from train.common.distributed import MICRO_BATCHES, Ranks
from train.common.errors import UserError
from train.config import Config
from train.data.orders import LOADERS, Order, Packed, State, TrainingShards

# largest joined batch on a CPU. Larger batches are not faster. This size needs at most 2 GB in a published model.
CPU_BATCH_TOKENS = 4096

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchSource(Protocol):
    """An object that returns the batches of each training step."""

    def next_batch(self) -> list[Batch]: ...


class Loader:
    """Returns the micro-batches of one rank, while a thread prepares those of the next step.

    Batches go to a CUDA device asynchronously, as 16-bit integers from pinned memory.
    """

    def __init__(self, order: Order, ranks: Ranks) -> None:
        self.order, self.device = order, ranks.device
        self.micro_batches = range(ranks.rank, MICRO_BATCHES, ranks.world_size)
        self.state = order.state_dict()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pending: Future[tuple[list[torch.Tensor], State]] | None = None

    def next_batch(self) -> list[Batch]:
        """Return this rank's 8 / world_size micro-batches: inputs and targets, each `(sequences, seq_len)` int64."""
        rows, self.state = (self.pending or self.thread.submit(self._prepare)).result()
        self.pending = self.thread.submit(self._prepare)
        return [unpack(row, self.device) for row in rows]

    def state_dict(self) -> State:
        """Return the state of the order after the last returned batch, as numbers, strings and lists."""
        return self.state

    def load_state_dict(self, state: State) -> None:
        """Continue exactly after the batch at which `state_dict` was called."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
        self.order.load_state_dict(state)
        self.state = self.order.state_dict()

    def skip(self, steps: int) -> int:
        """Leave out the batches of the next steps. Returns the number of their tokens."""
        self.load_state_dict({**self.state, "step": self.state["step"] + steps})
        return steps * MICRO_BATCHES * (self.order.sequences * self.order.seq_len + 1)

    def _prepare(self) -> tuple[list[torch.Tensor], State]:
        rows = [torch.from_numpy(np.array(row).view(np.int16)) for row in self.order.next_rows(self.micro_batches)]
        if self.device.type == "cuda":
            rows = [row.pin_memory() for row in rows]
        return rows, self.order.state_dict()


def join_micro_batches(batches: list[Batch]) -> list[Batch]:
    """On a CPU, join micro-batches into equal batches of up to `CPU_BATCH_TOKENS` tokens. On a GPU, do nothing.

    All batches have the same number of tokens, so the mean of their losses equals the mean of the micro-batches'
    losses.
    """
    inputs, count = batches[0][0], len(batches)
    fitting = CPU_BATCH_TOKENS // inputs.numel() if inputs.is_cpu else 1
    each = max((divisor for divisor in range(1, count + 1) if divisor <= fitting and count % divisor == 0), default=1)
    if each == 1:
        return batches
    groups = [zip(*batches[start : start + each], strict=True) for start in range(0, count, each)]
    return [(torch.cat(inputs), torch.cat(targets)) for inputs, targets in groups]


def unpack(row: torch.Tensor, device: torch.device) -> Batch:
    """Convert rows `(sequences, seq_len + 1)` int16 to inputs and targets `(sequences, seq_len)` int64 on `device`."""
    # torch supports few operations on uint16, so the tokens are sent as int16. The mask removes the sign.
    ids = row.to(device, non_blocking=True).to(torch.int64) & 0xFFFF
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def micro_batch_sequences(config: Config) -> int:
    return config.train_batch_tokens // (MICRO_BATCHES * config.train_seq_len)


def check_batch(config: Config) -> None:
    """Raise a UserError if a step is not 8 micro-batches of whole sequences."""
    tokens = MICRO_BATCHES * config.train_seq_len
    if config.train_batch_tokens % tokens:
        raise UserError(
            f"train_batch_tokens {config.train_batch_tokens} is not a multiple of {MICRO_BATCHES} · train_seq_len {config.train_seq_len} "
            f"= {tokens}: a step is {MICRO_BATCHES} micro-batches of whole sequences; change TRAIN_BATCH_TOKENS or TRAIN_SEQ_LEN"
        )
    for length, _ in config.seq_lengths:
        if config.train_batch_tokens % (MICRO_BATCHES * length):
            raise UserError(
                f"train_seq_schedule: {MICRO_BATCHES} micro-batches of train_batch_tokens {config.train_batch_tokens} are no whole "
                f"sequences of {length} tokens: change TRAIN_BATCH_TOKENS or TRAIN_SEQ_SCHEDULE"
            )


def make_loader(shards: TrainingShards, config: Config, ranks: Ranks) -> Loader:
    """Make a loader with the order that `config.loader` names. It begins with the first batch.

    Raises:
        UserError: the shards contain less than one sequence, or `check_batch` raises it.
    """
    check_batch(config)
    longest = shards.total if config.loader == "sequential" else int(shards.lengths.max())
    if longest < config.train_seq_len + 1:
        raise UserError(
            f"{config.data_path}: its training shards hold {longest} tokens in a row, one sequence needs {config.train_seq_len + 1}: "
            "choose a smaller TRAIN_SEQ_LEN, or build the dataset with more text"
        )
    order = LOADERS[config.loader](shards, config.train_seq_len, micro_batch_sequences(config), config.seed)
    if isinstance(order, Packed) and not order.ends[-1]:
        raise UserError(
            f"{config.data_path}: no training shard holds {MICRO_BATCHES * order.row} tokens after its first document, which a step of "
            "loader packed needs: set LOADER=sequential, choose a smaller TRAIN_BATCH_TOKENS, or build the dataset with more text"
        )
    return Loader(order, ranks)

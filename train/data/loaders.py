"""The order in which training tokens are seen, the same at any number of ranks.

A step is cut into 8 equal shares, as the published runs have 8 ranks; rank r of W takes shares r, r + W, … as its 8 / W
micro-batches. So one process and eight see the same tokens in every step, and W = 8 is exactly the published order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from train.common.errors import UserError
from train.config import MICRO_BATCHES, Config
from train.data.shards import Tokens, check_tokens, find_shards, read_shard

Batch = tuple[torch.Tensor, torch.Tensor]
State = dict[str, Any]
Integers = npt.NDArray[np.int64]


class Stream:
    """A dataset's training shards, mapped into memory and addressed as one row of tokens.

    Args:
        paths: shards in order.
        vocab_size: tokens read are checked against it.
    """

    def __init__(self, paths: list[Path], vocab_size: int) -> None:
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [read_shard(path) for path in paths]
        self.lengths = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)

    @property
    def total(self) -> int:
        return int(self.ends[-1])

    def span(self, start: int, length: int) -> Tokens:
        """`(length,)` tokens from position `start` on; the row begins anew at its end, as often as needed."""
        parts, position = [], start % self.total
        while length:
            shard = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - int(self.ends[shard] - self.lengths[shard])
            parts.append(self.window(shard, offset, min(length, int(self.lengths[shard]) - offset)))
            length -= len(parts[-1])
            position = (position + len(parts[-1])) % self.total
        return np.concatenate(parts)

    def window(self, shard: int, offset: int, length: int) -> Tokens:
        """`(length,)` tokens inside one shard."""
        tokens = self.shards[shard][offset : offset + length]
        check_tokens(tokens, self.vocab_size, self.paths[shard])
        return tokens


class Order(ABC):
    """Which tokens each share of each step holds. Rows are one longer than a sequence: inputs and targets overlap.

    Args:
        stream: the training tokens.
        seq_len: tokens per sequence.
        sequences: sequences per share.
        seed: the run's seed.
    """

    def __init__(self, stream: Stream, seq_len: int, sequences: int, seed: int) -> None:
        self.stream, self.seq_len, self.sequences, self.seed = stream, seq_len, sequences, seed
        self.step = 0

    @abstractmethod
    def next_rows(self, shares: range) -> list[Tokens]:
        """The next step's rows, `(sequences, seq_len + 1)` uint16 for each of `shares`."""

    def state_dict(self) -> State:
        return {"step": self.step, "tokens": self.stream.total}

    def load_state_dict(self, state: State) -> None:
        if state["tokens"] != self.stream.total:
            raise UserError(
                f"the checkpoint's loader walked {state['tokens']} training tokens, data_path holds {self.stream.total}: "
                "resume with the same DATA_PATH"
            )
        self.step = int(state["step"])

    def _windows(self, places: list[tuple[int, int]]) -> Tokens:
        return np.stack([self.stream.window(shard, offset, self.seq_len + 1) for shard, offset in places])


class Sequential(Order):
    """The token stream in its order: with L tokens per share, share v of step s is span [(8s + v)(L + 1), +L + 1).

    Consecutive spans have no token in common, so the first token of a span is an input but never a target. The stream
    begins anew at its end.
    """

    def next_rows(self, shares: range) -> list[Tokens]:
        length = self.sequences * self.seq_len
        rows = []
        for share in shares:
            span = self.stream.span((self.step * MICRO_BATCHES + share) * (length + 1), length + 1)
            rows.append(np.lib.stride_tricks.sliding_window_view(span, self.seq_len + 1)[:: self.seq_len])
        self.step += 1
        return rows


class Shuffled(Order):
    """All windows of all shards in a random order, a fresh one and freshly cut ones in each epoch.

    Epoch e draws from PCG64 of (seed, e) where each shard's windows begin and the permutation of all windows. Windows
    that are needed for a step are dealt to the shares in turn.
    """

    def __init__(self, stream: Stream, seq_len: int, sequences: int, seed: int) -> None:
        super().__init__(stream, seq_len, sequences, seed)
        self.counts = (stream.lengths - 1) // seq_len
        self.ends = np.cumsum(self.counts)
        self.epochs: dict[int, tuple[Integers, Integers]] = {}

    def next_rows(self, shares: range) -> list[Tokens]:
        first = self.step * MICRO_BATCHES * self.sequences
        # a step at the end of an epoch reaches into the next one
        self.epochs = {epoch: drawn for epoch, drawn in self.epochs.items() if epoch >= first // int(self.ends[-1])}
        numbers = range(first, first + MICRO_BATCHES * self.sequences)
        self.step += 1
        return [self._windows([self._place(number) for number in numbers[share::MICRO_BATCHES]]) for share in shares]

    def _place(self, number: int) -> tuple[int, int]:
        epoch, index = divmod(number, int(self.ends[-1]))
        if epoch not in self.epochs:
            self.epochs[epoch] = self._draw(epoch)
        phases, permutation = self.epochs[epoch]
        window = int(permutation[index])
        shard = int(np.searchsorted(self.ends, window, side="right"))
        block = window - int(self.ends[shard] - self.counts[shard])
        return shard, int(phases[shard]) + block * self.seq_len

    def _draw(self, epoch: int) -> tuple[Integers, Integers]:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        slack = np.maximum(self.stream.lengths - 1 - self.counts * self.seq_len, 0)
        return random.integers(0, slack + 1), random.permutation(int(self.ends[-1]))


class Coprime(Order):
    """The coprime-stride order of #1471: each step mixes many shards, and walks each in a stride coprime to its blocks.

    A PCG64 generator is seeded with FNV-1a of the shards' names; as published, the run's seed plays no part. A shard is
    walked as phase + ((start + i·stride) mod blocks)·seq_len with random phase, start and stride, drawn anew when it is
    used up. A step draws its shards with probability ∝ remaining^α, without replacement; with progress p = min(step /
    1800, 1), α is 0.9 - 0.4 p and the number of shards 8 + 56 p, as far as there are any. Each gives one window, the
    rest are dealt by a multinomial; windows are interleaved over the shards and share v takes every 8th.

    Names instead of the published absolute paths make the order independent of where the data lies.
    """

    RAMP_STEPS = 1800

    def __init__(self, stream: Stream, seq_len: int, sequences: int, seed: int) -> None:
        super().__init__(stream, seq_len, sequences, seed)
        self.random = np.random.Generator(
            np.random.PCG64(_fnv1a("\n".join(path.name for path in stream.paths).encode()))
        )
        self.eligible = np.flatnonzero((stream.lengths - 1) // seq_len > 0)
        # columns: phase, start, stride, blocks, blocks taken; zero blocks mean that the walk is not drawn yet
        self.walks = np.zeros((len(stream.shards), 5), dtype=np.int64)

    def next_rows(self, shares: range) -> list[Tokens]:
        places = self._draw_step()
        self.step += 1
        return [self._windows(places[share::MICRO_BATCHES]) for share in shares]

    def state_dict(self) -> State:
        inner = self.random.bit_generator.state
        # 128-bit integers do not survive every serializer as numbers
        words = {name: str(value) for name, value in inner["state"].items()}
        rest = {name: int(inner[name]) for name in ("has_uint32", "uinteger")}
        return super().state_dict() | {"walks": self.walks.tolist(), "random": words | rest}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.walks = np.array(state["walks"], dtype=np.int64)
        saved = state["random"]
        self.random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {name: int(saved[name]) for name in ("state", "inc")},
            "has_uint32": saved["has_uint32"],
            "uinteger": saved["uinteger"],
        }

    def _draw_step(self) -> list[tuple[int, int]]:
        needed = MICRO_BATCHES * self.sequences
        progress = min(self.step / self.RAMP_STEPS, 1.0)
        blocks, taken = self.walks[self.eligible, 3], self.walks[self.eligible, 4]
        unseen = (self.stream.lengths[self.eligible] - 1) // self.seq_len
        remaining = np.where(blocks > 0, np.maximum(blocks - taken, 1), unseen).astype(np.float64)
        weights = remaining ** (0.9 - 0.4 * progress)
        chances = weights / weights.sum()
        mixed = min(round(MICRO_BATCHES + progress * (8 * MICRO_BATCHES - MICRO_BATCHES)), len(self.eligible), needed)
        drawn = self.random.choice(len(self.eligible), size=mixed, replace=False, p=chances)
        extra = self.random.multinomial(needed - mixed, chances[drawn] / chances[drawn].sum())
        queues = [
            self._walk(int(self.eligible[index]), 1 + int(more)) for index, more in zip(drawn, extra, strict=True)
        ]
        places: list[tuple[int, int]] = []
        while queues:
            for index in self.random.permutation(len(queues)):
                places.append(queues[index].pop())
            queues = [queue for queue in queues if queue]
        return places

    def _walk(self, shard: int, count: int) -> list[tuple[int, int]]:
        offsets = []
        for _ in range(count):
            if self.walks[shard, 4] >= self.walks[shard, 3]:
                self._begin_walk(shard)
            phase, start, stride, blocks, taken = (int(value) for value in self.walks[shard])
            offsets.append(phase + (start + taken * stride) % blocks * self.seq_len)
            self.walks[shard, 4] += 1
        return [(shard, offsets[index]) for index in self.random.permutation(count)]

    def _begin_walk(self, shard: int) -> None:
        length = int(self.stream.lengths[shard])
        phase = int(self.random.integers(min(self.seq_len, length - self.seq_len)))
        blocks = (length - 1 - phase) // self.seq_len
        stride = 1
        if blocks > 1:
            stride = int(self.random.integers(1, blocks))
            while math.gcd(stride, blocks) != 1:
                stride = int(self.random.integers(1, blocks))
        self.walks[shard] = phase, int(self.random.integers(blocks)), stride, blocks, 0


class BatchSource(Protocol):
    """What a training step reads."""

    def next_batch(self) -> list[Batch]: ...


class Loader:
    """Serves one rank its micro-batches, building the next step's in a thread while this one's are used.

    Args:
        order: which tokens come when.
        rank, world_size: this process among all; world_size divides 8.
        device: where the batches go. On CUDA they travel as 16-bit integers from pinned memory, asynchronously.
    """

    def __init__(self, order: Order, rank: int, world_size: int, device: torch.device | str = "cpu") -> None:
        self.order, self.shares, self.device = order, range(rank, MICRO_BATCHES, world_size), torch.device(device)
        self.state = order.state_dict()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pending: Future[tuple[list[torch.Tensor], State]] | None = None

    def next_batch(self) -> list[Batch]:
        """The next step's 8 / world_size micro-batches of this rank.

        Returns:
            (inputs, targets), each `(sequences, seq_len)` int64 on the device; targets are the inputs one token later.
        """
        rows, self.state = (self.pending or self.thread.submit(self._prepare)).result()
        self.pending = self.thread.submit(self._prepare)
        return [unpack(row, self.device) for row in rows]

    def state_dict(self) -> State:
        """Where the order stands after the batches that were served; numbers, strings and lists only."""
        return self.state

    def load_state_dict(self, state: State) -> None:
        """Go on exactly where `state_dict` was taken, in the middle of a shard as well."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
        self.order.load_state_dict(state)
        self.state = self.order.state_dict()

    def _prepare(self) -> tuple[list[torch.Tensor], State]:
        rows = [torch.from_numpy(np.array(row).view(np.int16)) for row in self.order.next_rows(self.shares)]
        if self.device.type == "cuda":
            rows = [row.pin_memory() for row in rows]
        return rows, self.order.state_dict()


def unpack(row: torch.Tensor, device: torch.device) -> Batch:
    """Inputs and targets `(sequences, seq_len)` int64 on the device from rows of 16-bit integers, one token longer."""
    # torch has little arithmetic for uint16: the mask undoes the sign
    ids = row.to(device, non_blocking=True).to(torch.int64) & 0xFFFF
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


LOADERS: dict[str, Callable[[Stream, int, int, int], Order]] = {
    "sequential": Sequential,
    "shuffled": Shuffled,
    "coprime": Coprime,
}


def make_loader(config: Config, rank: int, world_size: int, device: torch.device | str = "cpu") -> Loader:
    """The loader that `config.loader` names, over the training shards in `config.data_path`.

    Raises:
        UserError: world_size does not divide 8, the batch does not divide into 8 shares of whole sequences, or the
            shards are missing, bad or shorter than one sequence.
    """
    if world_size < 1 or MICRO_BATCHES % world_size or not 0 <= rank < world_size:
        raise UserError(
            f"world size {world_size} (rank {rank}): expected 1, 2, 4 or 8 processes: a step is cut into 8 equal shares; set --nproc_per_node"
        )
    share = config.train_seq_len * MICRO_BATCHES
    if config.train_batch_tokens % share:
        raise UserError(
            f"train_batch_tokens {config.train_batch_tokens} is not a multiple of 8 · train_seq_len {config.train_seq_len} = {share}: "
            "a step is cut into 8 shares of whole sequences; change TRAIN_BATCH_TOKENS or TRAIN_SEQ_LEN"
        )
    stream = Stream(find_shards(config.data_path, "train"), config.vocab_size)
    longest = stream.total if config.loader == "sequential" else int(stream.lengths.max())
    if longest < config.train_seq_len + 1:
        raise UserError(
            f"{config.data_path}: its training shards hold {longest} tokens in a row, one sequence needs {config.train_seq_len + 1}: "
            "choose a smaller TRAIN_SEQ_LEN, or build the dataset with more text"
        )
    order = LOADERS[config.loader](stream, config.train_seq_len, config.train_batch_tokens // share, config.seed)
    return Loader(order, rank, world_size, device)


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value

"""Orders of the training tokens. None depends on the number of ranks, see `train.data.loaders`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.common.distributed import MICRO_BATCHES
from train.common.errors import UserError
from train.data.shards import BOS, Tokens, check_tokens, read_shard

# tokens that are searched at once for the first document of a shard
_SEARCHED = 1 << 16

State = dict[str, Any]
Integers = npt.NDArray[np.int64]
Start = tuple[int, int]
"""The start of a window: number of the shard, and offset of the window's first token in the shard."""


class TrainingShards:
    """A dataset's training shards, memory-mapped and addressed as one sequence.

    Tokens are checked when they are read.
    """

    def __init__(self, paths: list[Path], vocab_size: int) -> None:
        self.paths, self.vocab_size = paths, vocab_size
        self.tokens = [read_shard(path) for path in paths]
        self.lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)

    @property
    def total(self) -> int:
        return int(self.ends[-1])

    def span(self, start: int, length: int) -> Tokens:
        """Return `(length,)` tokens from position `start` on. The first token follows the last token."""
        parts, position = [], start % self.total
        while length:
            shard = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - int(self.ends[shard] - self.lengths[shard])
            parts.append(self.window(shard, offset, min(length, int(self.lengths[shard]) - offset)))
            length -= len(parts[-1])
            position = (position + len(parts[-1])) % self.total
        return np.concatenate(parts)

    def window(self, shard: int, offset: int, length: int) -> Tokens:
        """Return `(length,)` tokens of one shard from `offset` on."""
        tokens = self.tokens[shard][offset : offset + length]
        check_tokens(tokens, self.vocab_size, self.paths[shard])
        return tokens


class Order(ABC):
    """Chooses the tokens of each micro-batch.

    A micro-batch has `sequences` rows of `seq_len` + 1 tokens. The inputs are all but the last token of a row, the
    targets all but the first.
    """

    def __init__(self, shards: TrainingShards, seq_len: int, sequences: int, seed: int) -> None:
        self.shards, self.seq_len, self.sequences, self.seed = shards, seq_len, sequences, seed
        self.step = 0

    @abstractmethod
    def next_rows(self, micro_batches: range) -> list[Tokens]:
        """Return the rows of the next step: `(sequences, seq_len + 1)` uint16 for each number in `micro_batches`."""

    def state_dict(self) -> State:
        return {"step": self.step, "tokens": self.shards.total}

    def load_state_dict(self, state: State) -> None:
        if state["tokens"] != self.shards.total:
            raise UserError(
                f"the checkpoint was made with {state['tokens']} training tokens, data_path holds {self.shards.total}: "
                "resume with the same DATA_PATH"
            )
        self.step = int(state["step"])

    def _windows(self, starts: list[Start]) -> Tokens:
        return np.stack([self.shards.window(shard, offset, self.seq_len + 1) for shard, offset in starts])


class Sequential(Order):
    """Takes the tokens in the order of the shards.

    A step has 8 micro-batches of L targets. Micro-batch v of step s has L + 1 tokens, from position (8s + v)(L + 1) on.
    Micro-batches do not overlap, so the first token of a micro-batch is never a target.
    """

    def next_rows(self, micro_batches: range) -> list[Tokens]:
        length = self.sequences * self.seq_len
        rows = []
        for number in micro_batches:
            span = self.shards.span((self.step * MICRO_BATCHES + number) * (length + 1), length + 1)
            rows.append(np.lib.stride_tricks.sliding_window_view(span, self.seq_len + 1)[:: self.seq_len])
        self.step += 1
        return rows


class Packed(Order):
    """Takes rows of consecutive tokens of one shard, in the order of the shards, from each shard's first document on.

    A micro-batch is one row of L targets, L = `sequences` · `seq_len`. A step takes the next 8 (L + 1) tokens of a shard.
    If the shard has fewer left, they are skipped.

    Source: submission #1530.
    """

    def __init__(self, shards: TrainingShards, seq_len: int, sequences: int, seed: int) -> None:
        super().__init__(shards, seq_len, sequences, seed)
        self.row = sequences * seq_len + 1
        self.firsts = [first_document(tokens) for tokens in shards.tokens]
        self.counts = (shards.lengths - np.array(self.firsts)) // (MICRO_BATCHES * self.row)
        self.ends = np.cumsum(self.counts)

    def next_rows(self, micro_batches: range) -> list[Tokens]:
        step = self.step % int(self.ends[-1])
        shard = int(np.searchsorted(self.ends, step, side="right"))
        before = step - int(self.ends[shard] - self.counts[shard])
        begin = self.firsts[shard] + before * MICRO_BATCHES * self.row
        self.step += 1
        return [self.shards.window(shard, begin + number * self.row, self.row)[None] for number in micro_batches]


def first_document(tokens: Tokens) -> int:
    """Return the position at which the first document begins, or the number of tokens if none does."""
    for begin in range(0, len(tokens), _SEARCHED):
        found = np.flatnonzero(tokens[begin : begin + _SEARCHED] == BOS)
        if len(found):
            return begin + int(found[0])
    return len(tokens)


class Shuffled(Order):
    """Takes every window of every shard once per epoch, in a random order.

    For epoch e, PCG64 is seeded with (seed, e). It draws the offset of the first window of each shard, and then a
    permutation of all windows. The micro-batches of a step take the step's windows in turn.
    """

    def __init__(self, shards: TrainingShards, seq_len: int, sequences: int, seed: int) -> None:
        super().__init__(shards, seq_len, sequences, seed)
        self.counts = (shards.lengths - 1) // seq_len
        self.ends = np.cumsum(self.counts)
        self.epochs: dict[int, tuple[Integers, Integers]] = {}

    def next_rows(self, micro_batches: range) -> list[Tokens]:
        first = self.step * MICRO_BATCHES * self.sequences
        # keep the current epoch and later ones: the last step of an epoch also takes windows of the next epoch
        self.epochs = {epoch: drawn for epoch, drawn in self.epochs.items() if epoch >= first // int(self.ends[-1])}
        windows = range(first, first + MICRO_BATCHES * self.sequences)
        self.step += 1
        return [
            self._windows([self._start(window) for window in windows[number::MICRO_BATCHES]])
            for number in micro_batches
        ]

    def _start(self, number: int) -> Start:
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
        slack = np.maximum(self.shards.lengths - 1 - self.counts * self.seq_len, 0)
        return random.integers(0, slack + 1), random.permutation(int(self.ends[-1]))


class Coprime(Order):
    """Takes windows in the order of #1471: many shards per step, each with a stride coprime to its window count.

    A shard has `blocks` windows. Window i starts at phase + ((start + i·stride) mod blocks)·seq_len. Phase, start and
    stride are drawn, in this order, before the shard's first window is taken, and again after its last window.

    A step draws 8 + 56 p shards without replacement, where p = min(step / 1800, 1). With fewer than 64 shards, the
    number rises from 8 to all shards. The probability of a shard is proportional to remaining^(0.9 - 0.4 p), where
    `remaining` is the number of its windows that are not taken yet. Each drawn shard gives one window. A multinomial
    draw distributes the other windows of the step over the drawn shards. Then the drawn shards are permuted, and so are
    the windows of each shard.

    The windows are then interleaved in rounds. A round permutes the shards of the previous round, and takes the last
    remaining window of every shard that has one. Micro-batch v takes windows v, v + 8, … of the result.

    All draws are those of the published code at 8 ranks, with one difference. PCG64 is seeded here with a hash of the
    shards' names, and in the published code with a hash of their paths, which changes with the folder. In both, the
    run's seed has no effect.
    """

    RAMP_STEPS = 1800
    FEWEST, MOST = MICRO_BATCHES, 8 * MICRO_BATCHES
    CURSOR = np.dtype([(name, np.int64) for name in ("phase", "start", "stride", "blocks", "taken")])

    def __init__(self, shards: TrainingShards, seq_len: int, sequences: int, seed: int) -> None:
        super().__init__(shards, seq_len, sequences, seed)
        self.names_seed = names_seed([path.name for path in shards.paths])
        self.random = np.random.Generator(np.random.PCG64(self.names_seed))
        self.eligible = np.flatnonzero((shards.lengths - 1) // seq_len > 0)
        # one cursor per shard; 0 blocks: phase, start and stride are not drawn yet
        self.cursors = np.zeros(len(shards.tokens), self.CURSOR)

    def next_rows(self, micro_batches: range) -> list[Tokens]:
        starts = self._draw_step()
        self.step += 1
        return [self._windows(starts[number::MICRO_BATCHES]) for number in micro_batches]

    def state_dict(self) -> State:
        inner = self.random.bit_generator.state
        # as text, because not every serializer can store 128-bit integers
        words = {name: str(value) for name, value in inner["state"].items()}
        rest = {name: int(inner[name]) for name in ("has_uint32", "uinteger")}
        return super().state_dict() | {
            "names_seed": str(self.names_seed),
            "walks": [list(cursor) for cursor in self.cursors.tolist()],
            "random": words | rest,
        }

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        # refuse states of earlier versions, which drew in another order and saved no names_seed
        if state.get("names_seed") != str(self.names_seed):
            raise UserError(
                "the checkpoint holds the coprime order of other shard names, or of an earlier version of golf_kernels: resume with "
                "those, or delete the checkpoint to start over"
            )
        self.cursors = np.array([tuple(cursor) for cursor in state["walks"]], self.CURSOR)
        saved = state["random"]
        self.random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {name: int(saved[name]) for name in ("state", "inc")},
            "has_uint32": saved["has_uint32"],
            "uinteger": saved["uinteger"],
        }

    def _draw_step(self) -> list[Start]:
        needed = MICRO_BATCHES * self.sequences
        progress = min(self.step / self.RAMP_STEPS, 1.0)
        blocks, taken = self.cursors["blocks"][self.eligible], self.cursors["taken"][self.eligible]
        unseen = (self.shards.lengths[self.eligible] - 1) // self.seq_len
        remaining = np.where(blocks > 0, np.maximum(blocks - taken, 1), unseen).astype(np.float64)
        weights = remaining ** (0.9 - 0.4 * progress)
        chances = weights / weights.sum()
        fewest, most = (min(count, len(self.eligible), needed) for count in (self.FEWEST, self.MOST))
        mixed = round(fewest + progress * (most - fewest))
        drawn = self.random.choice(len(self.eligible), size=mixed, replace=False, p=chances)
        counts = 1 + self.random.multinomial(needed - mixed, chances[drawn] / chances[drawn].sum())
        queues = [
            self._take(int(self.eligible[drawn[index]]), int(counts[index])) for index in self.random.permutation(mixed)
        ]
        starts: list[Start] = []
        while queues:
            queues = [queues[index] for index in self.random.permutation(len(queues))]
            starts += [queue.pop() for queue in queues]
            queues = [queue for queue in queues if queue]
        return starts

    def _take(self, shard: int, count: int) -> list[Start]:
        """Take the next `count` windows of a shard, and permute them."""
        offsets = []
        for _ in range(count):
            if self.cursors["taken"][shard] >= self.cursors["blocks"][shard]:
                self._draw_cursor(shard)
            phase, start, stride, blocks, taken = self.cursors[shard].item()
            offsets.append(phase + (start + taken * stride) % blocks * self.seq_len)
            self.cursors["taken"][shard] += 1
        return [(shard, offsets[index]) for index in self.random.permutation(count)]

    def _draw_cursor(self, shard: int) -> None:
        length = int(self.shards.lengths[shard])
        phase = int(self.random.integers(min(self.seq_len, length - self.seq_len)))
        blocks = (length - 1 - phase) // self.seq_len
        start, stride = int(self.random.integers(blocks)), 1
        if blocks > 1:
            stride = int(self.random.integers(1, blocks))
            while math.gcd(stride, blocks) != 1:
                stride = int(self.random.integers(1, blocks))
        self.cursors[shard] = phase, start, stride, blocks, 0


def names_seed(names: list[str]) -> int:
    """Hash names to the seed of `Coprime`. x is 0 at first; for each byte, x ← (x XOR byte) · 1099511628211 mod 2⁶⁴."""
    value = 0
    for byte in "".join(names).encode():
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


LOADERS: dict[str, Callable[[TrainingShards, int, int, int], Order]] = {
    "sequential": Sequential,
    "shuffled": Shuffled,
    "coprime": Coprime,
    "packed": Packed,
}

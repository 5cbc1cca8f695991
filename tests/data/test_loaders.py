"""The order of training tokens: against straight-line formulas, at every world size, and after a restart."""

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config
from train.data.dataset import Dataset
from train.data.loaders import Loader
from train.data.orders import LOADERS, Coprime, TrainingShards
from train.data.shards import find_shards, write_shard

SEQ = 8


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards whose tokens are 0, 1, 2, …, so that a token is its place among them."""
    bounds = [0, 1000, 1700, 2750]
    for index, (low, high) in enumerate(itertools.pairwise(bounds)):
        write_shard(tmp_path / f"x_train_{index:06d}.bin", np.arange(low, high))
    return tmp_path


def config(data: Path, **changes: object) -> Config:
    # two sequences per micro-batch; loader packed needs the settings of the model
    made = {"data_path": str(data), "vocab_size": 65536, "train_seq_len": SEQ, "train_batch_tokens": 16 * SEQ}
    return Config(**{**made, "document_masking": True, "rope_scaling": "none", **changes})


def loader_of(settings: Config, rank: int, world_size: int, device: str = "cpu") -> Loader:
    return Dataset(settings).loader(Ranks(rank=rank, world_size=world_size, device=torch.device(device)))


def steps(batches: Loader, count: int) -> list[list[list[list[int]]]]:
    """Per step and micro-batch, the rows of inputs with their last target behind."""
    result = []
    for _ in range(count):
        batch = batches.next_batch()
        for inputs, targets in batch:
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
        result.append([torch.cat((inputs, targets[:, -1:]), 1).tolist() for inputs, targets in batch])
    return result


def test_sequential_is_the_published_order(data: Path) -> None:
    tokens, length = list(range(2750)), 2 * SEQ
    for rank in range(8):
        for step, micro in enumerate(steps(loader_of(config(data), rank, 8), 40)):
            # rank r takes span [r·(L+1), +L+1) of each chunk of 8·(L+1) tokens, and the first token follows the last
            first = step * 8 * (length + 1) + rank * (length + 1)
            span = [tokens[(first + offset) % 2750] for offset in range(length + 1)]
            assert micro == [[span[:9], span[8:]]]


def test_sequential_span_of_the_published_batch(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_000000.bin", np.arange(300_000) % 65536)
    big = config(tmp_path, train_batch_tokens=786_432, train_seq_len=2048)
    inputs, targets = loader_of(big, 1, 8).next_batch()[0]
    assert inputs.shape == (48, 2048)
    assert inputs[0, 0] == 98_305 % 65536 and targets[-1, -1] == (2 * 98_305 - 1) % 65536


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_every_world_size_sees_the_same_tokens(data: Path, name: str) -> None:
    whole = steps(loader_of(config(data, loader=name), 0, 1), 30)
    assert all(len(step) == 8 for step in whole)
    for world_size in (2, 4, 8):
        ranks = [steps(loader_of(config(data, loader=name), rank, world_size), 30) for rank in range(world_size)]
        for step in range(30):
            # micro-batch m of rank r is share r + m·W
            joined = [ranks[share % world_size][step][share // world_size] for share in range(8)]
            assert joined == whole[step]


@pytest.mark.parametrize("name", sorted(LOADERS))
@pytest.mark.parametrize("served", [0, 1, 13])
def test_resumes_in_the_middle_of_a_shard(data: Path, name: str, served: int) -> None:
    straight = loader_of(config(data, loader=name), 1, 2)
    steps(straight, served)
    saved = straight.state_dict()
    rest = steps(straight, 20)
    # through a checkpoint that holds plain data only, and through text
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), json.loads(json.dumps(saved))):
        fresh = loader_of(config(data, loader=name), 1, 2)
        steps(fresh, 3)
        fresh.load_state_dict(state)
        assert fresh.state_dict() == saved
        assert steps(fresh, 20) == rest


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_a_checkpoint_of_other_data_is_refused(data: Path, name: str) -> None:
    state = loader_of(config(data, loader=name), 0, 1).state_dict()
    write_shard(data / "x_train_000003.bin", [1] * 20)
    with pytest.raises(UserError, match="was made with 2750 training tokens, data_path holds 2770"):
        loader_of(config(data, loader=name), 0, 1).load_state_dict(state)


def windows(loader: Loader, count: int) -> list[int]:
    """First tokens of all windows, in the order in which they were dealt to the shares."""
    firsts = []
    for step in steps(loader, count):
        for index in range(len(step[0])):
            firsts += [share[index][0] for share in step]
        for share in step:
            for row in share:
                assert row == list(range(row[0], row[0] + SEQ + 1))
    return firsts


def test_shuffled_sees_every_window_once_per_epoch(data: Path) -> None:
    loader = loader_of(config(data, loader="shuffled"), 0, 1)
    per_epoch = 999 // SEQ + 699 // SEQ + 1049 // SEQ
    firsts = windows(loader, 4 * per_epoch // 16)
    epochs = [firsts[index * per_epoch : (index + 1) * per_epoch] for index in range(3)]
    for epoch in epochs:
        assert epoch != sorted(epoch)
        placed = sorted(epoch)
        for low, length in ((0, 1000), (1000, 700), (1700, 1050)):
            inside = [place for place in placed if low <= place < low + length]
            phase, count = inside[0] - low, (length - 1) // SEQ
            assert inside == [low + phase + SEQ * index for index in range(count)]
            assert phase + count * SEQ < length
    assert epochs[0] != epochs[1]
    # shards are cut in other places as well
    assert len({min(epoch) for epoch in epochs}) > 1


def test_shuffled_depends_on_the_seed_and_coprime_does_not(data: Path) -> None:
    def first(name: str, seed: int) -> list[int]:
        return windows(loader_of(config(data, loader=name, seed=seed), 0, 1), 4)

    assert first("shuffled", 1) == first("shuffled", 1) != first("shuffled", 2)
    assert first("coprime", 1) == first("coprime", 2)


def test_coprime_depends_on_the_shards_names(data: Path, tmp_path: Path) -> None:
    before = windows(loader_of(config(data, loader="coprime"), 0, 1), 2)
    for path in find_shards(data, "train"):
        path.rename(path.with_name(path.name.replace("x_", "y_")))
    assert windows(loader_of(config(data, loader="coprime"), 0, 1), 2) != before


class PublishedOrder:
    """Windows (shard, position) of #1471 at 8 ranks, written from the design's description alone (parity.md, 3)."""

    def __init__(self, names: list[str], lengths: list[int], seq_len: int, windows_per_step: int) -> None:
        x = 0
        for name in names:
            for byte in name.encode():
                x = ((x ^ byte) * 1099511628211) % 2**64
        self.rng = np.random.Generator(np.random.PCG64(x))
        self.n, self.S, self.G = lengths, seq_len, windows_per_step
        self.walk: dict[int, dict[str, int]] = {}
        self.steps = 0

    def begin(self, shard: int) -> None:
        n, S = self.n[shard], self.S
        highest = min(S - 1, max(0, n - S - 1))
        phase = int(self.rng.integers(0, highest + 1)) if highest > 0 else 0
        b = (n - 1 - phase) // S
        start = int(self.rng.integers(0, b)) if b > 1 else 0
        stride = 1
        if b > 1:
            while True:
                stride = int(self.rng.integers(1, b))
                if math.gcd(stride, b) == 1:
                    break
        self.walk[shard] = {"phase": phase, "b": b, "start": start, "stride": stride, "j": 0}

    def step(self) -> list[tuple[int, int]]:
        shards = [shard for shard, n in enumerate(self.n) if (n - 1) // self.S > 0]
        p = min(self.steps / 1800, 1)
        left = []
        for shard in shards:
            walk = self.walk.get(shard)
            left.append(max(walk["b"] - walk["j"], 1) if walk else (self.n[shard] - 1) // self.S)
        weights = np.array(left, dtype=float) ** (0.9 - 0.4 * p)
        weights = weights / weights.sum()
        low, high = min(max(8, 8), len(shards), self.G), min(max(32, 64), len(shards), self.G)
        m = min(max(1, round(low + p * (high - low))), len(shards), self.G)
        chosen = self.rng.choice(len(shards), size=m, replace=False, p=weights)
        counts = np.ones(m, dtype=int)
        if m < self.G:
            counts += self.rng.multinomial(self.G - m, weights[chosen] / weights[chosen].sum())
        together = self.rng.permutation(m)
        chosen, counts = chosen[together], counts[together]
        lists = []
        for which, count in zip(chosen, counts, strict=True):
            shard, windows = shards[which], []
            for _ in range(count):
                if shard not in self.walk or self.walk[shard]["j"] == self.walk[shard]["b"]:
                    self.begin(shard)
                walk = self.walk[shard]
                windows.append(
                    (shard, walk["phase"] + (walk["start"] + walk["j"] * walk["stride"]) % walk["b"] * self.S)
                )
                walk["j"] += 1
            if count > 1:
                windows = [windows[index] for index in self.rng.permutation(count)]
            lists.append(windows)
        result = []
        # the shards still active keep the order of the round before
        active = list(range(m))
        while active:
            active = [active[index] for index in self.rng.permutation(len(active))]
            for index in active:
                result.append(lists[index].pop())
            active = [index for index in active if lists[index]]
        self.steps += 1
        return result


# shard lengths, first step, sequences per micro-batch: few shards, which are used up within a step; 12 shards in the ramp
# (9 of them at step 450); more shards than a step ever mixes; shards of one and two windows, and one too short for any
COPRIME_CASES = {
    "few": ([1000, 700, 1050], 0, 2),
    "used up": ([90, 41, 33], 0, 6),
    "ramp": ([100 + 37 * index for index in range(12)], 440, 2),
    "many": ([200 + 29 * index for index in range(80)], 1790, 20),
    "short": ([9, 10, 17, 18, 8, 25, 26], 3, 1),
}


@pytest.mark.parametrize("case", COPRIME_CASES)
@pytest.mark.parametrize("world_size", [1, 8])
def test_coprime_is_the_published_order(tmp_path: Path, case: str, world_size: int) -> None:
    lengths, first, sequences = COPRIME_CASES[case]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    for index in range(len(lengths)):
        # tokens are places in the whole, modulo the vocabulary
        write_shard(tmp_path / f"x_train_{index:06d}.bin", np.arange(starts[index], starts[index + 1]) % 65536)
    settings = config(tmp_path, loader="coprime", train_batch_tokens=8 * sequences * SEQ)
    names = [f"x_train_{index:06d}.bin" for index in range(len(lengths))]
    truth = PublishedOrder(names, lengths, SEQ, 8 * sequences)
    truth.steps = first
    loaders = [loader_of(settings, rank, world_size) for rank in range(world_size)]
    for loader in loaders:
        loader.order.step = first
    for _ in range(20):
        wanted = truth.step()
        batches = [steps(loader, 1)[0] for loader in loaders]
        for virtual_rank in range(8):
            # as published, rank r of 8 takes windows r, r + 8, …
            rows = batches[virtual_rank % world_size][virtual_rank // world_size]
            assert rows == [
                [int(starts[shard] + position + offset) % 65536 for offset in range(SEQ + 1)]
                for shard, position in wanted[virtual_rank::8]
            ]


def test_few_shards_shorten_the_ramp_of_coprime(data: Path) -> None:
    for index in range(3, 12):
        write_shard(data / f"x_train_{index:06d}.bin", np.arange(500))
    order = loader_of(config(data, loader="coprime"), 0, 1).order
    assert isinstance(order, Coprime)
    order.step = 450
    # from 8 to 12 shards, a quarter of the ramp
    assert len({shard for shard, _ in order._draw_step()}) == 9


def test_a_coprime_checkpoint_of_other_names_or_an_earlier_version_is_refused(data: Path) -> None:
    loader = loader_of(config(data, loader="coprime"), 0, 1)
    steps(loader, 3)
    state = loader.state_dict()
    for changed in ({**state, "names_seed": "1"}, {name: state[name] for name in state if name != "names_seed"}):
        with pytest.raises(
            UserError, match="coprime order of other shard names, or of an earlier version of golf_kernels"
        ):
            loader_of(config(data, loader="coprime"), 0, 1).load_state_dict(changed)


def test_coprime_reads_each_shard_in_a_coprime_stride(data: Path) -> None:
    order = loader_of(config(data, loader="coprime"), 0, 1).order
    assert isinstance(order, Coprime)
    strides = set()
    for shard, length in enumerate((1000, 700, 1050)):
        for _ in range(3):
            seen: list[int] = []
            while not seen or order.cursors["taken"][shard] < order.cursors["blocks"][shard]:
                # shuffled within one request, so requests are compared as sets
                count = min(3, int(order.cursors["blocks"][shard] - order.cursors["taken"][shard])) if seen else 1
                offsets = order._take(shard, count)
                phase, start, stride, blocks, _ = order.cursors[shard].item()
                wanted = [
                    phase + (start + index * stride) % blocks * SEQ for index in range(len(seen), len(seen) + count)
                ]
                assert set(offsets) == {(shard, offset) for offset in wanted}
                seen += wanted
            assert 0 <= phase < SEQ and 0 <= start < blocks == (length - 1 - phase) // SEQ
            assert math.gcd(stride, blocks) == 1 and sorted(seen) == [phase + SEQ * index for index in range(blocks)]
            strides.add(stride)
    assert len(strides) > 3


def test_coprime_ramps_its_mixture(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(200, 4000, 80)
    for index, length in enumerate(lengths):
        write_shard(tmp_path / f"x_train_{index:06d}.bin", np.full(length, 7))
    # a shard too short for one window is never drawn
    write_shard(tmp_path / "x_train_000080.bin", np.full(SEQ, 7))
    shards = TrainingShards(find_shards(tmp_path, "train"), 65536)
    for step, alpha, mixed in ((0, 0.9, 8), (900, 0.7, 36), (1800, 0.5, 64), (5000, 0.5, 64)):
        order = Coprime(shards, SEQ, 20, 0)
        order.step = step
        recorded: list[np.ndarray] = []
        original = order.random

        class Recorder:
            def choice(self, *arguments, _original=original, _recorded=recorded, **options):
                _recorded.append(options["p"])
                assert options["replace"] is False
                return _original.choice(*arguments, **options)

            def __getattr__(self, name, _original=original):
                return getattr(_original, name)

        order.random = Recorder()  # type: ignore[assignment]
        for draw in range(2):
            blocks, taken = order.cursors["blocks"][:80], order.cursors["taken"][:80]
            left = np.where(blocks > 0, blocks - taken, (lengths - 1) // SEQ)
            weights = np.maximum(left, 1).astype(float) ** alpha
            starts = order._draw_step()
            assert len(starts) == 160 and len({shard for shard, _ in starts}) == mixed
            np.testing.assert_allclose(recorded[draw], weights / weights.sum(), rtol=1e-12)
            assert 80 not in {shard for shard, _ in starts}
            # interleaved: the first round has every shard once
            assert len({shard for shard, _ in starts[:mixed]}) == mixed


def test_tokens_above_the_sign_bit_survive_the_wire(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_000000.bin", np.arange(65536 - 200, 65536))
    assert steps(loader_of(config(tmp_path), 0, 8), 1)[0][0][0] == list(range(65336, 65345))


def test_a_token_beyond_the_vocabulary_is_refused_when_it_is_read(data: Path) -> None:
    loader = loader_of(config(data, vocab_size=1700), 0, 1)
    with pytest.raises(UserError, match=r"x_train_000002\.bin: holds token \d+, but vocab_size is 1700"):
        steps(loader, 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_tokens": 12 * SEQ}, "train_batch_tokens 96 .* train_seq_len 8"),
        ({"train_seq_len": 4000, "train_batch_tokens": 32_000}, "2750 tokens in a row, one sequence needs 4001"),
        (
            {"train_seq_len": 1050, "train_batch_tokens": 8400, "loader": "coprime"},
            "1050 tokens in a row, one sequence needs 1051",
        ),
        ({"data_path": "/nonexistent"}, "no such folder"),
    ],
)
def test_bad_settings_are_refused(data: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader_of(config(data, **changes), 0, 1)


@pytest.mark.gpu
def test_cuda_gets_the_same_batches(data: Path) -> None:
    on_gpu, on_cpu = loader_of(config(data), 0, 1, "cuda"), loader_of(config(data), 0, 1)
    for _ in range(5):
        for (inputs, targets), (wanted, following) in zip(on_gpu.next_batch(), on_cpu.next_batch(), strict=True):
            assert inputs.is_cuda and torch.equal(inputs.cpu(), wanted) and torch.equal(targets.cpu(), following)

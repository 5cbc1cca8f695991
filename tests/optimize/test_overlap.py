"""Gradients that leave during the backward pass: when they start, and that they are those of the form that waits."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_ranks import on_two_ranks

from golf_kernels.sharding import assign, newton_schulz_cost
from train.command_line import resolve
from train.common.distributed import Ranks
from train.common.values import ConfigError
from train.config import MICRO_BATCHES, Config
from train.loop import compiled_loss, training_step
from train.model.gpt import GPT
from train.optimize import reduction as reduction_module
from train.optimize.groups import build_optimizers
from train.optimize.overlap import OverlappedReduction, cut, spread
from train.optimize.reduction import Reduction
from train.run.profiling import new_trace

CPU = torch.device("cpu")
CONFIG = Config(
    num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=260, train_seq_len=8, train_batch_tokens=128,
    recur_layers=(1,), muon_eq_r=True, embed_dtype="float32",
)  # fmt: skip
STEPS, RECURRENT_FROM = 6, 3
# matrices of a chain in its order, and those of its two forms; the fourth has a gradient in the second form alone
SHAPES = [(6, 8), (8, 8), (8, 8), (8, 8), (8, 5), (5, 5)]
PLANS = {False: [0, 1, 2, 4, 5], True: [0, 1, 2, 1, 3, 4, 5]}


class Batches:
    """Micro-batches of one rank, the same for the same step."""

    def __init__(self, ranks: Ranks, make: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> None:
        self.ranks, self.make, self.step = ranks, make, 0

    def next_batch(self) -> list[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(self.step)
        self.step += 1
        return [self.make(draw) for _ in range(MICRO_BATCHES)][self.ranks.rank :: self.ranks.world_size]


def text(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 260, (2, 8), generator=draw)
    return ids, ids * 2 % 260


def trained(ranks: Ranks, form: str) -> dict[str, Tensor]:
    """The weights after steps without and with recurrence, and the moments at their end."""
    config = CONFIG.replace(gradient_reduction=form)
    torch.manual_seed(1)
    model = GPT(config)
    optimizers = build_optimizers(model, config, ranks.group)
    assert isinstance(optimizers.reduction, OverlappedReduction) == (form == "overlapped")
    loader = Batches(ranks, text)
    for step in range(STEPS):
        training_step(optimizers, model, loader, ranks, step >= RECURRENT_FROM, 1.0, 0.9)
    moments = optimizers.state_dict()["muon"]
    assert moments
    return copy.deepcopy(model.state_dict()) | {f"{n} {k}": v for n, m in moments.items() for k, v in m.items()}


class Chain(nn.Module):
    """Products alone, for which Inductor asks no C++ compiler."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=draw) / 3) for shape in SHAPES)

    def forward(self, x: Tensor, *, recurrence: bool) -> Tensor:
        for number in PLANS[recurrence]:
            x = x @ self.weights[number]
        return x


def rows(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 6, generator=draw), torch.randn(4, 5, generator=draw)


class ChainStep:
    """Steps of a chain on one rank; a step is the reduced gradients."""

    def __init__(self, ranks: Ranks, kind: type[Reduction], *, compiled: bool = False) -> None:
        self.ranks, self.model = ranks, Chain()
        self.shift = nn.Parameter(torch.zeros(5))
        owners = spread(assign(tuple(SHAPES), 2), SHAPES, cut(SHAPES, 2))
        self.reduction = kind([self.shift], list(self.model.weights), owners, ranks.group)
        self.loader = Batches(ranks, rows)
        self.product = self.model
        if compiled:
            torch._dynamo.reset()
            self.product = compiled_loss(self.model, Config(compile="on"), CPU, {}, self.reduction)

    def loss(self, x: Tensor, wanted: Tensor, *, recurrence: bool) -> Tensor:
        return ((self.product(x, recurrence=recurrence) + self.shift) * wanted).sum()

    def step(self, *_: float) -> None:
        self.reduction.reduce_gradients()
        self.found = [None if p.grad is None else p.grad.clone() for p in (*self.model.weights, self.shift)]

    def zero_grad(self) -> None:
        for parameter in (*self.model.weights, self.shift):
            parameter.grad = None

    def run(self, recurrence: bool) -> list[Tensor | None]:
        training_step(self, self.loss, self.loader, self.ranks, recurrence, 1.0, 0.9)
        return self.found


def summed(step: int, ranks: Ranks, recurrence: bool) -> list[Tensor]:
    """The gradients' mean over both ranks, one micro-batch after the other as a rank adds them."""
    model, shift = Chain(), nn.Parameter(torch.zeros(5))
    parameters = [*model.weights, shift]
    shares = []
    for rank in range(2):
        loader = Batches(Ranks(rank, rank, 2, CPU), rows)
        loader.step = step
        for x, wanted in loader.next_batch():
            loss = ((model(x, recurrence=recurrence) + shift) * wanted).sum()
            (loss / ranks.accumulation).backward()
        shares.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None
    return [(first + second) / 2 for first, second in zip(*shares, strict=True)]


def check_chain(ranks: Ranks, compiled: bool) -> None:
    forms = [False, False, True, True, False]
    waiting = ChainStep(ranks, Reduction, compiled=compiled)
    wanted = [waiting.run(recurrence) for recurrence in forms]
    chain = ChainStep(ranks, OverlappedReduction, compiled=compiled)
    owned = [*(weight in set(chain.reduction.owned) for weight in chain.model.weights), True]
    for step, recurrence in enumerate(forms):
        found = chain.run(recurrence)
        assert [gradient is not None for gradient in found] == owned
        for mine, waited, mean in zip(found, wanted[step], summed(step, ranks, recurrence), strict=True):
            if mine is not None:
                # bit for bit; a compiler may add a repeated matrix's gradients inside a product, with another rounding
                assert waited is not None and torch.equal(mine, waited), step
                torch.testing.assert_close(mine, mean, rtol=1e-5 if compiled else 0, atol=1e-6 if compiled else 0)


def traced(chain: ChainStep, recurrence: bool) -> list[str]:
    """Products and reduce-scatters of a step, in their order."""
    with new_trace(CPU) as trace:
        chain.run(recurrence)
    names = {"aten::mm": "mm", "c10d::_reduce_scatter_base_": "scatter", "c10d::allreduce_": "all"}
    events = sorted(trace.events(), key=lambda event: event.time_range.start)
    return [names[event.name] for event in events if event.name in names]


def check_order(ranks: Ranks, compiled: bool) -> None:
    chain = ChainStep(ranks, OverlappedReduction, compiled=compiled)
    buckets = cut(SHAPES, 2)
    assert len(buckets) == 3
    for recurrence in (False, True):
        chain.run(recurrence)
        found = traced(chain, recurrence)
        assert found.count("scatter") == 3 and found[-1] == "all"
        # two products for each of a micro-batch's in its backward pass but the first, whose input wants no gradient
        backward = 2 * len(PLANS[recurrence]) - 1
        # without recurrence the fourth matrix has no gradient, and a plain model cannot know that none will come
        waits = not compiled and not recurrence
        first = found.index("scatter")
        behind = found[first:].count("mm")
        assert (behind == 0) == waits, found
        assert waits or (0 < behind < backward and found[:first].count("mm") > 3 * backward), found
    waiting = traced(ChainStep(ranks, Reduction), True)
    assert waiting.count("scatter") == 1 and waiting.index("scatter") > max(
        place for place, name in enumerate(waiting) if name == "mm"
    )


def check_broken_step(ranks: Ranks, compiled: bool) -> None:
    chain, started = ChainStep(ranks, OverlappedReduction, compiled=compiled), []

    def refuse(_: Tensor) -> None:
        started.append(len(chain.reduction._scattering))
        raise ZeroDivisionError

    chain.run(True)
    # the embedding of a model that is not finite, say: one bucket has left when it raises
    handle = chain.model.weights[0].register_hook(refuse)
    chain.loader.step = 7
    batches = chain.loader.next_batch()
    with pytest.raises(ZeroDivisionError), chain.reduction.last_micro_batch():
        chain.loss(*batches[0], recurrence=True).backward()
    assert started[-1] >= 1
    handle.remove()
    chain.zero_grad()
    chain.loader.step = 7
    for mine, mean in zip(chain.run(True), summed(7, ranks, True), strict=True):
        assert mine is None or torch.allclose(mine, mean, rtol=1e-5, atol=1e-6)


def check_refusals(ranks: Ranks) -> None:
    chain = ChainStep(ranks, OverlappedReduction)
    (x, wanted), *_ = chain.loader.next_batch()

    def backward(times: int) -> None:
        with chain.reduction.last_micro_batch():
            for _ in range(times):
                chain.loss(x, wanted, recurrence=True).backward()

    with pytest.raises(RuntimeError, match="expected one backward pass"):
        backward(2)
    chain.zero_grad()
    # a compiler that handed all gradients over at the end would be slow and say nothing
    chain.reduction._compiled = True
    with pytest.raises(RuntimeError, match="GRADIENT_REDUCTION=after"):
        backward(1)
    with pytest.raises(ValueError, match="owners"):
        OverlappedReduction([], [nn.Parameter(torch.zeros(1, 1))], [2], ranks.group)


def check_nothing_stays(ranks: Ranks) -> None:
    chain = ChainStep(ranks, OverlappedReduction)
    chain.run(True)
    held = [weakref.ref(one) for one in (chain.reduction, *chain.model.weights)]
    del chain
    gc.collect()
    assert [one() for one in held] == [None] * len(held)


def check_numbers_decide(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets start by number where they fill in another order, as they may do on one rank alone."""
    chain = ChainStep(ranks, OverlappedReduction)
    weights = list(chain.model.weights)
    assert str(chain.reduction) == f"overlapped in {len(chain.reduction._buckets)} buckets"
    assert str(ChainStep(ranks, Reduction).reduction) == "after the backward pass in 1 bucket"
    started: list[int] = []
    scatter = reduction_module._reduce_scatter

    def record(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> dist.Work:
        started.append(source.data_ptr())
        return scatter(output, source, group)

    monkeypatch.setattr(reduction_module, "_reduce_scatter", record)
    # what is made last has its gradient first: rank 1 hears of the first matrices first
    order = weights if ranks.rank == 0 else weights[::-1]
    with chain.reduction.last_micro_batch():
        torch.stack([(weight * (place + 1)).sum() for place, weight in enumerate(order)]).sum().backward()
    chain.reduction.reduce_gradients()
    assert started == [bucket.source.data_ptr() for bucket in chain.reduction._buckets]
    for number, weight in enumerate(weights):
        mean = (number + 1 + len(weights) - number) / 2
        assert weight.grad is None or torch.equal(weight.grad, torch.full_like(weight, mean))


def work(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    for compiled in (False, True):
        check_chain(ranks, compiled)
        check_order(ranks, compiled)
        check_broken_step(ranks, compiled)
    check_refusals(ranks)
    check_nothing_stays(ranks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_numbers_decide(ranks, monkeypatch)
    return {form: trained(ranks, form) for form in ("after", "overlapped")}


def test_two_ranks_train_the_same_weights_in_both_forms(tmp_path: Path) -> None:
    results = on_two_ranks(work, tmp_path)
    torch.manual_seed(1)
    start = GPT(CONFIG).state_dict()
    for name, wanted in results[0]["after"].items():
        assert all(torch.equal(wanted, result[form][name]) for result in results for form in result), name
    assert not torch.equal(start["blocks.1.mlp.up"], results[0]["overlapped"]["blocks.1.mlp.up"])


def test_one_process_has_nothing_to_overlap() -> None:
    ends = []
    for form in ("after", "overlapped"):
        config = CONFIG.replace(gradient_reduction=form)
        torch.manual_seed(1)
        model = GPT(config)
        optimizers = build_optimizers(model, config)
        assert optimizers.reduction.compiler({}) is None
        assert str(optimizers.reduction) == "none (one process: nothing to reduce)"
        training_step(optimizers, model, Batches(Ranks(), text), Ranks(), True, 1.0, 0.9)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient_reduction: expected one of 'after', 'overlapped', got 'during'"):
        resolve(["--gradient_reduction", "during"], {})


def test_buckets_are_cut_from_the_end_once_they_hold_as_much_as_the_ranks_largest_matrices() -> None:
    # 2 ranks, largest 12: a bucket is closed with 24 elements or more
    assert cut([(1, 5), (3, 4), (3, 4), (1, 1), (4, 3), (2, 6), (4, 3)], 2) == [[6, 5], [4, 3, 2], [1, 0]]
    assert cut([(3, 4)], 8) == [[0]]
    assert cut([], 8) == []


def test_spread_owners_keep_each_ranks_work_and_even_the_buckets() -> None:
    # eleven blocks of a published width over eight ranks
    shapes = [(512, 512), (256, 512), (256, 512), (512, 512), (2048, 512), (512, 2048)] * 11
    owners = assign(tuple(shapes), 8)
    buckets = cut(shapes, 8)
    dealt = spread(owners, shapes, buckets)

    def work_of(chosen: tuple[int, ...]) -> Counter[tuple[int, int]]:
        return Counter((owner, newton_schulz_cost(*shape)) for owner, shape in zip(chosen, shapes, strict=True))

    def room(chosen: tuple[int, ...]) -> int:
        sizes = [[sum(shapes[n][0] * shapes[n][1] for n in b if chosen[n] == r) for r in range(8)] for b in buckets]
        return 8 * sum(map(max, sizes))

    assert work_of(dealt) == work_of(owners)
    total = sum(rows * columns for rows, columns in shapes)
    # buckets of three to four blocks cannot be split evenly; undealt they need 1.36 of the whole
    assert room(owners) > 1.3 * total and room(dealt) < 1.25 * total

"""When a step is captured and replayed, and that replaying changes no bit; graphs of a CPU are those of `fake_graph`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_graph import fake_graphs
from torch import Tensor
from two_ranks import on_two_ranks

from golf_kernels import dispatch
from train.common.distributed import MICRO_BATCHES, Ranks
from train.common.errors import UserError
from train.config import Config
from train.model.gpt import GPT
from train.optimize import groups
from train.optimize.cuda_graph import Captured, GraphChoice, choose_graph
from train.optimize.groups import Optimizers, build_optimizers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = Config(
    num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=4.0, vocab_size=260, train_seq_len=8,
    train_batch_tokens=128, grad_clip_norm=0.25, muon_eq_r=True,
)  # fmt: skip
# products with powers of two are exact, so that a number on the device and one in Python must give the same bits
EXACT = CONFIG.replace(matrix_lr=2**-6, tied_embed_lr=2**-5, scalar_lr=2**-7, muon_wd=2**-3, adam_wd=2**-4)
STEPS, CHECKPOINT = 7, 4


def test_work_on_the_same_memory_is_captured_once_and_other_memory_runs_as_it_is() -> None:
    tensors, ran = [torch.zeros(3)], []

    def run() -> None:
        ran.append(None)
        if len(tensors) == 1:
            # an optimizer's first step makes its moments
            tensors.append(torch.zeros(3))
        tensors[0].add_(1)

    with fake_graphs() as graphs:
        captured = Captured(run, lambda: tensors)
        captured()
        assert len(ran) == 1 and not graphs
        captured()
        captured()
        assert len(ran) == 2 and [graph.replays for graph in graphs] == [2] and tensors[0].tolist() == [3.0] * 3
        held, tensors[0] = tensors[0], torch.zeros(3)
        captured()
        assert len(ran) == 3 and len(graphs) == 1 and held is not tensors[0]
        captured()
        assert len(ran) == 4 and [graph.replays for graph in graphs] == [2, 1] and tensors[0].tolist() == [2.0] * 3


def test_a_graph_needs_cuda_and_is_the_default_with_the_fused_step_of_muon_alone() -> None:
    assert choose_graph(CONFIG, CPU) == (False, "needs a CUDA GPU")
    assert build_optimizers(GPT(CONFIG), CONFIG).graph == (False, "needs a CUDA GPU")
    on, off = (CONFIG.replace(optimizer_graph=value) for value in ("on", "off"))
    with pytest.raises(UserError, match="optimizer_graph: on needs a CUDA GPU, and this run is on cpu: set OPTIMIZER_"):
        build_optimizers(GPT(on), on)
    assert choose_graph(on, CUDA) == (True, "as set") and choose_graph(off, CUDA) == (False, "as set")
    assert str(choose_graph(CONFIG, CUDA)) == "off (muon_step runs on PyTorch, where no graph has been measured)"
    with dispatch.forced("torch,muon_step=triton"):
        assert choose_graph(CONFIG, CUDA) == (True, "muon_step runs on Triton")
        assert not choose_graph(off, CUDA).on


def build(
    config: Config, *, graph: bool, group: dist.ProcessGroup | None = None, **options: Any
) -> tuple[GPT, Optimizers]:
    torch.manual_seed(0)
    model = GPT(config)
    with mock.patch.object(groups, "choose_graph", return_value=GraphChoice(graph, "a test's")):
        return model, build_optimizers(model, config, group, **options)


def train(model: GPT, optimizers: Optimizers, steps: Sequence[int], rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Steps whose rates and momentum change, and are powers of two; the norms before clipping."""
    norms = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 260, (MICRO_BATCHES, 2, 8), generator=draw)
        for batch in ids[rank::world_size]:
            loss = model.loss(batch, batch * 2 % 260, recurrence=False)
            (loss * world_size / MICRO_BATCHES).backward()
        norm = optimizers.step(2.0 ** -(step % 3), 2.0 ** -(1 + step % 2))
        norms += [] if norm is None else [norm.clone()]
        optimizers.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    return norms


def state_of(model: GPT, optimizers: Optimizers) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizers": optimizers.state_dict()})


def run(config: Config, *, graph: bool, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Warm up, forget it, and train to the end, with a checkpoint on the way."""
    ranks = () if group is None else (dist.get_rank(group), dist.get_world_size(group))
    with fake_graphs() as graphs:
        model, optimizers = build(config, graph=graph, group=group)
        start = copy.deepcopy(model.state_dict())
        train(model, optimizers, range(90, 93), *ranks)
        model.load_state_dict(start)
        optimizers.reset()
        norms = train(model, optimizers, range(CHECKPOINT), *ranks)
        checkpoint = state_of(model, optimizers)
        norms += train(model, optimizers, range(CHECKPOINT, STEPS), *ranks)
        replays = [one.replays for one in graphs]
    return {"norms": norms, "checkpoint": checkpoint, "replays": replays, **state_of(model, optimizers)}


def assert_equal(found: Any, wanted: Any, name: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys() and wanted, name
        for key, value in wanted.items():
            assert_equal(found[key], value, f"{name} {key}")
    else:
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


def test_a_run_with_a_graph_is_the_run_without_one() -> None:
    captured, eager = run(EXACT, graph=True), run(EXACT, graph=False)
    assert eager["replays"] == [] and captured["replays"] == [3 - 1 + STEPS]
    assert_equal(*({key: one[key] for key in ("model", "optimizers", "checkpoint")} for one in (captured, eager)))
    assert all(torch.equal(a, b) for a, b in zip(captured["norms"], eager["norms"], strict=True))
    # every step is clipped, so that the graph's own norm counts
    assert len(captured["norms"]) == STEPS and min(captured["norms"]) > 2 * EXACT.grad_clip_norm
    before = GPT(EXACT).state_dict()["blocks.0.mlp.up"]
    assert (captured["model"]["blocks.0.mlp.up"] - before).abs().max() > 0.01


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_checkpoint_goes_on_with_and_without_a_graph(saved: bool, resumed: bool) -> None:
    result = run(EXACT, graph=saved)
    with fake_graphs() as graphs:
        model, optimizers = build(EXACT, graph=resumed)
        train(model, optimizers, range(90, 93))
        model.load_state_dict(result["checkpoint"]["model"])
        optimizers.load_state_dict(result["checkpoint"]["optimizers"])
        assert_equal(optimizers.state_dict(), result["checkpoint"]["optimizers"])
        train(model, optimizers, range(CHECKPOINT, STEPS))
        # what was captured in the warm-up is replayed
        assert [graph.replays for graph in graphs] == ([2 + STEPS - CHECKPOINT] if resumed else [])
    assert_equal(state_of(model, optimizers), {key: result[key] for key in ("model", "optimizers")})


def test_a_state_can_be_loaded_into_its_own_optimizers_and_an_empty_one_forgets() -> None:
    model, optimizers = build(EXACT, graph=False)
    empty = optimizers.state_dict()
    train(model, optimizers, range(2))
    before = copy.deepcopy(optimizers.state_dict())
    optimizers.load_state_dict(optimizers.state_dict())
    assert_equal(optimizers.state_dict(), before)
    optimizers.load_state_dict(empty)
    moments = [m for each in optimizers.state_dict().values() for named in each.values() for m in named.values()]
    assert len(moments) > 20 and not any(moment.any() for moment in moments)


def test_one_rank_of_two_replays_its_graphs_with_the_norm_of_all_gradients() -> None:
    found = []
    for graph in (True, False):
        with fake_graphs() as graphs:
            model, optimizers = build(EXACT, graph=graph, owned=[1, 3])
            before = copy.deepcopy(model.state_dict())
            norms = train(model, optimizers, range(4))
            assert [one.replays for one in graphs] == [3] * 3 * graph
        found.append({**state_of(model, optimizers), "norms": dict(enumerate(norms))})
    assert_equal(*found)
    # those that other ranks would move stay
    matrices = list(optimizers._named["muon"])
    assert {name for name in matrices if not torch.equal(before[name], model.state_dict()[name])} == {
        matrices[1],
        matrices[3],
    }
    # the first step's norm is that of one process
    wanted = train(*build(EXACT, graph=False), range(1))[0]
    torch.testing.assert_close(norms[0], wanted, rtol=1e-6, atol=0)


def test_moments_in_another_place_are_not_those_of_a_graph() -> None:
    found = []
    for graph in (True, False):
        with fake_graphs() as graphs:
            model, optimizers = build(EXACT, graph=graph)
            train(model, optimizers, range(3))
            for state in (*optimizers.muon.state.values(), *optimizers.adamw.state.values()):
                state.update({name: moment.clone() for name, moment in state.items()})
            train(model, optimizers, range(3, 6))
            assert [one.replays for one in graphs] == ([2, 2] if graph else [])
        found.append(state_of(model, optimizers))
    assert_equal(*found)


FORMS = {"muon_eq_r": {}, "normuon": {"muon_eq_r": False, "normuon": True}, "no_clipping": {"grad_clip_norm": 0.0}}


def both(config: Config, steps: int, with_gradients: Callable[[GPT, Optimizers, int], object]) -> list[dict[str, Any]]:
    """What is left of some steps that are replayed, and of the same work as it is."""
    results = []
    for call in (Captured.__call__, lambda captured: captured.run()):
        with mock.patch.object(Captured, "__call__", call):
            model, optimizers = build(config, graph=True)
            for step in range(steps):
                with_gradients(model, optimizers, step)
        results.append(state_of(model, optimizers))
    return results


@pytest.mark.parametrize(("backend", "form"), [*(("torch", form) for form in FORMS), ("triton", "normuon")])
def test_a_replay_reads_this_step_s_numbers(backend: str, form: str) -> None:
    config = CONFIG.replace(num_layers=1, model_dim=16, **FORMS[form])

    def step(model: GPT, optimizers: Optimizers, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        optimizers.step(1.0 - 0.13 * number, 0.85 + 0.03 * number)
        optimizers.zero_grad()

    with dispatch.forced(f"torch,muon_step={backend}"), fake_graphs() as graphs:
        captured, eager = both(config, 4, step)
        assert [graph.replays for graph in graphs] == [3]
    assert_equal(captured, eager)
    # and they are those of a run whose numbers are Python's
    model, optimizers = build(config, graph=False)
    for number in range(4):
        step(model, optimizers, number)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(captured["model"][name], value, rtol=0, atol=1e-3 if backend == "triton" else 1e-5)


def work(ranks: Ranks) -> dict[Any, Any]:
    results = {graph: run(EXACT, graph=graph, group=ranks.group) for graph in (True, False)}
    # a norm is no part of a run that clips nothing
    plain = EXACT.replace(grad_clip_norm=0.0, muon_eq_r=False)
    return results | {"plain": {graph: run(plain, graph=graph, group=ranks.group) for graph in (True, False)}}


def test_two_ranks_replay_their_graphs_between_collectives(tmp_path: Path) -> None:
    ranks = on_two_ranks(work, tmp_path)
    for pieces, results in [(3, one) for one in ranks] + [(2, one["plain"]) for one in ranks]:
        captured, eager = results[True], results[False]
        # the local norm, clipping and Muon, AdamW
        assert eager["replays"] == [] and captured["replays"] == [3 - 1 + STEPS] * pieces
        assert_equal(*({key: one[key] for key in ("model", "optimizers", "checkpoint")} for one in (captured, eager)))
        assert all(torch.equal(a, b) for a, b in zip(captured["norms"], eager["norms"], strict=True))
    assert_equal(ranks[0][True]["model"], ranks[1][True]["model"])
    assert len(ranks[1][True]["norms"]) == STEPS and ranks[0][True]["norms"] == ranks[1][True]["norms"]


def test_what_a_graph_would_not_repeat_is_seen_by_the_graph_of_the_tests() -> None:
    weight, rate, rates = torch.zeros(2), torch.zeros(()), [1.0]

    def move() -> None:
        # one number of Python and one of the device
        weight.add_(torch.ones(2) * rates[0] + rate)

    with fake_graphs():
        captured = Captured(move, lambda: [weight, rate])
        for number in (1.0, 2.0, 4.0):
            rates[0] = number
            rate.fill_(number)
            captured()
        assert weight.tolist() == [2.0 + 4.0 + 6.0] * 2
        waiting = Captured(lambda: weight.sum().item(), lambda: [weight])
        waiting()
        with pytest.raises(AssertionError, match="would wait"):
            waiting()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_captured_step_trains_as_an_eager_one(form: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLF_BACKEND", f"torch,muon_step={backend}")
    config = CONFIG.replace(optimizer_graph="on", **FORMS[form])
    weights = []
    for call in (Captured.__call__, lambda captured: captured.run()):
        torch.manual_seed(0)
        model = GPT(config).cuda()
        optimizers = build_optimizers(model, config)
        assert optimizers.graph == (True, "as set")
        generator = torch.Generator("cuda").manual_seed(1)
        with mock.patch.object(Captured, "__call__", call):
            for step in range(6):
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, device="cuda")
                    parameter.grad = noise.to(parameter.dtype)
                optimizers.step(1.0 - step / 10, 0.9 + step / 100)
                optimizers.zero_grad()
        assert (optimizers._update_all._graph is not None) == (not weights)
        weights.append(
            [
                *model.state_dict().values(),
                *(m for s in optimizers.state_dict().values() for n in s.values() for m in n.values()),
            ]
        )
    assert len(weights[0]) == len(weights[1]) and all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

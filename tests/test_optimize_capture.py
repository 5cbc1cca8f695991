"""When a step is captured, replayed and captured again; on a GPU also that replaying changes nothing."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch

from train.config import Config
from train.model.gpt import GPT
from train.optimize.capture import Captured
from train.optimize.groups import build_optimizers


class Graph:
    """Stands for a CUDA graph: remembers what ran while it was captured."""

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1


def test_work_on_the_same_memory_is_captured_once_and_other_memory_runs_as_it_is(monkeypatch):
    Graph.made = []
    modes = []

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        modes.append("captured")
        assert capture_error_mode == "thread_local"
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    tensors = [torch.zeros(3)]

    def run():
        modes.append("run")
        if len(tensors) == 1:
            # an optimizer's first step makes its moments
            tensors.append(torch.zeros(3))

    captured = Captured(run, lambda: tensors)
    captured()
    assert modes == ["run"] and not Graph.made
    captured()
    captured()
    assert modes == ["run", "captured", "run"] and [graph.replays for graph in Graph.made] == [2]
    held = tensors[0]
    tensors[0] = torch.zeros(3)
    captured()
    assert modes[3:] == ["run"] and len(Graph.made) == 1 and held is not tensors[0]
    captured()
    assert modes[4:] == ["captured", "run"] and [graph.replays for graph in Graph.made] == [2, 1]


CONFIG = Config(
    num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, vocab_size=260, train_seq_len=8, train_batch_tokens=128
)


def test_nothing_is_captured_on_a_cpu():
    optimizers = build_optimizers(GPT(CONFIG), CONFIG)
    assert not isinstance(optimizers._step_muon, Captured)


def test_a_reset_leaves_a_graph_its_moments_as_zeros():
    optimizers = build_optimizers(GPT(CONFIG), CONFIG)
    optimizers._step_muon = Captured(optimizers.muon.step, optimizers._muon_tensors)
    optimizers.reset()
    for parameter in optimizers._model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0, 0.9)
    before = optimizers._muon_tensors()
    moments = [moment for state in optimizers.muon.state.values() for moment in state.values()]
    assert all(moment.any() for moment in moments) and len(moments) == len(optimizers.muon.state) > 0
    optimizers.reset()
    assert not any(moment.any() for moment in moments) and not optimizers.adamw.state
    assert all(one is other for one, other in zip(before, optimizers._muon_tensors(), strict=True))


@pytest.mark.gpu
def test_a_captured_step_trains_as_an_eager_one(monkeypatch):
    monkeypatch.setenv("GOLF_BACKEND", "torch,muon_step=triton")
    weights = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = GPT(CONFIG).cuda()
        optimizers = build_optimizers(model, CONFIG)
        assert isinstance(optimizers._step_muon, Captured)
        step_muon = optimizers._step_muon
        if not captured:
            optimizers._step_muon = optimizers.muon.step
        generator = torch.Generator("cuda").manual_seed(1)
        for step in range(5):
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, device="cuda").to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = noise
                else:
                    parameter.grad.copy_(noise)
            optimizers.step(1.0 - step / 10, 0.9 + step / 100)
            optimizers.zero_grad()
        assert (step_muon._graph is not None) == captured
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

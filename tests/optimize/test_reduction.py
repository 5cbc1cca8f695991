"""What ranks exchange: means and norms of gradients, and whole trainings of two ranks against one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_ranks import on_two_ranks

from train.common.distributed import MICRO_BATCHES, Ranks
from train.config import Config
from train.model.gpt import GPT
from train.optimize.groups import Optimizers, build_optimizers
from train.optimize.reduction import Reduction

SHAPES = [(3, 5), (4, 4), (2, 7), (1, 1)]
OWNERS = [1, 0, 1, 1]


def gradient(rank: int, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * rank + index)).to(dtype)


def check_reduction(rank: int, group: dist.ProcessGroup) -> None:
    small = [nn.Parameter(torch.zeros(6, 2, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(5))]
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    reduction = Reduction(small, matrices, OWNERS, group)
    places = []
    for _ in range(2):
        for index, parameter in enumerate([*small, *matrices]):
            parameter.grad = gradient(rank, index, parameter.shape, parameter.dtype)
        # rank 1 has no gradient for one vector, which counts as zero
        if rank == 1:
            small[1].grad = None
        reduction.reduce_gradients()
        places.append([p.grad.data_ptr() for p in (*small, *matrices) if p.grad is not None])
        drawn = [[gradient(r, i, p.shape, p.dtype).double() for i, p in enumerate([*small, *matrices])] for r in (0, 1)]
        drawn[1][1].zero_()
        means = [(mine + other) / 2 for mine, other in zip(*drawn, strict=True)]
        for index, parameter in enumerate(small):
            torch.testing.assert_close(parameter.grad, means[index].to(parameter.dtype), rtol=1e-6, atol=1e-7)
        for matrix, owner, mean in zip(matrices, OWNERS, means[2:], strict=True):
            assert (matrix.grad is None) == (owner != rank)
            if owner == rank:
                torch.testing.assert_close(matrix.grad, mean.float(), rtol=1e-6, atol=1e-7)
        norm = torch.cat([mean.flatten() for mean in means]).norm()
        reduction.measure_gradients()
        reduction.sum_squares()
        torch.testing.assert_close(reduction.scale_gradients(0.5).double(), norm, rtol=2e-3, atol=0)
        clipped = matrices[0 if rank == 1 else 1]
        mean = means[2 if rank == 1 else 3]
        torch.testing.assert_close(clipped.grad.double(), mean * 0.5 / norm, rtol=2e-3, atol=1e-7)
        before = clipped.grad.clone()
        with torch.no_grad():
            for index, (matrix, owner) in enumerate(zip(matrices, OWNERS, strict=True)):
                matrix.fill_(index + 10 * owner if owner == rank else -1.0)
        reduction.start_gathering()
        reduction.finish_gathering()
        for index, (matrix, owner) in enumerate(zip(matrices, OWNERS, strict=True)):
            assert torch.equal(matrix, torch.full_like(matrix, index + 10 * owner))
        assert torch.equal(clipped.grad, before)
    # where a CUDA graph of a step looks for them
    assert places[0] == places[1]
    # and only a dtype of its own needs another copy
    assert small[1].grad is reduction._flat_views[1] and small[0].grad is not reduction._flat_views[0]


def test_one_process_can_have_its_gradients_at_fixed_places() -> None:
    small = [nn.Parameter(torch.zeros(6, 2, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(5))]
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parameters = [*small, *matrices]
    reduction, places = Reduction(small, matrices, fixed=True), []
    for step in range(3):
        given = [gradient(step, i, p.shape, p.dtype) for i, p in enumerate(parameters)]
        for parameter, one in zip(parameters, given, strict=True):
            parameter.grad = one.clone()
        if step == 1:
            # what lies there already, and what is missing
            parameters[0].grad = reduction._fixed_gradients[0].copy_(given[0])
            parameters[1].grad, given[1] = None, torch.zeros(5)
        reduction.reduce_gradients()
        assert all(torch.equal(p.grad, one) for p, one in zip(parameters, given, strict=True))
        places.append([p.grad.data_ptr() for p in parameters])
    assert places[0] == places[1] == places[2] and len(set(places[0])) == len(parameters)


STEPS, CHECKPOINT = 20, 8
CONFIG = Config(
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=260,
    train_seq_len=8,
    train_batch_tokens=128,
    matrix_lr=0.02,
    tied_embed_lr=0.03,
    scalar_lr=0.01,
    embed_wd=0.2,
    adam_wd=0.05,
    embed_dtype="float32",
)
VARIANTS = {
    "muon_eq_r": CONFIG.replace(muon_eq_r=True, muon_wd=0.1, grad_clip_norm=0.3, recur_scale_params=2),
    "normuon": CONFIG.replace(normuon=True),
}


def build(config: Config) -> GPT:
    torch.manual_seed(config.seed)
    return GPT(config)


def train(model: GPT, optimizers: Optimizers, steps: range, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    """Steps over a fixed text; each rank accumulates its share of the micro-batches. Returns the last mean loss."""
    config, accumulation = model.config, MICRO_BATCHES // world_size
    rows = config.train_batch_tokens // config.train_seq_len // MICRO_BATCHES
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        # a text with something to learn: every token is followed by its double
        ids = torch.randint(0, config.vocab_size, (MICRO_BATCHES, rows, config.train_seq_len), generator=draw)
        loss = torch.zeros(())
        for batch in ids[rank * accumulation : (rank + 1) * accumulation]:
            part = model.loss(batch, batch * 2 % config.vocab_size, recurrence=False) / accumulation
            part.backward()
            loss += part.detach()
        optimizers.step(1.0 - step / (2 * STEPS), 0.85 + 0.005 * step)
        optimizers.zero_grad()
    return loss


def work(ranks: Ranks) -> dict[str, dict[str, Any]]:
    check_reduction(ranks.rank, ranks.group)
    with pytest.raises(ValueError, match="owners"):
        Reduction([], [nn.Parameter(torch.zeros(1))], [2], ranks.group)
    results: dict[str, dict[str, Any]] = {}
    for name, config in VARIANTS.items():
        model = build(config)
        optimizers = build_optimizers(model, config, ranks.group)
        train(model, optimizers, range(CHECKPOINT), ranks.rank, 2)
        state = {"model": copy.deepcopy(model.state_dict()), "optimizers": copy.deepcopy(optimizers.state_dict())}
        loss = train(model, optimizers, range(CHECKPOINT, STEPS), ranks.rank, 2)
        result = {"loss": ranks.sum(loss) / 2, "end": copy.deepcopy(model.state_dict()), "checkpoint": state}
        # a fresh start from the checkpoint ends with the same bits
        model.load_state_dict(state["model"])
        resumed = build_optimizers(model, config, ranks.group)
        resumed.load_state_dict(state["optimizers"])
        train(model, resumed, range(CHECKPOINT, STEPS), ranks.rank, 2)
        result["resumed"] = model.state_dict()
        result["share"] = 0 if optimizers.muon is None else len(optimizers.muon.param_groups[0]["params"])
        results[name] = result
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_end_where_one_process_does(name: str, two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in two_ranks)
    for key, value in first["end"].items():
        assert torch.equal(value, second["end"][key]), key
        assert torch.equal(value, first["resumed"][key]), key
    assert first["share"] and second["share"]
    config = VARIANTS[name]
    model = build(config)
    start = copy.deepcopy(model.state_dict())
    loss = train(model, build_optimizers(model, config), range(STEPS))
    # float32 sums in another order, which Newton-Schulz magnifies for small singular values: 20 steps move the weights
    # by about 0.1, and two runs apart by less than 1e-4 of that
    for key, value in model.state_dict().items():
        torch.testing.assert_close(first["end"][key], value, rtol=0, atol=1e-5, msg=key)
    assert (model.blocks[0].mlp.up - start["blocks.0.mlp.up"]).abs().max() > 0.05
    assert abs(first["loss"].item() - loss.item()) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process_goes_on_from_two_ranks(name: str, two_ranks: list[dict[str, Any]]) -> None:
    result, other = (rank[name] for rank in two_ranks)
    state = result["checkpoint"]
    for parameter, moments in state["optimizers"]["muon"].items():
        for key, value in moments.items():
            assert torch.equal(value, other["checkpoint"]["optimizers"]["muon"][parameter][key])
    config = VARIANTS[name]
    model = build(config)
    model.load_state_dict(state["model"])
    optimizers = build_optimizers(model, config)
    optimizers.load_state_dict(state["optimizers"])
    train(model, optimizers, range(CHECKPOINT, STEPS))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(result["end"][key], value, rtol=0, atol=1e-5, msg=key)

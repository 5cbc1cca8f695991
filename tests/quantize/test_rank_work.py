"""GPTQ shared by ranks: who does what, the same bits as alone, and nobody left waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantize_example import random_batches, random_model, tiny
from two_ranks import on_two_ranks

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.quantize.calibrate import collect_hessians
from train.quantize.quantize_model import quantize_model
from train.quantize.rank_work import assign, gptq_cost
from train.quantize.tensors import QuantizedTensor, StoredTensors, matrices_to_calibrate

CLIPS = ("sdclip", "percentile_search")
BAD = "blocks.2.mlp.down"


def test_every_matrix_has_one_rank_and_the_slowest_rank_is_near_the_mean() -> None:
    # 11 layers: query and output, key and value, up, down
    shapes = {f"{kind}{i}": shape for i in range(11) for kind, shape in (
        ("q", (512, 512)), ("o", (512, 512)), ("k", (256, 512)), ("v", (256, 512)), ("u", (2048, 512)), ("d", (512, 2048))
    )}  # fmt: skip
    costs = {name: gptq_cost(*shape) for name, shape in shapes.items()}
    for ranks in (1, 2, 4, 8):
        owned = assign(costs, ranks)
        assert sorted(name for names in owned for name in names) == sorted(costs)
        loads = [sum(costs[name] for name in names) for names in owned]
        # what is left over after the costliest piece is put down is at most that piece
        assert max(loads) <= sum(loads) / ranks + max(costs.values())
        assert [list(costs).index(name) for name in owned[0]] == sorted(list(costs).index(name) for name in owned[0])
    assert assign({"a": 1.0, "b": 5.0, "c": 2.0, "d": 2.0}, 2) == [["b"], ["a", "c", "d"]]
    assert assign({"a": 1.0}, 3) == [["a"], [], []]


def test_the_cost_is_that_of_factor_inverse_and_products() -> None:
    assert gptq_cost(3, 6) == 4 / 3 * 216 + 3 * 36


def bits(stored: StoredTensors) -> dict[str, Any]:
    return {
        name: (tensor.codes, tensor.scales, tensor.bits) if isinstance(tensor, QuantizedTensor) else tensor
        for name, tensor in stored.items()
    }


def quantize(ranks: Ranks, clip: str) -> tuple[dict[str, Any], list[str]]:
    config = tiny(matrix_clip=clip, mlp_mult=3.0)
    model = random_model(config)
    hessians = collect_hessians(model, random_batches(config), matrices_to_calibrate(model, config), recurrence=True)
    # one matrix cannot be factorized, whoever owns it
    hessians[BAD] = -torch.ones_like(hessians[BAD])
    notes: list[str] = []
    return bits(quantize_model(model, config, hessians, ranks=ranks, note=notes.append)), notes


def refuse(ranks: Ranks) -> str:
    config = tiny(matrix_clip="row_max")
    model = random_model(config)
    hessians = collect_hessians(model, random_batches(config), matrices_to_calibrate(model, config), recurrence=True)
    if ranks.rank == 1:
        hessians = {name: hessian * float("nan") for name, hessian in hessians.items()}
    try:
        quantize_model(model, config, hessians, ranks=ranks)
    except UserError as error:
        return str(error)
    return "nothing"


def work(ranks: Ranks) -> dict[str, Any]:
    result = {clip: quantize(ranks, clip) for clip in CLIPS}
    told = ranks.on_all(lambda: f"from {ranks.rank}")
    return {"result": result, "told": told, "refused": refuse(ranks)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("clip", CLIPS)
def test_two_ranks_give_the_bits_of_one_process(two_ranks: list[dict[str, Any]], clip: str) -> None:
    alone, notes = quantize(Ranks(), clip)
    assert len(notes) == 1 and notes[0].startswith(f"{BAD}: the Hessian could not be factorized")
    for rank in two_ranks:
        shared, told = rank["result"][clip]
        assert list(shared) == list(alone) and told == notes
        for name, want in alone.items():
            got = shared[name]
            if isinstance(want, torch.Tensor):
                assert torch.equal(got, want), name
            else:
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2], name


def test_a_rank_that_cannot_go_on_stops_all(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["refused"] for rank in two_ranks)
    assert first == second and first.endswith(
        "its Hessian holds NaN or infinity: the calibration batches overflowed the model"
    )
    assert [rank["told"] for rank in two_ranks] == [["from 0", "from 1"]] * 2

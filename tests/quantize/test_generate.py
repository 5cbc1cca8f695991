"""Calibration on the model's own text: sampling, seeds, ranks, and the graph that Hessians come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_systems import SHALLOW, narrow_config, random_model
from two_ranks import on_two_ranks

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config
from train.data.dataset import Dataset
from train.model.decoder import sample
from train.model.gpt import GPT
from train.quantize import generate
from train.quantize.calibrate import calibrate, collect_hessians, plain_graph
from train.quantize.generate import generate_tokens

SEED, TEMPERATURE, LENGTH = 7, 0.8, 12
NAMES = ["blocks.0.attention.query", "blocks.3.mlp.down", "embedding.weight"]


def settings(system: str = "sp4096", **changes: object) -> Config:
    own = {"gptq_calib_source": "generated", "gptq_calib_batches": 5, "train_seq_len": LENGTH, "seed": SEED}
    return narrow_config(system, **SHALLOW[system], train_batch_tokens=8 * LENGTH, **(own | changes))


def write(model: GPT, numbers: range | list[int], **changes: Any) -> torch.Tensor:
    given: dict[str, Any] = {"temperature": TEMPERATURE, "seed": SEED, "recurrence": True}
    return generate_tokens(model, numbers, LENGTH, **(given | changes))


def test_texts_follow_the_evaluated_function_and_their_own_random_numbers() -> None:
    model = random_model(settings()).train()
    texts = write(model, range(4))
    assert texts.shape == (4, LENGTH) and texts.dtype == torch.int64 and model.training
    with torch.no_grad():
        logits = model.eval().logits(texts, recurrence=True)
    draws = np.stack([np.random.default_rng([SEED, text]).random(LENGTH) for text in range(4)])
    assert texts[:, 0].tolist() == [int(draw * 259) for draw in draws[:, 0]]
    for place in range(1, LENGTH):
        expected = sample(logits[:, place - 1], torch.from_numpy(draws[:, place].copy()), TEMPERATURE)
        assert torch.equal(texts[:, place], expected)
    assert not torch.equal(texts, write(model, range(4), recurrence=False))


def test_texts_depend_on_their_number_and_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(settings())
    texts = write(model, range(5))
    assert torch.equal(write(model, [3, 1]), texts[[3, 1]])
    assert not (write(model, range(5), seed=SEED + 1) == texts).all(dim=1).any()
    assert len({tuple(text) for text in texts.tolist()}) == 5
    # one at a time
    monkeypatch.setattr(generate, "_CACHE_BYTES", 1)
    assert torch.equal(write(model, range(5)), texts)


def test_the_plain_graph_has_the_weights_and_neither_repeats_nor_parallel_layers() -> None:
    for system in ("sp4096", "sp8192"):
        config = settings(system)
        model = random_model(config).eval()
        plain, ids = plain_graph(model), write(model, range(2))
        wanted = GPT(config.replace(recur_layers=(), parallel_start_layer=-1)).double()
        wanted.compute_dtype = torch.float64
        wanted.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name != "lane_mix"})
        with torch.no_grad():
            got, want = plain.logits(ids, recurrence=False), wanted.logits(ids, recurrence=False)
            serial = model.logits(ids, recurrence=False)
        assert torch.equal(got, want)
        assert (got - serial).abs().max() > 1e-3
        shared = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
        assert all(shared[name] == tensor.data_ptr() for name, tensor in plain.named_parameters())


@pytest.mark.parametrize("graph", ["evaluated", "plain"])
def test_hessians_of_generated_text_are_those_of_the_texts(graph: str) -> None:
    config = settings(gptq_calib_graph=graph)
    model, notes = random_model(config), []
    hessians = calibrate(config, model, NAMES, Dataset(config), Ranks(), notes.append)
    function = plain_graph(model) if graph == "plain" else model
    texts = write(model, range(5))
    want = collect_hessians(function, [texts], NAMES, recurrence=graph == "evaluated")
    for name in NAMES:
        torch.testing.assert_close(hessians[name], want[name], rtol=1e-12, atol=1e-12)
    assert len(notes) == 1
    plain = " without recurrence and parallel layers" if graph == "plain" else ""
    assert notes[0].startswith(
        f"gptq:generated 5 sequences of {LENGTH} tokens, computed 3 Hessians with the trained model{plain} in "
    )


def work(ranks: Ranks) -> dict[str, torch.Tensor]:
    config = settings()
    with pytest.raises(UserError, match="GPTQ_CALIB_BATCHES to 2 at least"):
        calibrate(config.replace(gptq_calib_batches=1), random_model(config), NAMES, Dataset(config), ranks, print)
    return calibrate(config, random_model(config), NAMES, Dataset(config), ranks, print)


def test_two_ranks_share_the_texts(tmp_path: Path) -> None:
    config = settings()
    alone = calibrate(config, random_model(config), NAMES, Dataset(config), Ranks(), print)
    first, second = on_two_ranks(work, tmp_path)
    for name in NAMES:
        assert torch.equal(first[name], second[name])
        # two ranks have two batches where one process has one
        torch.testing.assert_close(2 * first[name], alone[name], rtol=1e-12, atol=1e-12)

"""train/recipes: every recipe as a narrow copy on made tokens, trained, resumed and on two ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_training import SEQ_LEN, STEPS, Training, narrow_recipe, write_tokens
from torch import Tensor
from two_ranks import on_two_ranks

from train.checkpoint import Reached, load_checkpoint, save_checkpoint
from train.common.distributed import Ranks
from train.model.gpt import GPT
from train.model.parameters import classify
from train.optimize.groups import build_optimizers
from train.recipes import recipe_names

# a whole schedule in few steps, for what need not learn: constant, recurrent, falling, averaged
SHORT = {"iterations": 6, "recur_start_step": 3, "warmdown_iters": 4, "swa_every": 1}

# sp8192_ngram_tilt differs from sp8192_frontier in numbers and switches alone
TRAINED = [name for name in recipe_names() if name != "sp8192_ngram_tilt"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@dataclass
class Finished:
    """One uninterrupted run, with the checkpoint that it left on the way."""

    training: Training
    losses: list[float]
    checkpoint: Path


@pytest.fixture(scope="module")
def finished(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """The run of a recipe, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def run(name: str) -> Finished:
        training = Training.begin(narrow_recipe(name, tokens))
        # recurrence and SWA begin before it for half of the recipes, after it for the others
        losses = training.run((8, 16)[recipe_names().index(name) % 2])
        save_checkpoint(folder / f"{name}.pt", training.parts, Ranks(), Reached(training.step, 0.0, {}, 1))
        return Finished(training, losses + training.run(STEPS), folder / f"{name}.pt")

    return run


@pytest.mark.parametrize("name", recipe_names())
def test_the_loss_begins_at_ln_vocab(name: str, tokens: Path) -> None:
    config = narrow_recipe(name, tokens)
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (64, SEQ_LEN + 1))
    loss = GPT(config).loss(ids[:, :-1], ids[:, 1:], recurrence=False)
    assert float(loss.detach()) == pytest.approx(math.log(config.vocab_size), abs=0.012)


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss(name: str, finished: Callable[[str], Finished]) -> None:
    losses = finished(name).losses
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < losses[0] - 0.3


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_is_bit_equal(name: str, finished: Callable[[str], Finished]) -> None:
    expected = finished(name).training.weights()
    resumed = Training.begin(finished(name).training.config)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.fill_(math.nan)
    resumed.step = load_checkpoint(finished(name).checkpoint, resumed.parts, Ranks(), STEPS).step
    assert 0 < resumed.step < STEPS
    resumed.run(STEPS)
    found = resumed.weights()
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert different == []


@pytest.mark.parametrize("name", ["sp4096_recurrence"])
def test_untrained_vectors_stay_and_trained_ones_move(name: str, finished: Callable[[str], Finished]) -> None:
    run = finished(name).training
    torch.manual_seed(run.config.seed)
    start = GPT(run.config).state_dict()
    moved = {key for key, tensor in run.model.state_dict().items() if not torch.equal(tensor, start[key])}
    assert set(start) - moved == {"recur_scales"}
    assert torch.all(start["recur_scales"] == 0.5)


def test_dead_skips_of_sdclip_get_no_gradient(tokens: Path) -> None:
    run = Training.begin(narrow_recipe("sp8192_sdclip", tokens))
    inputs, targets = run.loader.next_batch()[0]
    for recurrence, dead in ((False, [3, 4]), (True, [4])):
        # zero-initialized projections hide the skips, so give every weight some size
        torch.manual_seed(1)
        for parameter in run.model.parameters():
            parameter.data.normal_(std=0.1)
        run.optimizers.zero_grad()
        run.model.loss(inputs, targets, recurrence=recurrence).backward()
        for key in ("skips.weights", "skips.gates"):
            sizes = dict(run.model.named_parameters())[key].grad.abs().sum(dim=1)
            assert [row for row, size in enumerate(sizes) if size == 0] == dead


def short_runs(tokens: Path, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """The weights at the end of each recipe's short run, in float64."""
    weights = {}
    for name in TRAINED:
        run = Training.begin(narrow_recipe(name, tokens, **SHORT), ranks, double=True)
        run.run(run.config.iterations)
        weights[name] = run.weights()
    return weights


def test_two_ranks_give_the_weights_of_one(tokens: Path, tmp_path: Path) -> None:
    first, second = on_two_ranks(partial(short_runs, tokens), tmp_path)
    for name, weights in short_runs(tokens, Ranks()).items():
        for key, tensor in weights.items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            # in float64, as a fake-quantized weight that rounds the other way is no error of the reduction
            torch.testing.assert_close(
                first[name][key], tensor, rtol=0, atol=1e-9, msg=lambda m, k=f"{name} {key}": f"{k}: {m}"
            )


@pytest.mark.parametrize("name", recipe_names())
def test_every_trained_parameter_has_an_optimizer(name: str, tokens: Path) -> None:
    config = narrow_recipe(name, tokens)
    model = GPT(config)
    optimizers = build_optimizers(model, config)
    held = [
        id(p)
        for optimizer in (optimizers.muon, optimizers.adamw)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(held) == len(set(held))
    missing = {key for key, parameter in model.named_parameters() if id(parameter) not in held}
    untrained = {"recur_scales": config.recur_scale_params, "softcaps": config.softcap_params}
    assert missing == {key for key, count in untrained.items() if count}
    muon = {id(p) for group in optimizers.muon.param_groups for p in group["params"]}
    kinds = {key: classify(key, config) for key, _ in model.named_parameters()}
    assert {key for key, p in model.named_parameters() if id(p) in muon} == {
        key for key, kind in kinds.items() if kind == "matrix"
    }

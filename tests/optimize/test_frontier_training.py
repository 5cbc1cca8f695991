"""Schedules, Muon, AdamW and whole steps of #2014 (B) and #2135 (A) against numbers of their scripts.

`tests/fixtures/frontier_training.json` has what the scripts computed from closed-form inputs.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from frontier_truth import assign, collect, small_ids, small_tensors, wave
from model_systems import narrow_config

from golf_kernels import Muon
from golf_kernels.newton_schulz import newton_schulz
from train.common.values import ConfigError, parse_lengths
from train.config import Config
from train.data.loaders import check_batch
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers, split_parameters
from train.optimize.schedules import ContextGrowth, lr_scale, muon_momentum, recurrence_on, training_graphs
from train.recipes import load_recipe

ORACLES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures/frontier_training.json").read_text(encoding="utf-8")
)
SCHEDULES = ORACLES["5_schedules"]
RECIPE = load_recipe("sp8192_frontier").config(device="cpu")
CONFIGS = {"A": load_recipe("sp8192_ngram_tilt").config(device="cpu"), "B": RECIPE}


@pytest.mark.parametrize("script", ["A", "B"])
def test_schedules(script: str) -> None:
    config = CONFIGS[script]
    assert config.training_seconds == SCHEDULES[f"lr_factor_{script}"]["budget_s"]
    for point in SCHEDULES[f"lr_factor_{script}"]["points"]:
        assert lr_scale(7, point["elapsed_s"], config) == pytest.approx(point["factor"], abs=1e-10)
    for point in SCHEDULES[f"momentum_{script}"]:
        assert muon_momentum(point["step"], config) == pytest.approx(point["momentum"], abs=1e-10)
    # a run whose step k starts at k · 125 ms
    run = SCHEDULES[f"simulated_run_{script}"]
    rows, grown = {row["step"]: row for row in run["rows"]}, []
    context, looped = ContextGrowth(config), []
    for step in range(max(rows) + 1):
        seconds = step * run["ms_per_step"] / 1000
        if context.grow(step, seconds):
            grown.append(step)
        loops = recurrence_on(step, seconds, config)
        looped += [step] if loops else []
        if step in rows:
            factor = lr_scale(step, seconds, config) * context.lr_factor(step)
            assert factor == pytest.approx(rows[step]["factor"], abs=1e-10)
            assert loops == rows[step]["loops"]
            assert rows[step].get("length", 2048) == context.length
    assert looped[0] == run["loops_on_at_step"] and grown == run.get("length_changes_at_steps", [])


def test_the_length_never_falls_and_follows_steps_without_a_clock() -> None:
    for point in SCHEDULES["context_length_B"]:
        context = ContextGrowth(RECIPE)
        context.grow(5, point["elapsed_s"])
        assert context.length == point["length"]
        # an estimate of the clock that falls again changes nothing
        assert not context.grow(6, 0.0) and context.length == point["length"]
    steps = RECIPE.replace(max_wallclock_seconds=0.0, gptq_reserve_seconds=0.0, iterations=1000)
    context = ContextGrowth(steps)
    assert [step for step in range(1000) if context.grow(step, 0.0)] == [101, 701]
    restored = ContextGrowth(steps)
    restored.load_state_dict(context.state_dict())
    assert [restored.lr_factor(step) for step in (701, 716, 732, 999)] == [1 / 32, 0.5, 1, 1]
    # before the first growth nothing warms up, nor without steps for it
    assert ContextGrowth(steps).lr_factor(0) == 1
    assert ContextGrowth(Config()).lr_factor(0) == 1 and ContextGrowth(Config()).length == 1024


def test_the_graphs_are_those_that_training_passes_through() -> None:
    assert training_graphs(RECIPE) == [(False, 1024), (False, 2048), (True, 2048), (True, 3072)]
    assert training_graphs(CONFIGS["A"]) == [(False, 2048), (True, 2048)]
    assert training_graphs(Config()) == [(False, 1024)]
    # a step is no fraction: any length may meet either state
    by_step = RECIPE.replace(recur_start_frac=0.0, recur_start_step=100)
    assert len(training_graphs(by_step)) == 6
    assert training_graphs(RECIPE.replace(recur_layers=())) == [(False, length) for length in (1024, 2048, 3072)]


@pytest.mark.parametrize("text", ["1024", "1024@0.5", "2048@0.5,1024@1", "1@0.5,2@0.5,3@1", "1@1,", "a@1", "0@1"])
def test_a_bad_schedule_of_lengths_is_refused(text: str) -> None:
    assert parse_lengths("1024@0.100, 2048@1.000") == ((1024, 0.1), (2048, 1.0))
    with pytest.raises(ConfigError, match=r"train_seq_schedule: expected LENGTH@END"):
        RECIPE.replace(train_seq_schedule=text)


def test_settings_that_contradict_a_schedule_of_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="loader is coprime: set LOADER=sequential"):
        RECIPE.replace(loader="coprime")
    with pytest.raises(ConfigError, match="set TRAIN_SEQ_SCHEDULE, or SEQ_CHANGE_WARMUP_STEPS=0"):
        RECIPE.replace(train_seq_schedule="")
    with pytest.raises(Exception, match="no whole sequences of 3000 tokens"):
        check_batch(RECIPE.replace(train_seq_schedule="1024@0.5,3000@1"))


@pytest.mark.parametrize(
    "case", [s for s in ORACLES["6_muon"]["steps"] if s["precision"] == "float32"],
    ids=lambda s: f"{s['script']}, {s['shape']}, {s['step']}",
)  # fmt: skip
def test_muon(case: dict[str, Any]) -> None:
    number, config = case["tensor"], CONFIGS[case["script"]]
    bank = torch.nn.Parameter((0.3 * wave(3 + number, *case["shape"])).float())
    optimizer = Muon(
        [bank], lr=config.matrix_lr, weight_decay=config.muon_wd, coefficients=config.muon_coefficients, row_normalize=config.muon_eq_r,
        row_eps=config.muon_row_eps, dampened=False, compute_dtype=torch.float32,
    )  # fmt: skip
    for step, momentum, rate in ((0, 0.92, 1.0), (1, 0.95, 0.5))[: case["step"] + 1]:
        bank.grad = (0.02 * wave(10 + number + 5 * step, *case["shape"])).float()
        for group in optimizer.param_groups:
            group["momentum"], group["lr"] = momentum, rate * config.matrix_lr
        before = bank.detach().clone()
        optimizer.step()
    assert group["lr"] == pytest.approx(case["lr"]) and group["momentum"] == case["momentum"]
    torch.testing.assert_close(bank.flatten()[:6].tolist(), case["weights_first6"], rtol=0, atol=1e-6)
    if "weights_slice1_first3" in case:
        torch.testing.assert_close(bank[1].flatten()[:3].tolist(), case["weights_slice1_first3"], rtol=0, atol=1e-6)
    update = (before * (1 - case["lr"] * config.muon_wd) - bank.detach()) / case["lr"]
    torch.testing.assert_close(update.flatten()[:6].tolist(), case["update_first6"], rtol=0, atol=1e-4)
    assert float(update.norm()) == pytest.approx(case["update_norm"], abs=1e-3)


def test_polar_express() -> None:
    (found,) = newton_schulz([wave(7, 4, 6)], coefficients=RECIPE.muon_coefficients, compute_dtype=torch.float64)
    for row in ORACLES["6_muon"]["orthogonalised_4x6"]:
        # the script's own products are float32
        torch.testing.assert_close(found[row["row"]].tolist(), row["values"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("script", ["A", "B"])
def test_groups(script: str) -> None:
    config = CONFIGS[script].replace(model_dim=64, rope_dims=4, vocab_size=259)
    model = GPT(config)
    optimizers = build_optimizers(model, config)
    adam, muon = ORACLES["6b_groups"][script]
    (matrices,) = optimizers.muon.param_groups
    assert (matrices["lr"], matrices["weight_decay"]) == (muon["base_lr"], muon["weight_decay"])
    assert len(matrices["params"]) == 6 * 11
    embedding, scalars = optimizers.adamw.param_groups
    for group, wanted in ((embedding, adam), (scalars, adam | {"base_lr": 0.02, "weight_decay": 0.02})):
        found = (group["lr"], group["weight_decay"], list(group["betas"]), group["eps"])
        assert found == (wanted["base_lr"], wanted["weight_decay"], wanted["betas"], wanted["eps"])
    # every vector, gain, gate and lambda decays; the softcaps are in no group
    kinds = split_parameters(model, config)
    assert len(scalars["params"]) == len(kinds["scalar"]) and "softcaps" not in kinds["scalar"]
    assert {"lane_resid", "lane_post", "skips.gates", "smear.scale", "blocks.0.attention.gate"} <= set(kinds["scalar"])


@pytest.mark.parametrize("script", ["A", "B"])
def test_idle_skip_rows_decay_until_recurrence(script: str) -> None:
    config, oracle = CONFIGS[script], ORACLES["8_idle_decay"]
    steps, seconds = oracle[f"steps_{script}"], 0.35 * CONFIGS[script].training_seconds
    context, weight = ContextGrowth(config), 1.0
    for step in range(steps):
        context.grow(step, step / steps * seconds)
        scale = lr_scale(step, step / steps * seconds, config) * context.lr_factor(step)
        weight *= 1 - config.scalar_lr * scale * config.adam_wd
    assert weight == pytest.approx(oracle[script], abs=2e-3)


@pytest.mark.parametrize("case", ORACLES["1b_three_training_steps"], ids=lambda c: f"{c['script']}, {c['loops']}")
def test_three_steps(case: dict[str, Any]) -> None:
    settings = CONFIGS[case["script"]]
    names = ("matrix_lr", "muon_wd", "tied_embed_lr", "embed_wd", "scalar_lr", "adam_wd", "beta2", "grad_clip_norm")
    chosen = {name: getattr(settings, name) for name in names}
    assert chosen["matrix_lr"] == case["matrix_lr"]
    config = narrow_config(
        "frontier", mlp_mult=4.0, embed_dtype="float32", smear_gate_bos_fix=case["smear_bos_mask"], **chosen
    )
    model = GPT(config)
    assign(model, small_tensors())
    model.compute_dtype = torch.float32
    optimizers, ema = build_optimizers(model, config), EMA(model, settings.ema_decay)
    for group in optimizers.muon.param_groups:
        group["compute_dtype"] = torch.float32
    for step, factor in enumerate(case["lr_factors"]):
        expected = case["steps"][step]
        ids = small_ids([0, 9, 17], 7 + 3 * step)[None]
        loss = model.loss(ids[:, :-1], ids[:, 1:], recurrence=case["loops"])
        loss.backward()
        norm = optimizers.step(factor, 0.92 + 0.05 * step / 1500)
        optimizers.zero_grad()
        ema.update()
        assert float(loss.detach()) == pytest.approx(expected["loss_f32"], rel=1e-5)
        assert float(norm) == pytest.approx(expected["grad_norm_before_clip_f32"], rel=1e-5)
        found = {name: tensor.detach() for name, tensor in collect(dict(model.named_parameters()), 11).items()}
        for name, values in expected["after"].items():
            near(found[name].norm(), values["l2_f64"])
            near(
                found[name].flatten()[:3], values["first3_f32"], float(found[name].norm() / found[name].numel() ** 0.5)
            )
        near(found["skip_weights"][6, :3], expected["skip_weights_row6_first3_f32"])
        near(found["lambda_post"][3].flatten(), expected["lambda_post_layer3_f32"])
    averages = collect(ema.average(), 11)
    for name, values in case["ema_after_3_steps_first3_f64"].items():
        near(averages[name].flatten()[:3], values, 1.0)


def near(found: torch.Tensor, expected: Any, size: float = 0.0) -> None:
    """Equal to 1e-5 of the value, or of a typical size of the tensor."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * size)
    assert math.isfinite(float(found.sum()))

"""The training loop: no clock decides the quickstart's weights, and what is said where the time limit stops it."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from submission_runs import narrow

from train.checkpoint import read_tensors, write_tensors
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.data.dataset import Dataset
from train.loop import Speed, TrainResult, train, training_step
from train.model.gpt import GPT
from train.optimize.groups import Optimizers
from train.recipes import load_recipe
from train.run.clocks import WallClock
from train.run.folder import RunFolder
from train.run.logger import RunLogger

LIMIT = load_recipe("quickstart").config().max_wallclock_seconds


def trained(folder: Path, dataset: Path, **changes: object) -> TrainResult:
    """A narrow quickstart after training, without the later stages."""
    config = narrow(dataset, folder, 1, val_loss_every=0, **changes)
    folder.mkdir()
    with RunLogger(folder, config.seed) as log:
        return train(config, Dataset(config), RunFolder(folder), Ranks(), log)


def test_no_clock_decides_the_quickstart_s_weights(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [trained(tmp_path / "quiet", dataset, max_wallclock_seconds=LIMIT)]
    # every look at this clock comes a tenth of the limit after the last one
    looks = iter(np.arange(0, LIMIT, LIMIT / 10))
    monkeypatch.setattr(
        "train.loop.WallClock", lambda *given, **named: WallClock(*given, **named, now=lambda: next(looks))
    )
    results.append(trained(tmp_path / "busy", dataset, max_wallclock_seconds=LIMIT))
    assert results[1].seconds > 0.4 * LIMIT > results[0].seconds
    quiet, busy = (result.model.state_dict() for result in results)
    assert all(torch.equal(quiet[name], busy[name]) for name in quiet)


def test_a_run_says_where_the_time_limit_stopped_it(dataset: Path, tmp_path: Path) -> None:
    result = trained(tmp_path / "stopped", dataset, max_wallclock_seconds=1e-9)
    log = (tmp_path / "stopped" / "train_seed1.log").read_text()
    assert result.steps == 1 and "\nstopping_early: wallclock_cap " in log
    said = "training: stopped by the time limit after 1 of 4 steps: the score is worse than after all planned steps"
    assert f"\n{said}\n" in log
    trained(tmp_path / "clock", dataset, max_wallclock_seconds=1e-9, warmdown_by="clock")
    assert "stopped by" not in (tmp_path / "clock" / "train_seed1.log").read_text()


def test_swa_needs_two_checkpoints(dataset: Path, tmp_path: Path) -> None:
    changes = {"ema_decay": 0.0, "swa_start_frac": 1.0, "warmdown_frac": 1.0}
    states = {}
    # of 4 steps, every third is one, every second are two
    for name, swa in (("last", {}), ("one", {"swa_every": 3}), ("two", {"swa_every": 2})):
        result = trained(tmp_path / name, dataset, swa_enabled=bool(swa), **swa, **changes)
        assert result.steps == 4
        states[name] = result.model.state_dict()
    assert all(torch.equal(states["one"][name], weight) for name, weight in states["last"].items())
    assert not torch.equal(states["two"]["embedding.weight"], states["last"]["embedding.weight"])


def test_sequences_grow_and_no_token_is_skipped(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def recorded(optimizers: Any, loss_of: Any, *others: Any, **named: Any) -> torch.Tensor:
        def loss(inputs: torch.Tensor, targets: torch.Tensor, **state: bool) -> torch.Tensor:
            found.append((inputs.shape[1], inputs.flatten(), targets.flatten()))
            return loss_of(inputs, targets, **state)

        return training_step(optimizers, loss, *others, **named)

    monkeypatch.setattr("train.loop.training_step", recorded)
    trained(tmp_path / "fixed", dataset, loader="sequential")
    fixed = found[-4:]
    changes = {"loader": "sequential", "train_seq_schedule": "16@0.25,32@0.5,64@1", "seq_change_warmup_steps": 2}
    trained(tmp_path / "growing", dataset, warmdown_frac=0.0, warmdown_iters=0, **changes)
    growing = found[-4:]
    assert [length for length, _, _ in fixed + growing] == [64] * 4 + [16, 16, 32, 64]
    for (_, inputs, targets), (_, same, following) in zip(fixed, growing, strict=True):
        assert torch.equal(inputs, same) and torch.equal(targets, following)
    log = (tmp_path / "growing" / "train_seed1.log").read_text()
    for length, step in ((32, 2), (64, 3)):
        assert f"\ntraining: sequences of {length} tokens from step {step} on\n" in log
    assert re.findall(r" lr_scale:(\S+)", log) == ["1", "1", "0.5", "0.5"]


def test_recurrence_starts_at_a_fraction_and_stays_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = trained(tmp_path / "steps", dataset, recur_start_frac=0.75)
    log = (tmp_path / "steps" / "train_seed1.log").read_text()
    assert result.recurrence and "recurrence:activated at step 3, layers" in log
    assert not trained(tmp_path / "never", dataset, recur_start_frac=1.0).recurrence

    # a clock whose estimate falls below the fraction again
    class Falling(WallClock):
        @property
        def elapsed_seconds(self) -> float:
            return (0.0, 30.0, 60.0, 40.0, 40.0)[self.steps]

    monkeypatch.setattr("train.loop.WallClock", Falling)
    timed = {"max_wallclock_seconds": 100.0, "warmdown_by": "clock", "recur_start_frac": 0.5}
    result = trained(tmp_path / "time", dataset, **timed)
    log = (tmp_path / "time" / "train_seed1.log").read_text()
    assert result.recurrence and log.count("recurrence:activated at step") == 1
    assert "recurrence:activated at step 2, layers" in log


def test_the_first_rise_of_the_loss_is_explained_once(dataset: Path, tmp_path: Path) -> None:
    explained = "training: the loss rises in the first steps: this is normal at a high learning rate\n"
    for name, rate, times in (("high", 0.3, 1), ("low", 1e-4, 0)):
        trained(tmp_path / name, dataset, iterations=6, tied_embed_lr=rate)
        log = (tmp_path / name / "train_seed1.log").read_text()
        assert log.count(explained) == times, name


def test_the_speed_of_a_run_and_its_flops_utilization() -> None:
    config = load_recipe("quickstart").config(train_batch_tokens=1024)
    speed = Speed(config, Ranks(world_size=2))
    speed.mflop = {(False, 1024): 100e3, (True, 1024): 200e3}
    for step in range(10):
        speed.count((step >= 5, 1024))
    assert speed.text(3.0, (True, 1024)) == "3,072 tokens/s"
    assert speed.of_run(5.0) == "10 steps in 5 s, 2,048 tokens/s"
    speed.peak = 512.0
    # 3,072 tokens/s × 0.2 TFLOP on 2 GPUs
    assert speed.text(3.0, (True, 1024)) == "3,072 tokens/s, MFU 60.0 % of 512 TFLOP/s"
    # half of the steps with recurrence: 2,048 tokens/s × 0.15 TFLOP on 2 GPUs
    assert speed.of_run(5.0) == "10 steps in 5 s, 2,048 tokens/s, MFU 30.0 % of 512 TFLOP/s"


@pytest.mark.parametrize("bad", [11, 14], ids=["between log lines", "at the end"])
def test_nan_weights_never_replace_a_good_checkpoint(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    steps = 0

    def step(optimizers: Optimizers, *given: Any, **named: Any) -> torch.Tensor:
        nonlocal steps
        loss = training_step(optimizers, *given, **named)
        steps += 1
        if steps == bad:
            with torch.no_grad():
                next(models[0].parameters()).view(-1)[0] = math.nan
        return loss

    models: list[torch.nn.Module] = []
    monkeypatch.setattr("train.loop.GPT", lambda config: models.append(GPT(config)) or models[0])
    monkeypatch.setattr("train.loop.training_step", step)
    changes = {"iterations": 14, "checkpoint_every": 3, "train_log_every": 100, "ema_decay": 0.0, "warmup_steps": 0}
    with pytest.raises(
        UserError, match=rf"largest weight is nan at step {bad + 1 if bad == 11 else bad} .*checkpoint\.pt"
    ):
        trained(tmp_path / "run", dataset, **changes)
    saved = read_tensors(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == (9 if bad == 11 else 12)
    assert all(bool(weight.isfinite().all()) for weight in saved["parts"]["model"].values())


def test_a_resume_on_another_number_of_ranks_is_said(dataset: Path, tmp_path: Path) -> None:
    changes = {"iterations": 4, "checkpoint_every": 3}
    trained(tmp_path / "run", dataset, **changes)
    path, said = tmp_path / "run" / "checkpoint.pt", "training: resumed on 1 rank, the checkpoint was written on 2: "
    saved = read_tensors(path)
    assert saved["world_size"] == 1
    for name, values, times in (("same", saved, 0), ("other", {**saved, "world_size": 2}, 1)):
        config = narrow(dataset, tmp_path / name, 1, val_loss_every=0, **changes).replace(resume="auto")
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "checkpoint.pt", values)
        with RunLogger(tmp_path / name, config.seed) as log:
            train(config, Dataset(config), RunFolder(tmp_path / name), Ranks(), log)
        assert (tmp_path / name / "train_seed1.log").read_text().count(said) == times

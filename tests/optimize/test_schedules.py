"""Schedules against the published figures."""

from __future__ import annotations

import pytest

from train.config import Config
from train.optimize.schedules import lr_scale, muon_momentum, recurrence_on


def config(**settings: float) -> Config:
    return Config(**{"max_wallclock_seconds": 600.0, "warmdown_iters": 3000, **settings})


def test_lr_by_fraction_gives_the_figures_of_1471() -> None:
    settings = config(warmdown_frac=0.72, gptq_reserve_seconds=10.0)
    expected = {0.0: 1.0, 0.27: 1.0, 0.5: 0.694444, 0.64: 0.5, 0.9: 0.138889, 1.0: 0.0, 1.01: 0.0}
    for fraction, scale in expected.items():
        # 590 seconds are left for training, and the step has no part in it
        assert lr_scale(17, fraction * 590, settings) == pytest.approx(scale, abs=5e-7)


def test_lr_by_fraction_counts_steps_without_a_cap() -> None:
    settings = config(warmdown_frac=0.72, max_wallclock_seconds=0.0, iterations=1000)
    for step, scale in {0: 1.0, 270: 1.0, 500: 0.694444, 640: 0.5, 900: 0.138889, 1000: 0.0}.items():
        assert lr_scale(step, 1e9, settings) == pytest.approx(scale, abs=5e-7)


@pytest.mark.parametrize("changes", [{"warmdown_frac": 0.72}, {"warmdown_frac": 0.0, "warmdown_iters": 720}])
def test_lr_by_steps_under_a_cap_reads_no_clock(changes: dict[str, float]) -> None:
    settings = config(**changes, iterations=1000, warmdown_by="steps")
    for step, scale in {0: 1.0, 270: 1.0, 500: 0.694444, 640: 0.5, 900: 0.138889, 1000: 0.0}.items():
        assert [lr_scale(step, seconds, settings) for seconds in (0.0, 599.0, 1e9)] == pytest.approx(
            [scale] * 3, abs=5e-7
        )


def test_lr_by_steps() -> None:
    settings = config(max_wallclock_seconds=0.0, iterations=1000, warmdown_iters=400)
    for step, scale in {0: 1.0, 599: 1.0, 600: 1.0, 601: 0.9975, 800: 0.5, 999: 0.0025, 1000: 0.0, 1001: 0.0}.items():
        assert lr_scale(step, 1e9, settings) == pytest.approx(scale, abs=1e-12)
    # a run shorter than its warm-down begins below one
    assert lr_scale(0, 0.0, settings.replace(iterations=300)) == 0.75
    assert lr_scale(900, 0.0, settings.replace(warmdown_iters=0)) == 1.0


def test_lr_by_time_under_a_cap() -> None:
    settings = config(warmdown_iters=1000)
    assert lr_scale(0, 0.0, settings) == 1.0
    # 0.1 s per step: 1,000 steps are the last 100 s, and halfway through them half is left
    assert lr_scale(4999, 499.9, settings) == 1.0
    assert lr_scale(5500, 550.0, settings) == pytest.approx(0.5)
    assert lr_scale(6000, 600.0, settings) == 0.0
    assert lr_scale(6001, 600.1, settings) == 0.0
    # at the same moment slower steps mean a longer warm-down, and iterations have no part
    assert lr_scale(2750, 550.0, settings.replace(iterations=2751)) == pytest.approx(0.25)
    assert lr_scale(5500, 550.0, settings.replace(warmdown_iters=0)) == 1.0
    # the reserve for calibration ends training before the cap
    assert lr_scale(5500, 550.0, settings.replace(gptq_reserve_seconds=50.0)) == 0.0


@pytest.mark.parametrize(
    ("steps", "warmdown", "threshold", "every", "first", "count"),
    [
        pytest.param(11132, 3000, 0.5, 200, 9800, 7, id="122"),
        pytest.param(7412, 3000, 0.5, 200, 6000, 8, id="198"),
        pytest.param(6976, 3000, 0.5, 120, 5520, 13, id="265"),
    ],
)
def test_warm_down_starts_averaging_where_the_published_runs_did(
    steps: int, warmdown: int, threshold: float, every: int, first: int, count: int
) -> None:
    settings = config(warmdown_iters=warmdown)
    seconds = 600.0 / steps
    # the scale of the step that ends as number s was computed before it
    taken = [s for s in range(every, steps + 1, every) if lr_scale(s - 1, (s - 1) * seconds, settings) < threshold]
    assert (taken[0], len(taken)) == (first, count)


@pytest.mark.parametrize(
    ("steps", "stall", "average_start", "qat_step"),
    [(5733, 31.3, 4950, 5133), (5945, 10.5, 5200, 5366), (5936, 10.7, 5200, 5356)],
)
def test_warm_down_follows_a_run_whose_steps_became_slower(
    steps: int, stall: float, average_start: int, qat_step: int
) -> None:
    # #1392: 95.3 ms per step up to 3,000, a stall for recompiling, then what is left of 600 s
    after = (600.0 - 3000 * 0.0953 - stall) / (steps - 3000)
    settings = config(warmdown_iters=4000)

    def scale(step: int) -> float:
        return lr_scale(step, 3000 * 0.0953 + stall + (step - 3000) * after, settings)

    assert next(s for s in range(3050, steps, 50) if scale(s - 1) < 0.2) == average_start
    assert scale(qat_step) == pytest.approx(0.14985, abs=0.003)


def test_momentum_rises_as_published() -> None:
    settings = config(muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500)
    for step, momentum in {0: 0.92, 750: 0.955, 1499: 0.989953, 1500: 0.99, 9999: 0.99}.items():
        assert muon_momentum(step, settings) == pytest.approx(momentum, abs=5e-7)
    assert muon_momentum(0, settings.replace(muon_momentum_warmup_steps=0)) == 0.99


def test_recurrence_starts_at_a_step_or_at_a_fraction_of_the_time_or_of_the_steps() -> None:
    by_step = config(recur_layers=(3, 4, 5), recur_start_step=2000, num_layers=11)
    assert [recurrence_on(step, 1e9, by_step) for step in (0, 1999, 2000, 9999)] == [False, False, True, True]
    # #2135: 0.35 of 600 − 0.5 s, whatever the step
    by_time = by_step.replace(recur_start_frac=0.35, gptq_reserve_seconds=0.5)
    assert [recurrence_on(9999, seconds, by_time) for seconds in (0.0, 209.8, 209.83, 599.0)] == [
        False,
        False,
        True,
        True,
    ]
    for changes in ({"max_wallclock_seconds": 0.0, "gptq_reserve_seconds": 0.0}, {"warmdown_by": "steps"}):
        by_steps = by_time.replace(iterations=1000, **changes)
        assert [recurrence_on(step, 1e9, by_steps) for step in (0, 349, 350, 999)] == [False, False, True, True]
    assert not recurrence_on(9999, 1e9, by_time.replace(recur_layers=()))

"""Averages of weights against float64 sums written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from train.common.errors import UserError
from train.optimize.averaging import EMA, SWA


class Model(nn.Module):
    """Parameters of the dtypes and shapes that a run has, and one that is never trained."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(7, 4, generator=draw).to(dtype))
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=draw))
        self.scalar = nn.Parameter(torch.randn((), generator=draw))
        self.frozen = nn.Parameter(torch.randn(2, generator=draw), requires_grad=False)

    @torch.no_grad()
    def move(self, step: int) -> None:
        draw = torch.Generator().manual_seed(1000 + step)
        for parameter in (self.embedding, self.matrix, self.scalar):
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype), alpha=0.1)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_ema_equals_the_sum_over_all_steps() -> None:
    model = Model()
    ema = EMA(model, 0.9)
    history = [copies(model)]
    for step in range(12):
        model.move(step)
        ema.update()
        history.append(copies(model))
    for name, value in ema.average().items():
        assert value.dtype == torch.float32
        # no bias correction: the start keeps the weight 0.9^12
        truth = 0.9**12 * history[0][name].double()
        for step in range(1, 13):
            truth += 0.1 * 0.9 ** (12 - step) * history[step][name].double()
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-6)


def test_ema_of_bfloat16_weights_is_not_rounded_to_them() -> None:
    model = Model()
    ema = EMA(model, 0.997)
    with torch.no_grad():
        model.embedding.fill_(1.0)
    start = ema.average()["embedding"].clone()
    ema.update()
    moved = ema.average()["embedding"]
    # steps of 0.3 % of the distance are below bfloat16's resolution
    torch.testing.assert_close(moved, start + 0.003 * (1.0 - start), rtol=1e-6, atol=1e-7)
    assert (moved != moved.bfloat16().float()).any()


def test_ema_keeps_float64() -> None:
    model = Model(dtype=torch.float64)
    ema = EMA(model, 0.5)
    before = copies(model)["embedding"]
    model.move(0)
    ema.update()
    torch.testing.assert_close(
        ema.average()["embedding"], (before + model.embedding.detach()) / 2, rtol=1e-15, atol=1e-15
    )


def test_apply_rounds_to_the_parameter_and_leaves_the_average() -> None:
    model = Model()
    ema = EMA(model, 0.9)
    model.move(0)
    ema.update()
    weights = copies(model)
    average = {name: value.clone() for name, value in ema.average().items()}
    ema.apply()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, average[name].to(parameter.dtype))
    assert not torch.equal(model.matrix, weights["matrix"])
    assert all(torch.equal(ema.average()[name], average[name]) for name in average)


@pytest.mark.parametrize("make", [lambda m: EMA(m, 0.99), lambda m: SWA(m, 3, 0.9)], ids=["ema", "swa"])
def test_resume_is_bit_equal(make: Callable[[nn.Module], EMA | SWA], tmp_path: Path) -> None:
    def advance(model: Model, average: EMA | SWA, steps: range) -> None:
        for step in steps:
            model.move(step)
            if isinstance(average, EMA):
                average.update()
            else:
                average.update(step + 1, 0.5)

    model = Model()
    average = make(model)
    advance(model, average, range(5))
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, tmp_path / "checkpoint.pt")
    advance(model, average, range(5, 11))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = Model(seed=9)
    resumed = make(other)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["average"])
    advance(other, resumed, range(5, 11))
    for name, value in average.average().items():
        assert torch.equal(value, resumed.average()[name]), name


def test_a_foreign_checkpoint_is_refused() -> None:
    ema = EMA(Model(), 0.99)
    with pytest.raises(UserError, match=r"ema_decay.*0\.99.*0\.9"):
        EMA(Model(), 0.9).load_state_dict(ema.state_dict())
    state = ema.state_dict()
    state["average"]["matrix"] = torch.zeros(3, 5)
    with pytest.raises(UserError, match="matrix"):
        ema.load_state_dict(state)
    del state["average"]["matrix"]
    with pytest.raises(UserError, match=r"matrix.*nothing"):
        ema.load_state_dict(state)


def test_swa_takes_every_nth_step_below_the_threshold() -> None:
    model = Model(dtype=torch.float32)
    swa = SWA(model, 200, 0.5)
    taken = []
    for step in range(1, 1101):
        if step % 100 == 0:
            model.move(step)
        # the rate falls below a half at step 401, and at 400 it is exactly the threshold
        if swa.update(step, 0.5 if step <= 400 else 0.4):
            taken.append((step, copies(model)))
    assert [step for step, _ in taken] == [600, 800, 1000] and swa.count == 3
    for name, value in swa.average().items():
        truth = sum(weights[name].double() for _, weights in taken) / 3
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


def test_swa_sums_in_the_parameters_dtype_as_published() -> None:
    model = Model()
    swa = SWA(model, 1, 1.0)
    running = torch.zeros_like(model.embedding)
    for step in range(7):
        model.move(step)
        swa.update(step, 0.1)
        running = (running.float() + model.embedding.detach().float()).bfloat16()
    assert torch.equal(swa.average()["embedding"], (running.float() / 7).bfloat16())


def test_wrong_use_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="decay"):
        EMA(model, 1.0)
    with pytest.raises(ValueError, match="every"):
        SWA(model, 0, 0.5)
    with pytest.raises(RuntimeError, match="no step"):
        SWA(model, 1, 0.5).apply()

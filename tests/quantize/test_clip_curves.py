"""The curves of the row clips: the entropy model against its formula and real codes, the choice against brute force."""

import copy
import math
from typing import Any

import pytest
import torch
from model_systems import narrow_config, random_ids, random_model

from train.common.errors import UserError
from train.config import Config
from train.model.gpt import GPT
from train.quantize.calibrate import collect_hessians
from train.quantize.clip_curves import (
    Curves,
    choose_sigmas,
    gaussian_codes,
    group_curves,
    loss_factors,
)
from train.quantize.row_scales import largest_code, rtn, sdclip
from train.quantize.tensors import matrices_to_calibrate, tensor_group


@pytest.mark.parametrize(("bits", "sigmas", "published"), [(6, 12.85, 3.363), (8, 20.0, 4.725)])
def test_entropy_is_near_the_published_formula(bits: int, sigmas: float, published: float) -> None:
    ratio = largest_code(bits) / sigmas
    entropy, error = gaussian_codes(torch.tensor(ratio, dtype=torch.float64), bits)
    formula = 0.5 * math.log2(math.pi * math.e / 2) + bits - math.log2(sigmas)
    assert formula == pytest.approx(published, abs=5e-4)
    # it has 2^(bits-1) codes to a side where there are 2^(bits-1) - 1, and forgets that rounding adds variance, 1/12
    exact = 0.5 * math.log2(2 * math.pi * math.e * (ratio**2 + 1 / 12))
    assert float(entropy) == pytest.approx(exact, abs=1e-4)
    assert float(entropy) == pytest.approx(formula, abs=0.04)
    assert float(error) == pytest.approx(1 / 12, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 6])
@pytest.mark.parametrize("ratio", [0.05, 0.4, 1.5, 20.0])
def test_entropy_and_error_are_those_of_clamped_codes(bits: int, ratio: float) -> None:
    # midpoints of many equal slices of probability
    values = ratio * torch.special.ndtri((torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000)
    codes = values.round().clamp(-largest_code(bits), largest_code(bits))
    share = torch.unique(codes, return_counts=True)[1].double() / len(codes)
    entropy, error = gaussian_codes(torch.tensor(ratio, dtype=torch.float64), bits)
    assert float(entropy) == pytest.approx(float(-(share * share.log2()).sum()), rel=1e-4, abs=1e-5)
    assert float(error) == pytest.approx(float((values - codes).square().mean()), rel=1e-4, abs=1e-6)


def entropy_bytes(codes: torch.Tensor) -> float:
    share = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return float(-(share * share.log2()).sum()) * codes.numel() / 8


# wide enough for rows with a deviation, small enough for a quick search
WIDE: dict[str, Any] = {"model_dim": 128, "num_heads": 4, "passthrough_max_elements": 1024, "scale_floor": "none"}


@pytest.fixture(scope="module")
def config() -> Config:
    return narrow_config(
        "sp8192", num_layers=4, recur_layers=(1,), parallel_start_layer=3, ve_layers=(2, 3), xsa_last_n=4, **WIDE
    )


@pytest.fixture(scope="module")
def model(config: Config) -> GPT:
    return random_model(config).float()


@pytest.fixture(scope="module")
def hessians(model: GPT, config: Config) -> dict[str, torch.Tensor]:
    model.compute_dtype = torch.float32
    return collect_hessians(model, [random_ids(config, 4, 16)], matrices_to_calibrate(model, config), recurrence=True)


@pytest.mark.parametrize("floor", ["none", "published"])
def test_curves_predict_real_codes(model: GPT, config: Config, floor: str) -> None:
    config = config.replace(scale_floor=floor)
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in parameters.values():
            # small enough for the published floor to bind over most of the grid
            weight.mul_(0.1)
    curves = {group.name: group for group in group_curves(model, config, {})}
    assert set(curves) == {tensor_group(name) for name in matrices_to_calibrate(model, config)} | {
        "embedding.weight",
        "ve.embedding",
    }
    group = curves["blocks.*.mlp.up"]
    assert group.tensors == tuple(f"blocks.{layer}.mlp.up" for layer in range(4)) and group.start == 12.85
    for place in (250, 400, 650):
        size = error = 0.0
        for name in group.tensors:
            rows = parameters[name].detach()
            scales = sdclip(rows, 6, sigmas=float(group.sigmas[place]), floor=floor)
            codes = rtn(rows, scales, 6)
            # the model knows every row's deviation, a coder of ideal rows would too
            size += sum(entropy_bytes_of_row(row, scale) for row, scale in zip(rows, scales, strict=True))
            error += (rows - codes * scales[:, None].float()).square().sum().item()
        assert float(group.size[place]) == pytest.approx(size, rel=0.01)
        assert float(group.error[place]) == pytest.approx(error, rel=0.02)


def entropy_bytes_of_row(row: torch.Tensor, scale: torch.Tensor) -> float:
    """What an ideal coder of N(0, σ²) would need for a row's codes."""
    deviation = float(row.std())
    bounds = torch.arange(-32, 32, dtype=torch.float64) + 0.5
    below = torch.special.ndtr(bounds * float(scale) / deviation)
    mass = torch.cat([below[1:63], torch.ones(1, dtype=torch.float64)]) - torch.cat(
        [torch.zeros(1, dtype=torch.float64), below[1:63]]
    )
    codes = rtn(row[None], scale[None], 6)[0].long()
    return float(-mass.clamp_min(1e-300).log2()[codes + 31].sum()) / 8


def made_curves(name: str, elements: int, deviation: float) -> Curves:
    sigmas = torch.logspace(math.log10(3), math.log10(40), 60, dtype=torch.float64)
    entropy, error = gaussian_codes(31 / sigmas, 6)
    scales = sigmas * deviation / 31
    return Curves(name, (name,), 6, 12.85, sigmas, entropy * elements / 8, error * scales.square() * elements, elements)


@pytest.mark.parametrize("budget", [4000.0, 5200.0, 6100.0])
def test_the_choice_is_as_good_as_any(budget: float) -> None:
    curves, factors = [made_curves("a", 10_000, 0.1), made_curves("b", 3000, 0.4)], [1.0, 7.0]
    places = choose_sigmas(curves, factors, {}, budget)
    size = curves[0].size[:, None] + curves[1].size
    loss = factors[0] * curves[0].error[:, None] + factors[1] * curves[1].error
    best = float(loss[size <= budget].min())
    assert float(size[places[0], places[1]]) <= budget
    # a single multiplier leaves at most one step of the grid
    assert best <= float(loss[places[0], places[1]]) <= 1.1 * best


def test_what_counts_more_gets_finer_codes_and_a_correction_is_paid_for() -> None:
    curves = [made_curves("a", 10_000, 0.1), made_curves("b", 10_000, 0.1)]
    even = choose_sigmas(curves, [1.0, 1.0], {}, 8000.0)
    assert even[0] == even[1]
    first, second = choose_sigmas(curves, [16.0, 1.0], {}, 8000.0)
    # sixteen times the loss per error: codes four times as fine at the same size together
    assert float(curves[0].sigmas[second] / curves[0].sigmas[first]) == pytest.approx(4, rel=0.1)
    dearer = choose_sigmas(curves, [1.0, 1.0], {"a": 0.02, "b": 0.02}, 8000.0)
    assert dearer[0] > even[0]
    assert choose_sigmas(curves, [1.0, 1.0], {}, 1.0) == [59, 59]
    assert choose_sigmas(curves, [1.0, 1.0], {}, 1e9) == [int(curves[0].error.argmin())] * 2


def test_loss_factors_are_measured_group_by_group_and_leave_the_model_as_it_was(model: GPT, config: Config) -> None:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    curves = group_curves(model, config, {})
    price = {group.name: float(index + 1) for index, group in enumerate(curves)}

    def loss() -> float:
        return 2.0 + sum(
            price.get(tensor_group(name), 0.0) * float((weight - before[name]).double().square().sum())
            for name, weight in model.named_parameters()
        )

    factors = loss_factors(model, config, curves, {}, loss)
    assert factors == pytest.approx(list(price.values()), rel=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    # a loss that falls is noise, not a gift
    assert min(loss_factors(model, config, curves, {}, iter(range(100, 0, -1)).__next__)) > 0


def test_floors_and_fixed_tables_are_left_out_of_the_search(model: GPT, config: Config) -> None:
    names = [group.name for group in group_curves(model, config.replace(embed_clip="quantile"), {})]
    assert "embedding.weight" not in names and "blocks.*.mlp.up" in names
    assert all(not name.endswith("embedding") for name in names)
    assert "embedding.weight" not in [
        group.name for group in group_curves(model, config.replace(tied_embed_bits=16), {})
    ]


def test_a_clip_without_k_cannot_be_searched() -> None:
    with pytest.raises(UserError, match=r"target_bytes searches the k of SDClip, but matrix_clip is row_max"):
        Config(target_bytes=16_000_000, matrix_clip="row_max")

"""Row scales against the published constants and straight-line float64 formulas."""

import math

import numpy as np
import pytest
import torch

from train.common.errors import UserError
from train.quantize.row_scales import (
    ROW_SCALES,
    SEARCH_QUANTILES,
    hessian_sdclip,
    largest_code,
    percentile_candidates,
    percentile_search,
    quantile,
    row_max,
    rtn,
    sdclip,
)


def rows_of_deviation(deviation: float, columns: int = 64) -> torch.Tensor:
    """Rows whose unbiased standard deviation is exactly `deviation`."""
    signs = torch.ones(3, columns, dtype=torch.float64)
    signs[:, ::2] = -1
    return signs * deviation * math.sqrt((columns - 1) / columns)


@pytest.mark.parametrize(
    ("deviation", "floor", "expected"),
    [
        (0.05, "none", 0.0207214),
        (0.05, "published", 0.0322571),
        (0.1, "none", 0.0414429),
        (0.1, "published", 0.0414429),
    ],
)
def test_sdclip_gives_the_published_scales(deviation: float, floor: str, expected: float) -> None:
    scales = sdclip(rows_of_deviation(deviation), 6, sigmas=12.85, floor=floor)
    assert scales.dtype == torch.float16
    assert scales.shape == (3,)
    assert scales.double().tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_without_a_floor_small_rows_keep_small_scales() -> None:
    scales = sdclip(rows_of_deviation(1e-3), 6, sigmas=12.85, floor="none").double()
    assert scales.tolist() == pytest.approx([12.85e-3 / 31] * 3, rel=2.0**-11)


@pytest.mark.parametrize(("bits", "floor"), [(6, 0.032257080078125), (8, 0.00787353515625), (5, 1 / 15)])
@pytest.mark.parametrize("name", [name for name in ROW_SCALES if name != "hessian_sdclip"])
def test_the_published_floor_is_one_over_the_largest_code_in_float16(name: str, bits: int, floor: float) -> None:
    tiny = torch.randn(4, 16) * 1e-4
    scales = ROW_SCALES[name](tiny, bits, sigmas=3.0, floor="published")
    assert scales.double().tolist() == [float(np.float16(floor))] * 4


@pytest.mark.parametrize("bits", range(2, 9))
def test_each_formula_in_float64(bits: int) -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(bits))
    magnitudes, limit = weight.double().abs().numpy(), 2 ** (bits - 1) - 1
    sigma = weight.double().numpy().std(axis=1, ddof=1)
    truths = {
        row_max: magnitudes.max(axis=1),
        quantile: np.quantile(magnitudes, 0.9999984, axis=1),
        sdclip: 2.5 * sigma,
    }
    for function, clip in truths.items():
        scales = function(weight, bits, sigmas=2.5, floor="none").double().numpy()
        # half a unit in the last place of float16, and float32 arithmetic before it
        np.testing.assert_allclose(scales, clip / limit, rtol=2.0**-11 + 1e-6, err_msg=str(function))


def test_hessian_sdclip_widens_rows_whose_large_weights_meet_strong_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    inputs = torch.randn(100, 24, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 24)
    hessian = inputs.T @ inputs
    h = hessian.diagonal().numpy() / hessian.diagonal().numpy().mean()
    r = (weight.abs().numpy() * h).mean(axis=1)
    r = r / r.mean()
    truth = 12.85 * weight.numpy().std(axis=1, ddof=1) * (1 + 0.175 * (r - 1)) / 31
    scales = hessian_sdclip(weight, 6, sigmas=12.85, floor="none", hessian=hessian)
    np.testing.assert_allclose(scales.double().numpy(), truth, rtol=2.0**-11)
    assert len({*scales.tolist()} & {*sdclip(weight, 6, sigmas=12.85, floor="none").tolist()}) < 5
    with pytest.raises(UserError, match="needs the matrix's Hessian"):
        hessian_sdclip(weight, 6)


def test_percentile_search_takes_one_quantile_for_the_whole_matrix_by_squared_error() -> None:
    weight = torch.randn(6, 2000, generator=torch.Generator().manual_seed(3))
    weight[0, 0] = 40.0
    candidates = percentile_candidates(weight, 6, floor="none")
    truth = []
    for share, candidate in zip(SEARCH_QUANTILES, candidates, strict=True):
        scale = np.quantile(weight.double().abs().numpy(), share, axis=1) / 31
        # float16, and a place between the outlier and its neighbour that is computed in float32
        np.testing.assert_allclose(candidate.double().numpy(), scale, rtol=2.0**-11 + 2e-4)
        scale = scale.astype(np.float16).astype(np.float64)[:, None]
        codes = np.rint(np.clip(weight.double().numpy() / scale, -31, 31))
        truth.append(((weight.double().numpy() - codes * scale) ** 2).sum())
    assert len(candidates) == 5
    chosen = percentile_search(weight, 6, floor="none")
    assert torch.equal(chosen, candidates[int(np.argmin(truth))])
    assert not torch.equal(chosen, percentile_search(weight[1:].repeat(2, 1)[:6], 6, floor="none"))


@pytest.mark.parametrize("name", sorted(ROW_SCALES))
@pytest.mark.parametrize("floor", ["published", "none"])
def test_zero_rows_and_no_rows_have_positive_scales(name: str, floor: str) -> None:
    hessian = torch.eye(8)
    zeros = ROW_SCALES[name](torch.zeros(3, 8), 6, sigmas=12.85, floor=floor, hessian=hessian)
    assert bool((zeros > 0).all())
    assert not rtn(torch.zeros(3, 8), zeros, 6).any()
    assert ROW_SCALES[name](torch.zeros(0, 8), 6, sigmas=12.85, floor=floor, hessian=hessian).shape == (0,)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_to_nearest_clamps_symmetrically_and_rounds_halves_to_even(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    assert largest_code(bits) == limit
    weight = torch.tensor([[0.5, 1.5, -0.5, 0.49, -1000.0, 1000.0, limit + 0.4]])
    codes = rtn(weight, torch.tensor([1.0], dtype=torch.float16), bits)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[0, min(2, limit), 0, 0, -limit, limit, limit]]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="bits: expected 2 to 8, got 9"):
        sdclip(torch.randn(2, 4), 9)
    with pytest.raises(UserError, match="scale_floor: expected one of published, none, got 'low'"):
        sdclip(torch.randn(2, 4), 6, floor="low")
    with pytest.raises(UserError, match="rows of one element"):
        sdclip(torch.randn(2, 1), 6)


@pytest.mark.parametrize("deviation", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("clip", ["sdclip", "quantile"])
def test_int8_codes_are_near_those_of_the_published_float32_scale(clip: str, deviation: float) -> None:
    rows = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)) * deviation
    wide = rows.double()
    limit = 20 * wide.std(dim=1) if clip == "sdclip" else torch.quantile(wide.abs(), 0.9999984, dim=1)
    scale = (limit / 127).clamp_min(1 / 127).float().double()[:, None]
    published = torch.round(wide.clamp(-limit[:, None], limit[:, None]) / scale).clamp(-127, 127)
    stored = ROW_SCALES[clip](rows, 8, sigmas=20.0)
    found = rtn(rows, stored, 8).double()
    # the recipes state these shares
    assert (found - published).abs().max() <= 1
    assert 0 < (found != published).double().mean() < (0.0005 if deviation == 0.02 else 0.007)
    errors = [(wide - codes * stored.double()[:, None]).square().sum() for codes in (found, published)]
    assert errors[0] <= errors[1]

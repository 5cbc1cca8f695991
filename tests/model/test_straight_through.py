from __future__ import annotations

import pytest
import torch

from train.model.straight_through import fake_quantize_rows, fake_quantize_scales


@pytest.mark.parametrize("columns", [2, 7, 512, 3000])
def test_scales_are_the_sorted_quantile(columns: int) -> None:
    weight = torch.randn(5, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    # the default quantile of torch sorts the row and interpolates, as the published script had it
    expected = torch.quantile(weight.abs(), 0.9999984, dim=1) / 31
    torch.testing.assert_close(fake_quantize_scales(weight), expected, rtol=1e-13, atol=0)


def test_rows_of_zeros_keep_the_smallest_clip() -> None:
    assert fake_quantize_scales(torch.zeros(1, 8, dtype=torch.float64)).item() == pytest.approx(1e-8 / 31)
    assert fake_quantize_rows(torch.zeros(1, 8)).count_nonzero() == 0


@pytest.mark.parametrize("columns", [1, 700_000])
def test_columns_whose_quantile_lies_elsewhere_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match="columns"):
        fake_quantize_scales(torch.ones(1, columns))


def test_rounded_rows_lie_on_63_levels_near_the_weight_and_the_gradient_passes() -> None:
    weight = torch.randn(6, 400, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scales = fake_quantize_scales(weight)[:, None]
    rounded = fake_quantize_rows(weight)
    codes = rounded / scales
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.abs().max() < 31.5
    assert ((rounded - weight).abs() <= 0.5001 * scales).all()
    assert rounded.unique().numel() > 100 and not torch.equal(rounded, weight)
    upstream = torch.randn_like(weight)
    rounded.backward(upstream)
    assert torch.equal(weight.grad, upstream)

from __future__ import annotations

import pytest
import torch

from train.model.norm import layer_scale, rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_formula(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    eps = 0.1
    truth = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + eps)
    found = rms_norm(x, eps)
    assert found.dtype == dtype
    # three roundings of half a unit each: the mean square under the root, its inverse, the product
    torch.testing.assert_close(found.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-15)


def test_epsilon_is_the_given_one_for_a_small_bfloat16_row() -> None:
    # torch before 2.7 took bfloat16's own epsilon, which would make this row's deviation 0.056
    row = torch.full((1, 512), 0.005, dtype=torch.bfloat16)
    assert rms_norm(row, 1.1920928955078125e-07).float().std(correction=0) < 1e-6
    assert rms_norm(row, 1.1920928955078125e-07).float().mean().item() == pytest.approx(0.998, abs=2e-3)


def test_layer_scale_is_the_published_series() -> None:
    published = [1, 0.707107, 0.577350, 0.5, 0.447214, 0.408248, 0.377964, 0.353553, 0.333333, 0.316228, 0.301511]
    assert [layer_scale(layer) for layer in range(11)] == pytest.approx(published, abs=5e-7)

from __future__ import annotations

import math

import pytest
import torch

from train.model.head import head_logits, softcap


def test_softcap_equals_the_formula_and_stays_under_the_cap() -> None:
    values = torch.tensor([-90.0, -40.0, -1e-5, 0.0, 3.0, 40.0, 90.0], dtype=torch.float64)
    growth = [math.exp(2 * value / 30) for value in values.tolist()]
    expected = torch.tensor([30 * (e - 1) / (e + 1) for e in growth], dtype=torch.float64)
    torch.testing.assert_close(softcap(values, 30.0), expected, rtol=1e-9, atol=1e-14)
    assert softcap(values, 30.0).abs().max() < 30


@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    # the product rounds in its own dtype: half a unit of bfloat16 at 32 is 0.0625
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.0625),
    ],
)
def test_logits_cap_the_product_in_at_least_float32(dtype: torch.dtype, result: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 16, generator=generator).mul(3).to(dtype)
    weight = torch.randn(11, 16, generator=generator).to(dtype)
    product = torch.einsum("btd,vd->btv", hidden.double(), weight.double())
    expected = 20 * torch.tanh(product / 20)
    found = head_logits(hidden, weight, 20.0)
    assert found.dtype == result
    assert product.abs().max() > 20
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)

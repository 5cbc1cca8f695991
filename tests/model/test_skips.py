from __future__ import annotations

import pytest
import torch

from train.model.skips import UNetSkips


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))


def test_skip_at_init_adds_and_gated_skip_takes_half_of_each() -> None:
    x, stored = pair()
    plain, gated = UNetSkips(4, 8, gated=False).double(), UNetSkips(4, 8, gated=True).double()
    torch.testing.assert_close(plain(x, stored, 2), x + stored, rtol=0, atol=1e-14)
    torch.testing.assert_close(gated(x, stored, 2), 0.5 * x + 0.5 * stored, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gated", [False, True])
def test_skip_equals_the_formula_and_reaches_its_own_row_alone(gated: bool) -> None:
    torch.manual_seed(0)
    x, stored = pair()
    skips = UNetSkips(3, 8, gated=gated).double()
    with torch.no_grad():
        for weight in skips.parameters():
            weight.normal_()
    s = skips.weights[1] * stored
    expected = s + torch.sigmoid(skips.gates[1]) * (x - s) if gated else x + s
    found = skips(x, stored, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    found.square().sum().backward()
    for weight in skips.parameters():
        assert weight.grad[1].abs().min() > 0
        assert weight.grad[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("gated", [False, True])
def test_skip_passes_gradcheck(gated: bool) -> None:
    skips = UNetSkips(1, 8, gated=gated).double()

    def run(x: torch.Tensor, stored: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(("weights", "gates"), weights, strict=False))
        return torch.func.functional_call(skips, named, (x, stored, 0))

    weights = [torch.randn_like(weight, requires_grad=True) for weight in skips.parameters()]
    assert torch.autograd.gradcheck(run, (*pair(), *weights))

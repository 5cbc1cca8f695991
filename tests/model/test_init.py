from __future__ import annotations

import math

import pytest
import torch

from train.model.init import constant, matrix, normal_table, parameter, zero_matrix


@pytest.mark.parametrize(("rows", "columns"), [(96, 32), (32, 96), (64, 64)])
def test_orthogonal_matrix_keeps_lengths_on_its_short_side(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weight = matrix(rows, columns, orthogonal=True, gain=0.25).detach().double()
    gram = weight @ weight.T if rows <= columns else weight.T @ weight
    # entries are rounded to bfloat16, 8 bits of mantissa, which leaves about 2⁻⁸ of a unit row in the products
    torch.testing.assert_close(gram, 0.0625 * torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-3)


def test_plain_matrix_is_uniform_as_torch_linear_draws_it() -> None:
    torch.manual_seed(0)
    weight = matrix(400, 100, orthogonal=False).detach()
    bound = 1 / math.sqrt(100)
    assert weight.abs().max().item() == pytest.approx(bound, rel=5e-3)
    # 40,000 draws: the deviation of a uniform is known to 1 % by far
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=1e-2)
    assert abs(weight.mean().item()) < 1e-3


def test_masters_are_float32_and_rounded_to_bfloat16() -> None:
    for weight in (matrix(16, 16, orthogonal=True), matrix(16, 16, orthogonal=False), constant(0.05, 4)):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float())
    assert matrix(16, 16, orthogonal=False).detach().unique().numel() > 100
    assert constant(0.05).item() == 0.050048828125


def test_table_has_its_dtype_and_deviation() -> None:
    torch.manual_seed(0)
    table = normal_table(2000, 20, 0.005, torch.bfloat16)
    assert table.dtype == torch.bfloat16
    assert table.detach().float().std().item() == pytest.approx(0.005, rel=2e-2)
    assert normal_table(3, 4, 0.0, torch.float32).count_nonzero() == 0


def test_zero_matrix_and_untrained_parameter() -> None:
    assert zero_matrix(3, 4).shape == (3, 4) and zero_matrix(3, 4).count_nonzero() == 0
    assert zero_matrix(3, 4).requires_grad
    assert not parameter(torch.ones(2), trained=False).requires_grad

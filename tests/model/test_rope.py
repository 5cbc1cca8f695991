from __future__ import annotations

import cmath

import pytest
import torch

from train.model.rope import ntk_base, rotary_table, rotate


def table(length: int, dims: int, base: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_table(length, dims, base, dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("dims", "length", "train_length", "published"),
    [
        (64, 2048, 1024, 20_452.2287),
        (16, 2048, 1024, 22_081.7903),
        (16, 2048, 2048, 1e4),
        (64, 4096, 4096, 1e4),
        (64, 17, 1024, 1e4),
    ],
)
def test_ntk_bases_are_the_published_ones(dims: int, length: int, train_length: int, published: float) -> None:
    assert ntk_base(1e4, dims, length, train_length) == pytest.approx(published, abs=5e-5)


def test_two_rotary_dimensions_have_no_base_to_grow() -> None:
    assert ntk_base(1e4, 2, 4096, 1024) == 1e4


@pytest.mark.parametrize(("head_dim", "dims"), [(8, 8), (16, 4), (6, 2)])
def test_rotation_multiplies_complex_pairs_by_a_negative_phase(head_dim: int, dims: int) -> None:
    length, base = 7, 100.0
    x = torch.randn(2, length, 3, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x.clone()
    for t in range(length):
        for i in range(dims // 2):
            phase = cmath.exp(-1j * t * base ** (-2 * i / dims))
            pair = torch.complex(x[:, t, :, i], x[:, t, :, i + dims // 2]) * phase
            expected[:, t, :, i], expected[:, t, :, i + dims // 2] = pair.real, pair.imag
    torch.testing.assert_close(rotate(x, table(length, dims, base)), expected, rtol=0, atol=1e-12)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(8, dtype=torch.float64, generator=generator).expand(1, 20, 1, 8)
    key = torch.randn(8, dtype=torch.float64, generator=generator).expand(1, 20, 1, 8)
    rotary = table(20, 6)
    scores = rotate(query, rotary)[0, :, 0] @ rotate(key, rotary)[0, :, 0].T
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert (scores[11, 0] - scores[3, 0]).abs() > 1e-3


def test_rotation_passes_gradcheck() -> None:
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: rotate(values, table(3, 4)), (x,))

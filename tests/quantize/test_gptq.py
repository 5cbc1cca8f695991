"""GPTQ against a float64 straight-line version, and against rounding to nearest."""

import numpy as np
import pytest
import torch
from torch import Tensor

from golf_kernels import dispatch
from train.quantize import gptq as module
from train.quantize.gptq import gptq
from train.quantize.row_scales import rtn, sdclip


def problem(
    rows: int, columns: int, *, seed: int = 0, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random matrix, correlated inputs, their Hessian and row scales, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*batch, rows, columns, generator=generator, dtype=torch.float64) * 0.1
    mixing = torch.randn(*batch, columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(*batch, 4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    flat = weight.reshape(-1, columns)
    scales = sdclip(flat, 6, sigmas=12.85, floor="none").reshape(weight.shape[:-1])
    return weight, inputs, inputs.mT @ inputs, scales


def straight_line(weight: Tensor, hessian: Tensor, scales: Tensor, bits: int, damp: float) -> np.ndarray:
    """GPTQ as the paper writes it: one column at a time, an explicit inverse, no blocks."""
    w, h, s = weight.numpy().copy(), hessian.numpy().copy(), scales.double().numpy()
    limit = 2 ** (bits - 1) - 1
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable")
    w, h = w[:, order], h[order][:, order]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros(w.shape)
    for j in range(len(h)):
        codes[:, j] = np.rint(np.clip(w[:, j] / s, -limit, limit))
        error = (w[:, j] - codes[:, j] * s) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
    result = np.zeros_like(codes)
    result[:, order] = codes
    return result


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "bits"), [(5, 16, 128, 6), (8, 50, 7, 6), (3, 33, 1, 4), (9, 40, 40, 8)]
)
def test_codes_equal_the_straight_line(rows: int, columns: int, block_size: int, bits: int) -> None:
    weight, _, hessian, _ = problem(rows, columns, seed=rows)
    scales = sdclip(weight, bits, sigmas=3.0, floor="none")
    result = gptq(weight, hessian, scales, bits, damp=0.01, block_size=block_size)
    np.testing.assert_array_equal(result.codes.numpy(), straight_line(weight, hessian, scales, bits, 0.01))
    assert result.codes.dtype == torch.int8
    assert result.damping == [0.01]


def test_a_batch_equals_its_matrices() -> None:
    weight, _, hessian, scales = problem(6, 24, batch=(2, 3))
    result = gptq(weight, hessian, scales, 6, block_size=10)
    assert result.codes.shape == (2, 3, 6, 24)
    assert len(result.damping) == 6
    for i in range(2):
        for j in range(3):
            alone = straight_line(weight[i, j], hessian[i, j], scales[i, j], 6, 0.01)
            np.testing.assert_array_equal(result.codes[i, j].numpy(), alone)


def test_float32_differs_from_the_truth_in_few_codes_by_one() -> None:
    weight, _, hessian, scales = problem(64, 128, seed=1)
    codes = gptq(weight.float(), hessian.float(), scales, 6).codes.numpy().astype(int)
    difference = np.abs(codes - straight_line(weight, hessian, scales, 6, 0.01))
    # a column that falls on the other side of a half is rounded otherwise, and later ones of its row make up for it
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("bits", [3, 5, 6, 8])
def test_the_output_error_is_below_that_of_rounding_to_nearest(bits: int) -> None:
    weight, inputs, hessian, _ = problem(48, 64, seed=bits)
    scales = sdclip(weight, bits, sigmas=4.0, floor="none")

    def output_error(codes: Tensor) -> float:
        return ((weight - codes * scales.double()[:, None]) @ inputs.T).square().sum().item()

    ours, nearest = output_error(gptq(weight, hessian, scales, bits).codes), output_error(rtn(weight, scales, bits))
    # with inputs this correlated the error is about halved
    assert ours < 0.75 * nearest


def test_columns_without_input_get_code_zero_and_disturb_nothing() -> None:
    weight, inputs, _, scales = problem(6, 20)
    inputs[:, [3, 11]] = 0
    # a scale at which the ones on the diagonal of such columns count in the damping
    hessian = 1e-3 * inputs.T @ inputs
    codes = gptq(weight, hessian, scales, 6).codes
    assert not codes[:, [3, 11]].any()
    np.testing.assert_array_equal(codes.numpy(), straight_line(weight, hessian, scales, 6, 0.01))
    live = [j for j in range(20) if j not in (3, 11)]
    assert bool((codes[:, live] != 0).any(dim=1).all())


def test_equal_diagonals_keep_their_order() -> None:
    weight, inputs, _, scales = problem(4, 12, seed=5)
    inputs[:, 6:] = inputs[:, :6]
    hessian = inputs.T @ inputs
    codes = gptq(weight, hessian, scales, 6).codes
    np.testing.assert_array_equal(codes.numpy(), straight_line(weight, hessian, scales, 6, 0.01))


def test_a_hessian_that_cannot_be_factorized_is_damped_more_and_then_given_up_and_both_are_reported() -> None:
    weight, _, hessian, scales = problem(4, 8)
    # smallest eigenvalue −0.05 of the mean diagonal: 0.01 fails, ten times as much succeeds
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = 0
    values[0] = -0.05 * values.sum() / 8
    indefinite = vectors @ torch.diag(values) @ vectors.T
    hopeless = -torch.ones(8, 8, dtype=torch.float64)
    hopeless[2, 2] = 0
    stack = torch.stack([hessian, indefinite, hopeless])
    result = gptq(torch.stack([weight] * 3), stack, torch.stack([scales] * 3), 6)
    assert result.damping == [0.01, 0.1, None]
    np.testing.assert_array_equal(result.codes[1].numpy(), straight_line(weight, indefinite, scales, 6, 0.1))
    assert torch.equal(result.codes[2], rtn(weight, scales, 6))
    assert gptq(weight, indefinite, scales, 6, damp=0.0).damping == [0.1]
    assert module.DAMPING_STEPS == (1.0, 10.0, 100.0)


def test_every_backend_of_the_column_loop_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    # three blocks, the last of them short
    weight, _, hessian, scales = problem(70, 300, batch=(2,))
    found = {}
    for backend in dispatch.available_backends("gptq_block"):
        monkeypatch.setenv("GOLF_BACKEND", f"gptq_block={backend}")
        device = "cuda" if backend == "cuda" else "cpu"
        given = (tensor.float().to(device) for tensor in (weight, hessian, scales))
        found[backend] = gptq(*given, 6).codes.cpu()
    # on a GPU the products between the blocks are summed in another order
    reference = found.pop("torch")
    for backend, codes in found.items():
        assert (codes != reference).float().mean() <= (0.01 if backend == "cuda" else 0), backend


def test_the_arguments_are_not_changed() -> None:
    tensors = problem(4, 8)
    copies = [tensor.clone() for tensor in tensors]
    gptq(tensors[0], tensors[2], tensors[3], 6, block_size=3)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_bad_arguments_are_named() -> None:
    weight, _, hessian, scales = problem(4, 8)
    with pytest.raises(ValueError, match=r"needs a Hessian \(8, 8\)"):
        gptq(weight, hessian[:4, :4], scales, 6)
    with pytest.raises(ValueError, match="scales must be positive"):
        gptq(weight, hessian, scales * 0, 6)

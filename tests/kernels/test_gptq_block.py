"""GPTQ's inner loop against the formula in numpy, bit for bit, on every backend that this machine has."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import golf_kernels
from golf_kernels import dispatch, native
from golf_kernels.gptq_block import _DTYPES, MAX_COLUMNS

# more rows than a tile, fewer, and one more or less; a single column, and as many as a block may have
SHAPES = [(1, 1, 1), (2, 7, 5), (1, 33, 64), (3, 16, 63), (1, 40, 65), (2, 128, 200), (1, 3, 0), (0, 4, 4), (1, 0, 6)]


@pytest.fixture(params=dispatch.available_backends("gptq_block"), autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("GOLF_BACKEND", f"gptq_block={request.param}")
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" else "cpu"


def problem(batch, columns, rows, dtype=torch.float32, seed=0):
    """Weights, the factor of a random Hessian's inverse and scales; NaN below the diagonal, where nobody may look."""
    generator = torch.Generator().manual_seed(seed + rows)
    work = torch.randn(batch, columns, rows, generator=generator, dtype=torch.float64) * 0.1
    inputs = torch.randn(batch, columns, 4 * columns + 1, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(inputs @ inputs.mT), upper=True)
    factor = torch.where(torch.ones_like(factor).triu() > 0, factor, float("nan"))
    scales = torch.rand(batch, rows, generator=generator, dtype=torch.float64) * 0.01 + 0.002
    return work.to(dtype), factor.to(dtype), scales.to(dtype)


def oracle(work, factor, scales, limit):
    """The formula, in the dtype of the arguments and in the documented order."""
    work, factor, scales = (tensor.cpu().numpy().copy() for tensor in (work, factor, scales))
    codes, errors = np.zeros(work.shape, np.int8), np.zeros_like(work)
    for b in range(work.shape[0]):
        for j in range(work.shape[1]):
            rounded = np.rint(np.clip(work[b, j] / scales[b], -limit, limit))
            codes[b, j] = rounded
            errors[b, j] = (work[b, j] - rounded * scales[b]) / factor[b, j, j]
            for k in range(j + 1, work.shape[1]):
                work[b, k] = work[b, k] - factor[b, j, k] * errors[b, j]
    return codes, errors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [31, 3])
def test_every_backend_gives_the_formulas_bits(device, shape, dtype, limit):
    given = problem(*shape, dtype)
    codes, errors = golf_kernels.gptq_block(*(tensor.to(device) for tensor in given), limit)
    want_codes, want_errors = oracle(*given, limit)
    assert codes.dtype == torch.int8 and errors.dtype == dtype
    np.testing.assert_array_equal(codes.cpu().numpy(), want_codes)
    np.testing.assert_array_equal(errors.cpu().numpy(), want_errors)
    # there are codes at the limits and codes within them
    assert not codes.numel() > 1000 or ((codes.abs() == limit).any() and (codes.abs() < limit).any())


def test_views_and_their_neighbours(device):
    work, factor, scales = (tensor.to(device) for tensor in problem(2, 12, 9))
    want_codes, want_errors = golf_kernels.gptq_block(work, factor, scales, 31)
    around = torch.full((2, 20, 9), float("nan"), device=device)
    around[:, 4:16] = work
    spread = torch.full((2, 12, 30), float("nan"), device=device)
    spread[:, :, 3:15] = factor
    codes, errors = golf_kernels.gptq_block(around[:, 4:16], spread[:, :, 3:15], scales.T.contiguous().T, 31)
    assert torch.equal(codes, want_codes) and torch.equal(errors, want_errors)
    assert torch.equal(around[:, 4:16], work)


def test_halves_go_to_even_and_what_is_too_large_to_the_limit(device):
    work = torch.tensor([[[0.5, 1.5, -0.5, -2.5, 31.5, 400.0, -400.0]]], device=device)
    codes, errors = golf_kernels.gptq_block(
        work, torch.full((1, 1, 1), 2.0, device=device), torch.ones_like(work[0]), 31
    )
    assert codes.flatten().tolist() == [0, 2, 0, -2, 31, 31, -31]
    assert errors.flatten().tolist() == [0.25, -0.25, -0.25, -0.25, 0.25, 184.5, -184.5]


def test_wrong_arguments_are_named(device):
    work, factor, scales = (tensor.to(device) for tensor in problem(2, 4, 3))
    for arguments, message in (
        ((work.half(), factor, scales, 31), r"all of float32 or all of float64, found torch\.float16"),
        ((work, factor.double(), scales, 31), r"found torch\.float32, torch\.float64"),
        ((work[0], factor, scales, 31), r"work \(batch, columns, rows\).*found \(4, 3\)"),
        ((work, factor[:, :3], scales, 31), r"\(2, 3, 4\)"),
        ((work, factor, scales[:, :2], 31), r"\(2, 2\)"),
        ((work, factor, scales.to("meta"), 31), "devices: expected one"),
        ((work, factor, scales, 0), "limit: expected 1 to 127, found 0"),
        ((work, factor, scales, 128), "limit: expected 1 to 127, found 128"),
    ):
        with pytest.raises(ValueError, match=message):
            golf_kernels.gptq_block(*arguments)


def test_contract_of_the_operator(device):
    given = [tensor.to(device).nan_to_num() for tensor in problem(2, 5, 7)]
    torch.library.opcheck(torch.ops.golf.gptq_block.default, (*given, 31))
    with FakeTensorMode():
        on_gpu = [torch.empty(tensor.shape, device="cuda") for tensor in given]
        codes, errors = golf_kernels.gptq_block(*on_gpu, 31)
    assert (codes.device.type, codes.dtype, errors.dtype) == ("cuda", torch.int8, torch.float32)
    assert codes.shape == errors.shape == (2, 5, 7)


def test_a_block_that_is_too_long_falls_back_with_its_reason(backend, device, monkeypatch, caplog):
    if backend == "torch":
        # it takes blocks of any length
        return
    given = [tensor.to(device) for tensor in problem(1, MAX_COLUMNS + 1, 3)]
    with pytest.raises(dispatch.BackendError, match="it takes blocks of at most 128 columns, found 129"):
        golf_kernels.gptq_block(*given, 31)
    monkeypatch.delenv("GOLF_BACKEND")
    dispatch._logged.clear()
    with caplog.at_level(logging.WARNING, "golf_kernels"):
        codes, _ = golf_kernels.gptq_block(*given, 31)
    assert f"gptq_block: falling back from {backend}: it takes blocks of at most 128 columns" in caplog.text
    np.testing.assert_array_equal(codes.cpu().numpy(), oracle(*given, 31)[0])


def test_the_numbers_of_the_extension_are_those_of_the_python_code(backend):
    if backend == "torch":
        return
    extension = native.extension()
    assert (extension.gptq_max_columns, extension.float32, extension.float64) == (MAX_COLUMNS, *_DTYPES.values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_nan_is_never_converted_to_a_code(tmp_path, backend):
    """The conversion is undefined in C++. The sanitizer ends the process where it happens."""
    if backend != "cpp":
        return
    root, library = Path(__file__).resolve().parents[2], tmp_path / "gptq.so"
    checks = ["-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all", "-static-libubsan"]
    flags = ["-std=c++17", "-fPIC", "-shared", *checks, f"-I{root / 'csrc'}"]
    subprocess.run(["g++", *flags, root / "csrc/gptq.cpp", "-o", library], check=True)
    call = """if True:
        import ctypes, sys
        cells = [ctypes.create_string_buffer(fill * size) for fill, size in
                 ((bytes([0, 0, 192, 127]), 80), (bytes([0, 0, 128, 63]), 4), (bytes([0, 0, 128, 63]), 40), (bytes([7]), 80), (bytes(4), 80))]
        sizes = [ctypes.c_int64(size) for size in (1, 2, 40)]
        print(ctypes.CDLL(sys.argv[1]).golf_gptq_block_cpu(*cells, *sizes, 31, 0), set(cells[3].raw[:80]))
    """
    found = subprocess.run([sys.executable, "-c", call, library], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("0 {0}\n", "")

"""Calls the C++ and CUDA functions of int6 in `golf_kernels._C`. Callers check the inputs and allocate the results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from golf_kernels import native

# codes of GolfDtype in csrc/launchers.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VALUE_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "cuda": tuple(DTYPES)}
WEIGHT_DTYPES = {"cpp": (torch.float32,), "cuda": tuple(DTYPES)}
_NO_BAD_CODE = 2**63 - 1

Native = Literal["cpp", "cuda"]


def supports_codes(backend: Native, *args: Any) -> str | None:
    """Returns the reason why a backend cannot pack and unpack codes, or None if it can."""
    return native.problem(backend)


def supports_dequantize(backend: Native, *args: Any) -> str | None:
    """Returns the reason why a backend cannot run `int6_dequantize`, or None if it can."""
    unavailable = native.problem(backend)
    if unavailable is not None or not args:
        return unavailable
    _, scales, _, dtype = args
    if not scales:
        return None
    return _unsupported("scales", scales[0].dtype, tuple(DTYPES)) or _unsupported(
        "results", dtype, VALUE_DTYPES[backend]
    )


def supports_fake_quantize(backend: Native, *args: Any) -> str | None:
    """Returns the reason why a backend cannot run `int6_fake_quantize`, or None if it can."""
    unavailable = native.problem(backend)
    if unavailable is not None or not args:
        return unavailable
    weight, scales = args
    return _unsupported("weights", weight.dtype, WEIGHT_DTYPES[backend]) or _unsupported(
        "scales", scales.dtype, tuple(DTYPES)
    )


def _unsupported(what: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str | None:
    # for dtypes that are not floating, int6.py raises an error on every backend
    if dtype in dtypes or not dtype.is_floating_point:
        return None
    return f"{what} of {dtype}, which only PyTorch computes"


def pack(codes: Tensor, packed: Tensor) -> int | None:
    """Packs `codes` into `packed`. Returns the flat index of the first code outside -32..31, or None."""
    codes = _laid_out(codes)
    if not codes.is_cuda:
        bad = native.extension().int6_pack_cpu(codes.data_ptr(), packed.data_ptr(), codes.numel())
        return None if bad < 0 else int(bad)
    first_bad = torch.full((), _NO_BAD_CODE, dtype=torch.int64, device=codes.device)
    with _stream(codes) as stream:
        native.extension().int6_pack_cuda(
            codes.data_ptr(), packed.data_ptr(), codes.numel(), first_bad.data_ptr(), stream
        )
    bad = int(first_bad)
    return None if bad == _NO_BAD_CODE else bad


def unpack(packed: Tensor, codes: Tensor) -> None:
    """Unpacks `packed` into `codes`."""
    packed = _laid_out(packed)
    if not packed.is_cuda:
        native.extension().int6_unpack_cpu(packed.data_ptr(), codes.data_ptr(), codes.numel())
        return
    with _stream(packed) as stream:
        native.extension().int6_unpack_cuda(packed.data_ptr(), codes.data_ptr(), codes.numel(), stream)


def dequantize(packed: Sequence[Tensor], scales: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Dequantizes a list of matrices into `values` in one call. All `values` have the same dtype."""
    # the lists keep contiguous copies alive until the launch is queued
    packed = [_laid_out(one) for one in packed]
    scales = [_laid_out(one) for one in scales]
    table = [
        number
        for codes, steps, value in zip(packed, scales, values, strict=True)
        for number in (codes.data_ptr(), steps.data_ptr(), value.data_ptr(), *value.shape)
    ]
    scale_dtype, value_dtype = DTYPES[scales[0].dtype], DTYPES[values[0].dtype]
    if not values[0].is_cuda:
        native.extension().int6_dequantize_cpu(table, scale_dtype, value_dtype)
        return
    with _stream(values[0]) as stream:
        native.extension().int6_dequantize_cuda(table, scale_dtype, value_dtype, stream)


def fake_quantize(weight: Tensor, scales: Tensor, result: Tensor) -> None:
    """Writes the fake-quantized weights to `result`."""
    weight = _laid_out(weight)
    # there are few scales, and float32 holds every 16-bit scale exactly
    steps = _laid_out(scales.to(torch.float32))
    columns = weight.shape[-1]
    sizes = (weight.data_ptr(), steps.data_ptr(), result.data_ptr(), steps.numel(), columns)
    if not weight.is_cuda:
        native.extension().int6_fake_quantize_cpu(*sizes)
        return
    with _stream(weight) as stream:
        native.extension().int6_fake_quantize_cuda(*sizes, DTYPES[weight.dtype], stream)


def _laid_out(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if it is not contiguous or, on CUDA, not aligned to 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


@contextlib.contextmanager
def _stream(tensor: Tensor) -> Iterator[int]:
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream

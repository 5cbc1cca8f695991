"""6-bit codes (`golf::int6_*`): packing, unpacking, dequantization with a scale per row, and fake quantization.

A code is a 6-bit two's-complement number. Packing puts codes one after another, lowest bit first. 4 codes take 3 bytes:

    byte        0                 1                 2
    bit   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code  1 1 0 0 0 0 0 0   2 2 2 2 1 1 1 1   3 3 3 3 3 3 2 2

Code i is in bits [6i, 6i + 6). n codes take ceil(6n / 8) bytes. Unused bits of the last byte are zero. The rows of a
matrix have no padding between them, so a row may start within a byte. The format `w6_e16_clean_per_row_v1` of
submission #122 packs codes in the same way.

PyTorch, C++ and CUDA give the same bits: the product of a code and a scale is rounded to float32 (to float64 if an
operand or the result is float64), then to the dtype of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from golf_kernels import dispatch, int6_native, operators

CODE_MIN, CODE_MAX = -32, 31
FAKE_LIMIT = 31
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def int6_pack(codes: Tensor) -> Tensor:
    """Packs codes into 6 bits each.

    Args:
        codes: int8, any shape, every value in -32..31. They are read in row-major order. On CUDA the check of the
            values waits for the GPU.

    Returns:
        `(ceil(6 n / 8),)` uint8 for n codes.

    Raises:
        ValueError: another dtype, or a code outside -32..31. The message names the first such code and its index.
    """
    packed: Tensor = torch.ops.golf.int6_pack(codes)
    return packed


def int6_unpack(packed: Tensor, count: int) -> Tensor:
    """Unpacks `count` codes: the inverse of `int6_pack`.

    Args:
        packed: `(ceil(6 count / 8),)` uint8.
        count: number of codes, >= 0.

    Returns:
        `(count,)` int8, every value in -32..31.

    Raises:
        ValueError: another dtype, or a length of `packed` that does not fit `count`.
    """
    codes: Tensor = torch.ops.golf.int6_unpack(packed, count)
    return codes


def int6_dequantize(packed: Tensor, scales: Tensor, columns: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Computes the values of a packed matrix: value[r, c] = code[r, c] · scale[r].

    The scales have a gradient: d scale[r] = sum over c of d value[r, c] · code[r, c].

    Args:
        packed: `(ceil(6 rows columns / 8),)` uint8: the packed codes, row after row.
        scales: `(rows,)`, any floating dtype.
        columns: number of columns, >= 0.
        dtype: floating dtype of the result.

    Returns:
        `(rows, columns)` in `dtype`.

    Raises:
        ValueError: a wrong shape, length, dtype or device.
    """
    return int6_dequantize_many([packed], [scales], [columns], dtype=dtype)[0]


def int6_dequantize_many(
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    columns: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Computes the values of many packed matrices. On CUDA, one launch takes up to 80 matrices.

    Args:
        packed: packed codes of each matrix, as in `int6_dequantize`.
        scales: scales `(rows,)` of each matrix, all of the same floating dtype.
        columns: number of columns of each matrix.
        dtype: floating dtype of the results.

    Returns:
        Values `(rows, columns)` of each matrix.

    Raises:
        ValueError: the lists have different lengths; see also `int6_dequantize`.
    """
    if len(packed) == 0 and len(scales) == 0 and len(columns) == 0:
        return []
    values: list[Tensor] = torch.ops.golf.int6_dequantize(list(packed), list(scales), list(columns), dtype)
    return values


def int6_fake_quantize(weight: Tensor, scales: Tensor) -> Tensor:
    """Rounds weights to values that int6 can hold: round(clamp(w / s, -31, 31)) · s. Halves round to even.

    The gradient passes unchanged to `weight` (straight-through). `scales` gets no gradient.

    Args:
        weight: `(..., rows, columns)`, any floating dtype.
        scales: `(..., rows)`, any floating dtype, positive. The sign is not checked, because a check would wait for the
            GPU. A scale of zero turns weights of zero into NaN, and other weights into zero.

    Returns:
        The rounded weights, in the shape and dtype of `weight`.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    result: Tensor = torch.ops.golf.int6_fake_quantize(weight, scales)
    return result


def packed_bytes(count: int) -> int:
    """Bytes of `count` packed codes: ceil(6 count / 8)."""
    return (6 * count + 7) // 8


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int8:
        raise ValueError(f"codes: expected int8, found {codes.dtype}; convert with codes.to(torch.int8)")


def _check_packed(packed: Tensor, count: int, what: str) -> None:
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"packed: expected a uint8 vector, found {packed.dtype} of shape {tuple(packed.shape)}")
    if packed.shape[0] != packed_bytes(count):
        raise ValueError(f"packed: expected length {packed_bytes(count)} for {what}, found {packed.shape[0]}")


def _check_count(packed: Tensor, count: int) -> None:
    if count < 0:
        raise ValueError(f"count: expected a number >= 0, found {count}")
    _check_packed(packed, count, f"count {count}")


def _check_matrices(
    packed: Sequence[Tensor], scales: Sequence[Tensor], columns: Sequence[int], dtype: torch.dtype
) -> None:
    if not len(packed) == len(scales) == len(columns):
        raise ValueError(
            f"packed, scales, columns: expected lists of one length, found {len(packed)}, {len(scales)} and {len(columns)}"
        )
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, FLOATS))}, found {dtype}")
    for codes, steps, width in zip(packed, scales, columns, strict=True):
        if steps.ndim != 1 or steps.dtype not in FLOATS:
            raise ValueError(f"scales: expected a floating vector, found {steps.dtype} of shape {tuple(steps.shape)}")
        if width < 0:
            raise ValueError(f"columns: expected a number >= 0, found {width}")
        _check_packed(codes, steps.shape[0] * width, f"{steps.shape[0]} x {width} codes")
        if not (codes.device == steps.device == scales[0].device and steps.dtype == scales[0].dtype):
            raise ValueError(
                f"packed and scales: expected one device and one dtype of scales, found packed on {codes.device} and "
                f"{steps.dtype} scales on {steps.device} beside {scales[0].dtype} on {scales[0].device}"
            )


def _check_weight(weight: Tensor, scales: Tensor) -> None:
    if weight.dtype not in FLOATS or scales.dtype not in FLOATS:
        raise ValueError(f"weight and scales: expected floating dtypes, found {weight.dtype} and {scales.dtype}")
    if weight.ndim < 2 or scales.shape != weight.shape[:-1]:
        raise ValueError(
            "expected weight (..., rows, columns) and scales (..., rows), found "
            f"weight {tuple(weight.shape)} and scales {tuple(scales.shape)}"
        )
    if weight.device != scales.device:
        raise ValueError(f"devices: expected one, found {weight.device} (weight) and {scales.device} (scales)")


def _refuse_code(codes: Tensor, place: int) -> None:
    raise ValueError(
        f"codes: expected {CODE_MIN}..{CODE_MAX}, found {int(codes.reshape(-1)[place])} at flat index {place} "
        f"of shape {tuple(codes.shape)}"
    )


def _compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _pack(codes: Tensor) -> Tensor:
    _check_codes(codes)
    flat = codes.reshape(-1)
    wrong = (flat < CODE_MIN) | (flat > CODE_MAX)
    if bool(wrong.any()):
        _refuse_code(codes, int(wrong.nonzero()[0]))
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).reshape(-1, 4).to(torch.int32) & 63
    shifts = torch.arange(0, 24, 6, dtype=torch.int32, device=codes.device)
    words = (groups << shifts).sum(1, dtype=torch.int32, keepdim=True)
    octets = (words >> torch.arange(0, 24, 8, dtype=torch.int32, device=codes.device)) & 255
    return octets.to(torch.uint8).reshape(-1)[: packed_bytes(flat.numel())].contiguous()


def _unpack(packed: Tensor, count: int) -> Tensor:
    _check_count(packed, count)
    octets = torch.nn.functional.pad(packed, (0, -packed.numel() % 3)).reshape(-1, 3).to(torch.int32)
    shifts = torch.arange(0, 24, 8, dtype=torch.int32, device=packed.device)
    words = (octets << shifts).sum(1, dtype=torch.int32, keepdim=True)
    codes = (words >> torch.arange(0, 24, 6, dtype=torch.int32, device=packed.device)) & 63
    return ((codes ^ 32) - 32).to(torch.int8).reshape(-1)[:count].contiguous()


def _dequantize(
    packed: Sequence[Tensor], scales: Sequence[Tensor], columns: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    _check_matrices(packed, scales, columns, dtype)
    compute = _compute_dtype(scales[0].dtype, dtype)
    values = []
    for one, steps, width in zip(packed, scales, columns, strict=True):
        codes = _unpack(one, steps.shape[0] * width).reshape(steps.shape[0], width)
        values.append((codes.to(compute) * steps.to(compute).unsqueeze(1)).to(dtype))
    return values


def _fake_quantize(weight: Tensor, scales: Tensor) -> Tensor:
    _check_weight(weight, scales)
    compute = _compute_dtype(weight.dtype, scales.dtype)
    steps = scales.to(compute).unsqueeze(-1)
    rounded = (weight.to(compute) / steps).clamp(-FAKE_LIMIT, FAKE_LIMIT).round()
    return (rounded * steps).to(weight.dtype).contiguous()


def _allocate_packed(codes: Tensor) -> Tensor:
    _check_codes(codes)
    return codes.new_empty(packed_bytes(codes.numel()), dtype=torch.uint8)


def _allocate_codes(packed: Tensor, count: int) -> Tensor:
    _check_count(packed, count)
    return packed.new_empty(count, dtype=torch.int8)


def _allocate_values(
    packed: Sequence[Tensor], scales: Sequence[Tensor], columns: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    _check_matrices(packed, scales, columns, dtype)
    return [s.new_empty((s.shape[0], width), dtype=dtype) for s, width in zip(scales, columns, strict=True)]


def _allocate_like_weight(weight: Tensor, scales: Tensor) -> Tensor:
    _check_weight(weight, scales)
    return weight.new_empty(weight.shape)


def _pack_native(codes: Tensor) -> Tensor:
    packed = _allocate_packed(codes)
    bad = int6_native.pack(codes, packed)
    if bad is not None:
        _refuse_code(codes, bad)
    return packed


def _unpack_native(packed: Tensor, count: int) -> Tensor:
    codes = _allocate_codes(packed, count)
    int6_native.unpack(packed, codes)
    return codes


def _dequantize_native(
    packed: Sequence[Tensor], scales: Sequence[Tensor], columns: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    values = _allocate_values(packed, scales, columns, dtype)
    int6_native.dequantize(packed, scales, values)
    return values


def _fake_quantize_native(weight: Tensor, scales: Tensor) -> Tensor:
    result = _allocate_like_weight(weight, scales)
    int6_native.fake_quantize(weight, scales, result)
    return result


def _save_for_scales(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.packed, ctx.scale_dtype, ctx.columns = inputs[0], inputs[1][0].dtype, inputs[2]


def _backward_to_scales(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    to_scales: list[Tensor | None] = []
    for gradient, packed, width in zip(gradients, ctx.packed, ctx.columns, strict=True):
        if gradient is None:
            to_scales.append(None)
            continue
        codes = int6_unpack(packed, gradient.shape[0] * width).reshape(gradient.shape)
        products = gradient.to(_compute_dtype(gradient.dtype)) * codes
        to_scales.append(products.sum(1).to(ctx.scale_dtype))
    return [None] * len(to_scales), to_scales, None, None


def _backward_straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


_MATRICES = "(Tensor[] packed, Tensor[] scales, SymInt[] columns, ScalarType dtype) -> Tensor[]"
for _op, _schema, _reference, _allocate, _native, _supports in (
    ("int6_pack", "(Tensor codes) -> Tensor", _pack, _allocate_packed, _pack_native, int6_native.supports_codes),
    (
        "int6_unpack",
        "(Tensor packed, SymInt count) -> Tensor",
        _unpack,
        _allocate_codes,
        _unpack_native,
        int6_native.supports_codes,
    ),
    ("int6_dequantize", _MATRICES, _dequantize, _allocate_values, _dequantize_native, int6_native.supports_dequantize),
    (
        "int6_fake_quantize",
        "(Tensor weight, Tensor scales) -> Tensor",
        _fake_quantize,
        _allocate_like_weight,
        _fake_quantize_native,
        int6_native.supports_fake_quantize,
    ),
):
    dispatch.define(_op, _schema, reference=_reference, fake=_allocate)
    dispatch.register(_op, "cpp", _native, supports=functools.partial(_supports, "cpp"))
    dispatch.register(_op, "cuda", _native, supports=functools.partial(_supports, "cuda"))

torch.library.register_autograd(
    "golf::int6_dequantize", _backward_to_scales, setup_context=_save_for_scales, lib=dispatch.LIBRARY
)
torch.library.register_autograd("golf::int6_fake_quantize", _backward_straight_through, lib=dispatch.LIBRARY)


def _round_trip(codes: Tensor, scales: Tensor) -> list[Tensor]:
    """Calls every int6 operator once."""
    packed = int6_pack(codes)
    values = int6_dequantize(packed, scales, codes.shape[1], dtype=scales.dtype)
    return [int6_unpack(packed, codes.numel()), values, int6_fake_quantize(values, scales)]


def _inputs(make: operators.Make, rows: int = 5, columns: int = 67) -> operators.Inputs:
    scales = make(rows, dtype=torch.float32).abs() + 0.5
    codes = torch.arange(rows * columns, device=scales.device) % (2 * FAKE_LIMIT + 1) - FAKE_LIMIT
    return {"codes": codes.to(torch.int8).reshape(rows, columns), "scales": scales}


operators.declare(
    operators.Operator(
        "int6",
        _round_trip,
        _inputs,
        members=("int6_pack", "int6_unpack", "int6_dequantize", "int6_fake_quantize"),
        called_by="artifact",
        gpu_dtype=torch.float32,
    )
)

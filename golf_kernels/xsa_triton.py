"""Triton kernels of exclusive self-attention. Each kernel reads attention's output and the values once.

    xsa            y = o − ⟨o, v̂⟩ v̂
    xsa_backward   do, and dv summed over the query heads that share a value

A program loads a block of value vectors into registers, then takes the query heads that share them one after another.
It sums the gradients of its values in registers, always in the same order.
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4


@triton.jit
def _indices_and_mask(rows, length, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    # a row is a position and a value head; tiles are (row, dimension)
    PADDED: tl.constexpr = triton.next_power_of_2(DIM)
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    dim = tl.arange(0, PADDED)[None, :]
    position = row // KV_HEADS
    inside = (row < rows) & (dim < DIM)
    return row.to(tl.int64), (position // length).to(tl.int64), (position % length).to(tl.int64), dim, inside


@triton.jit
def _load(address, offset, inside):
    return tl.load(address + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(address, offset, x, inside):
    tl.store(address + offset, x.to(address.dtype.element_ty), mask=inside)


@triton.jit
def _length(value):
    return tl.sqrt(tl.sum(value * value, axis=1))[:, None]


@triton.jit
def _along(x, direction):
    return tl.sum(x * direction, axis=1)[:, None]


@triton.jit
def xsa_kernel(
    output_ptr,
    value_ptr,
    y_ptr,
    rows,
    length,
    eps,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    output_stride_d,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    value_stride_d,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes y for BLOCK value vectors and all query heads that share them."""
    row, batch, time, dim, inside = _indices_and_mask(rows, length, KV_HEADS, DIM, BLOCK)
    kv_head = row % KV_HEADS
    value_at = batch * value_stride_b + time * value_stride_t + kv_head * value_stride_h + dim * value_stride_d
    value = _load(value_ptr, value_at, inside)
    direction = value * (1.0 / tl.maximum(_length(value), eps))
    output_at = batch * output_stride_b + time * output_stride_t + dim * output_stride_d
    for member in tl.static_range(GROUP):
        output = _load(output_ptr, output_at + (kv_head * GROUP + member) * output_stride_h, inside)
        y = output - _along(output, direction) * direction
        _store(y_ptr, (row * GROUP + member) * DIM + dim, y, inside)


@triton.jit
def xsa_backward_kernel(
    dy_ptr,
    output_ptr,
    value_ptr,
    doutput_ptr,
    dvalue_ptr,
    rows,
    length,
    eps,
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    dy_stride_d,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    output_stride_d,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    value_stride_d,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes dv of BLOCK value vectors, and do for all query heads that share them."""
    row, batch, time, dim, inside = _indices_and_mask(rows, length, KV_HEADS, DIM, BLOCK)
    kv_head = row % KV_HEADS
    value_at = batch * value_stride_b + time * value_stride_t + kv_head * value_stride_h + dim * value_stride_d
    value = _load(value_ptr, value_at, inside)
    norm = _length(value)
    inverse = 1.0 / tl.maximum(norm, eps)
    direction = value * inverse
    output_at = batch * output_stride_b + time * output_stride_t + dim * output_stride_d
    dy_at = batch * dy_stride_b + time * dy_stride_t + dim * dy_stride_d
    through_direction = tl.zeros_like(value)
    products = tl.zeros_like(norm)
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        dy = _load(dy_ptr, dy_at + head * dy_stride_h, inside)
        output = _load(output_ptr, output_at + head * output_stride_h, inside)
        s = _along(output, direction)
        t = _along(dy, direction)
        _store(doutput_ptr, (row * GROUP + member) * DIM + dim, dy - t * direction, inside)
        through_direction += s * dy + t * output
        products += s * t
    # a norm below eps is replaced by the constant eps, which has no gradient
    through_length = tl.where(norm < eps, 0.0, 2.0 * products)
    _store(dvalue_ptr, row * DIM + dim, inverse * (through_length * direction - through_direction), inside)


def forward(output: Tensor, value: Tensor, eps: float) -> Tensor:
    """Implements `golf::xsa`: returns y.

    Args:
        output: `(B, T, H, D)`, bfloat16, float16 or float32, with any strides.
        value: `(B, T, H_kv, D)` in the dtype of output, with any strides.
        eps: smallest norm by which a value is divided.
    """
    y = output.new_empty(output.shape)
    if y.numel():
        sizes, rows = _sizes(output, value), value.numel() // value.shape[3]
        with torch.cuda.device_of(output):
            xsa_kernel[(triton.cdiv(rows, sizes["BLOCK"]),)](
                output, value, y, rows, output.shape[1], eps, *output.stride(), *value.stride(), **sizes, num_warps=NUM_WARPS
            )  # fmt: skip
    return y


def backward(dy: Tensor, output: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Implements `golf::xsa_backward`: returns do and dv, both contiguous. dy may have any strides."""
    doutput, dvalue = output.new_empty(output.shape), value.new_empty(value.shape)
    if dvalue.numel():
        sizes, rows = _sizes(output, value), value.numel() // value.shape[3]
        with torch.cuda.device_of(output):
            xsa_backward_kernel[(triton.cdiv(rows, sizes["BLOCK"]),)](
                dy, output, value, doutput, dvalue, rows, output.shape[1], eps,
                *dy.stride(), *output.stride(), *value.stride(), **sizes, num_warps=NUM_WARPS,
            )  # fmt: skip
    return doutput, dvalue


def _sizes(output: Tensor, value: Tensor) -> dict[str, int]:
    kv_heads, dim = value.shape[2:]
    return {"KV_HEADS": kv_heads, "GROUP": output.shape[2] // kv_heads, "DIM": dim, "BLOCK": choose_block(dim)}


def choose_block(dim: int) -> int:
    """Returns the value vectors per program, so that a thread has 16 elements of a tensor, padding included."""
    return int(max(1, 512 * NUM_WARPS // triton.next_power_of_2(dim)))

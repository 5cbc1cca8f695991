"""Triton kernels of XSA and the linear layer behind it for Hopper: what XSA makes of attention's output never reaches memory
on the way forward, and the gradient of it never on the way back.

    forward   y = z · wᵀ; each step of the sum over a head takes o and v, and z from them on its way into the product
    backward  dz = dy · w of the heads that share a value, then in its epilogue do, dv and z; dw = dyᵀ · z by cuBLAS

A tile is a stretch of positions of one sequence, and everything moves with TMA. The forward kernel keeps z in registers,
where the tensor cores read it while the next head's is made, and so works out the direction anew for every head and every
tile of its columns. The backward kernel is persistent.
"""

# triton gives the arguments of a kernel their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(desc, batch, time, head, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    return tl.reshape(desc.load([batch, time, head, 0]), (BLOCK_M, DIM)).to(tl.float32)


@triton.jit
def _store(desc, batch, time, column, x, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    desc.store([batch, time, column], tl.reshape(x.to(desc.dtype), (1, BLOCK_M, WIDTH)))


@triton.jit
def _along(x, direction):
    return tl.sum(x * direction, axis=1)[:, None]


@triton.jit
def _prefetch(pointer, batch, time, head, length, stride_b, stride_t, stride_h,
              BLOCK_M: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    # an epilogue waits for its loads on the spot, so what it reads is brought to L2, a line of 128 bytes at a time
    if not INTERPRETED:
        LINES: tl.constexpr = (DIM + 63) // 64
        row = tl.minimum(time + tl.arange(0, BLOCK_M), length - 1).to(tl.int64) * stride_t
        line = tl.arange(0, HEADS * LINES)
        column = (head + line // LINES).to(tl.int64) * stride_h + line % LINES * 64
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointer + batch.to(tl.int64) * stride_b + row[:, None] + column[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def xsa_linear_kernel(
    output_desc,
    value_desc,
    weight_desc,
    y_desc,
    length,
    columns,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y of BLOCK_M positions of a sequence and BLOCK_N columns, from weight `(columns, HEADS · DIM)`."""
    # tiles of the same positions follow each other: those are then read from memory once
    across = tl.cdiv(columns, BLOCK_N)
    stretch, n = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK_N
    stretches = tl.cdiv(length, BLOCK_M)
    batch, time = stretch // stretches, stretch % stretches * BLOCK_M
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(HEADS):
        value = _load(value_desc, batch, time, head // GROUP, BLOCK_M, DIM)
        output = _load(output_desc, batch, time, head, BLOCK_M, DIM)
        direction = value * (1.0 / tl.maximum(tl.sqrt(_along(value, value)), eps))
        z = output - _along(output, direction) * direction
        product = tl.dot(z.to(weight_desc.dtype), weight_desc.load([n, head * DIM]).T, product)
    # in halves, so that what is stored takes half the shared memory
    HALF: tl.constexpr = BLOCK_N // 2
    halves = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    for half in tl.static_range(2):
        _store(y_desc, batch, time, n + half * HALF, halves[half], BLOCK_M, HALF)


@triton.jit
def xsa_linear_backward_kernel(
    dy_desc,
    weight_desc,
    output_desc,
    value_desc,
    doutput_desc,
    dvalue_desc,
    z_desc,
    output_ptr,
    value_ptr,
    batches,
    length,
    columns,
    eps,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """do and z of the heads that share a value, and dv of it, for BLOCK_M positions of a sequence."""
    WIDTH: tl.constexpr = GROUP * DIM
    tl.assume(columns > 0)
    # so many steps before the last that memory answers in time, and so few that L2 has not forgotten the answer
    late = tl.maximum(tl.cdiv(columns, BLOCK_K) - 8, 0) * BLOCK_K
    stretches = tl.cdiv(length, BLOCK_M)
    for tile in tl.range(tl.program_id(0), batches * stretches * KV_HEADS, tl.num_programs(0), flatten=True):
        kv_head, stretch = tile % KV_HEADS, tile // KV_HEADS
        batch, time = stretch // stretches, stretch % stretches * BLOCK_M
        product = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for k in range(0, columns, BLOCK_K):
            if k == late:
                _prefetch(output_ptr, batch, time, kv_head * GROUP, length,
                          output_stride_b, output_stride_t, output_stride_h, BLOCK_M, GROUP, DIM)  # fmt: skip
                _prefetch(value_ptr, batch, time, kv_head, length,
                          value_stride_b, value_stride_t, value_stride_h, BLOCK_M, 1, DIM)  # fmt: skip
            dy = tl.reshape(dy_desc.load([batch, time, k]), (BLOCK_M, BLOCK_K))
            product = tl.dot(dy, weight_desc.load([k, kv_head * WIDTH]), product)
        product = tl.reshape(product, (BLOCK_M, GROUP, DIM))
        value = _load(value_desc, batch, time, kv_head, BLOCK_M, DIM)
        norm = tl.sqrt(_along(value, value))
        inverse = 1.0 / tl.maximum(norm, eps)
        direction = value * inverse
        shares = tl.zeros_like(value)
        products = tl.zeros_like(norm)
        for member in tl.static_range(GROUP):
            head = kv_head * GROUP + member
            dz = tl.sum(tl.where(tl.arange(0, GROUP)[None, :, None] == member, product, 0.0), axis=1)
            output = _load(output_desc, batch, time, head, BLOCK_M, DIM)
            s = _along(output, direction)
            t = _along(dz, direction)
            _store(z_desc, batch, time, head * DIM, output - s * direction, BLOCK_M, DIM)
            _store(doutput_desc, batch, time, head * DIM, dz - t * direction, BLOCK_M, DIM)
            shares += s * dz + t * output
            products += s * t
        # below eps the length is a constant, so nothing passes through it
        through_length = tl.where(norm < eps, 0.0, 2.0 * products)
        dvalue = inverse * (through_length * direction - shares)
        _store(dvalue_desc, batch, time, kv_head * DIM, dvalue, BLOCK_M, DIM)


class Tile(NamedTuple):
    """One configuration of a product: positions, columns of the result or of each step, warps and stages of its loads."""

    m: int
    columns: int
    warps: int
    stages: int


def forward(output: Tensor, value: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`golf::xsa_linear`.

    Args:
        output: `(B, T, H, D)`, bfloat16 or float16; copied where its rows are not whole or do not begin at 16 bytes.
        value: `(B, T, H_kv, D)`, likewise.
        weight: `(N, H · D)`, N a multiple of 8.
        eps: length below which a value counts as that long.
    """
    (batches, length, heads, dim), columns = output.shape, weight.shape[0]
    y = output.new_empty((batches, length, columns))
    if not (y.numel() and heads):
        return y.zero_()
    tile = choose_tile("forward", dim)
    output, value, weight = map(_laid_out, (output, value, weight))
    block = [1, tile.m, 1, dim]
    programs = batches * triton.cdiv(length, tile.m) * triton.cdiv(columns, tile.columns)
    with torch.cuda.device_of(output):
        xsa_linear_kernel[(programs,)](
            TensorDescriptor.from_tensor(output, block),
            TensorDescriptor.from_tensor(value, block),
            TensorDescriptor.from_tensor(weight, [tile.columns, dim]),
            TensorDescriptor.from_tensor(y, [1, tile.m, tile.columns // 2]),
            length, columns, eps,
            HEADS=heads, GROUP=heads // value.shape[2], DIM=dim, BLOCK_M=tile.m, BLOCK_N=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def backward(dy: Tensor, output: Tensor, value: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`golf::xsa_linear_backward`: do, dv and dw; dy of any strides."""
    (batches, length, heads, dim), kv_heads = output.shape, value.shape[2]
    columns, width = weight.shape
    doutput, dvalue = output.new_empty(output.shape), value.new_empty(value.shape)
    if not (output.numel() and columns):
        return doutput.zero_(), dvalue.zero_(), weight.new_zeros(weight.shape)
    z = output.new_empty((batches, length, width))
    tile = choose_tile("backward", dim)
    dy, output, value, weight = map(_laid_out, (dy, output, value, weight))
    block, row = [1, tile.m, 1, dim], [1, tile.m, dim]
    # the interpreter has no processors: one makes a program go on to further tiles
    processors = torch.cuda.get_device_properties(dy.device).multi_processor_count if dy.is_cuda else 1
    programs = min(batches * triton.cdiv(length, tile.m) * kv_heads, processors)
    with torch.cuda.device_of(output):
        xsa_linear_backward_kernel[(programs,)](
            TensorDescriptor.from_tensor(dy, [1, tile.m, tile.columns]),
            TensorDescriptor.from_tensor(weight, [tile.columns, width // kv_heads]),
            TensorDescriptor.from_tensor(output, block),
            TensorDescriptor.from_tensor(value, block),
            TensorDescriptor.from_tensor(doutput.flatten(2), row),
            TensorDescriptor.from_tensor(dvalue.flatten(2), row),
            TensorDescriptor.from_tensor(z, row),
            output, value, batches, length, columns, eps, *output.stride()[:3], *value.stride()[:3],
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, BLOCK_M=tile.m, BLOCK_K=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return doutput, dvalue, dy.flatten(0, 1).T @ z.flatten(0, 1)


# of the tiles that leave a thread its registers and the loads their shared memory, the one that reads least per product
TILES = {
    "forward": {"wide": Tile(128, 256, 8, 3), "narrow": Tile(128, 128, 8, 2)},
    "backward": {"wide": Tile(128, 64, 8, 3), "narrow": Tile(64, 64, 8, 3)},
}


def choose_tile(way: str, dim: int) -> Tile:
    """The wide tile, or the narrow one for heads of more than 64 dimensions."""
    return TILES[way]["narrow" if dim > 64 else "wide"]


def _laid_out(tensor: Tensor) -> Tensor:
    """With rows that TMA takes: whole ones, each beginning at a multiple of 16 bytes."""
    size = tensor.element_size()
    steps = all(stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    if tensor.stride(-1) == 1 and steps and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

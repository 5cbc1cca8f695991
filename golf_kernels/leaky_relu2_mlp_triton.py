"""Triton kernels of the LeakyReLU² MLP for GPUs with TMA: four matrix products, whose epilogues compute the rest.

    up    post = leaky_relu(r ⊙ (x · w_upᵀ))², and one sign bit per element     (r = gain · rstd, one number per row)
    down  y = post · w_downᵀ + residual
    dpre  dpre = r ⊙ (dy · w_down) ⊙ post', and ⟨post, dpost⟩ of each row within each tile
    dx    dx = dpre · w_up − x · (2 · rstd² / d) · ⟨post, dpost⟩ + dy            (dy only if x is also the residual)

The formulas are derived in leaky_relu2_mlp.py; dpre here includes the factor r. Each kernel is persistent and moves
tiles with TMA. An epilogue stores a tile in two halves, so that the result needs half the shared memory. cuBLAS
computes the products without an epilogue: both weight gradients, and the down product if there is no residual. The
down kernel adds the residual, because torch's addmm would copy the residual first.
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def inverse_rms_kernel(x_ptr, rstd_ptr, rows, width, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Computes rstd = 1 / √(mean(x²) + eps) of BLOCK_M rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, width, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    tl.store(rstd_ptr + row, tl.rsqrt(total / width + eps), mask=row < rows)


@triton.jit
def _origin(tile, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # tiles with the same rows are consecutive, so that these rows are read from memory once
    across = tl.cdiv(columns, BLOCK_N)
    return tile // across * BLOCK_M, tile % across * BLOCK_N


@triton.jit
def _late(depth, BLOCK_K: tl.constexpr):
    # prefetch 8 steps before the last: early enough for the data to arrive, late enough for L2 to keep it
    return tl.maximum(tl.cdiv(depth, BLOCK_K) - 8, 0) * BLOCK_K


@triton.jit
def _prefetch(pointer, m, n, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # prefetches an epilogue's inputs into L2, a line of 128 bytes at a time, because the epilogue waits for its loads
    if not INTERPRETED:
        row = tl.minimum(m + tl.arange(0, BLOCK_M), rows - 1)
        column = tl.minimum(n + 64 * tl.arange(0, (BLOCK_N + 63) // 64), columns - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointer + row.to(tl.int64)[:, None] * columns + column[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def up_kernel(
    x_desc,
    w_up_desc,
    post_desc,
    rstd_ptr,
    sign_ptr,
    rows,
    hidden,
    width,
    gain,
    slope,
    NORM: tl.constexpr,
    LEAKY: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes post and sign from x `(rows, width)` and w_up `(hidden, width)`.

    A 32-bit word of sign holds the bits of 32 elements, the first in the lowest bit.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tl.assume(width > 0)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(hidden, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _origin(tile, hidden, BLOCK_M, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            product = tl.dot(x_desc.load([m, k]), w_up_desc.load([n, k]).T, product)
        row = m + tl.arange(0, BLOCK_M)
        factor = tl.full((BLOCK_M,), gain, tl.float32)
        if NORM:
            factor *= tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        halves = _halves(product, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            column = n + half * HALF
            pre = halves[half] * factor[:, None]
            # slope 0 has its own branch, because 0 · ∞ is NaN; the maximum must propagate a NaN of `pre`
            if LEAKY:
                activated = tl.maximum(pre, slope * pre, propagate_nan=tl.PropagateNan.ALL)
            else:
                activated = tl.maximum(pre, 0.0, propagate_nan=tl.PropagateNan.ALL)
            post_desc.store([m, column], (activated * activated).to(post_desc.dtype))
            if SIGN:
                word = column // 32 + tl.arange(0, HALF // 32)
                inside = (row < rows)[:, None] & (word < hidden // 32)[None, :]
                address = sign_ptr + row.to(tl.int64)[:, None] * (hidden // 32) + word[None, :]
                positive = tl.reshape(pre > 0, (BLOCK_M, HALF // 32, 32))
                bits = tl.where(positive, (1 << tl.arange(0, 32))[None, None, :], 0)
                tl.store(address, tl.sum(bits, axis=2), mask=inside)


@triton.jit
def down_kernel(
    post_desc,
    w_down_desc,
    residual_desc,
    y_desc,
    residual_ptr,
    rows,
    hidden,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes `y` from `post` `(rows, hidden)`, w_down `(width, hidden)` and the residual."""
    HALF: tl.constexpr = BLOCK_N // 2
    tl.assume(hidden > 0)
    late = _late(hidden, BLOCK_K)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _origin(tile, width, BLOCK_M, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, hidden, BLOCK_K):
            if k == late:
                _prefetch(residual_ptr, m, n, rows, width, BLOCK_M, BLOCK_N)
            product = tl.dot(post_desc.load([m, k]), w_down_desc.load([n, k]).T, product)
        halves = _halves(product, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            column = n + half * HALF
            y = halves[half] + residual_desc.load([m, column]).to(tl.float32)
            y_desc.store([m, column], y.to(y_desc.dtype))


@triton.jit
def dpre_kernel(
    dy_desc,
    w_down_desc,
    post_desc,
    dpre_desc,
    post_ptr,
    rstd_ptr,
    sign_ptr,
    euler_ptr,
    rows,
    hidden,
    width,
    gain,
    slope,
    NORM: tl.constexpr,
    LEAKY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes dpre from dy `(rows, width)` and w_down `(width, hidden)`.

    Also stores ⟨post, dpost⟩ of each row within the tile in `euler`.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tl.assume(width > 0)
    late = _late(width, BLOCK_K)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(hidden, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _origin(tile, hidden, BLOCK_M, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            if k == late:
                _prefetch(post_ptr, m, n, rows, hidden, BLOCK_M, BLOCK_N)
                if LEAKY:
                    _prefetch(sign_ptr, m, n // 32, rows, hidden // 32, BLOCK_M, BLOCK_N // 32)
            product = tl.dot(dy_desc.load([m, k]), w_down_desc.load([k, n]), product)
        row = m + tl.arange(0, BLOCK_M)
        positive = tl.full((BLOCK_M,), 2.0 * gain, tl.float32)
        if NORM:
            positive *= tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        negative = -slope * positive
        euler = tl.zeros((BLOCK_M,), tl.float32)
        halves = _halves(product, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            column = n + half * HALF
            dpost = halves[half]
            post = post_desc.load([m, column]).to(tl.float32)
            if NORM:
                euler += tl.sum(post * dpost, axis=1)
            factor = positive[:, None]
            if LEAKY:
                word = column // 32 + tl.arange(0, HALF // 32)
                inside = (row < rows)[:, None] & (word < hidden // 32)[None, :]
                address = sign_ptr + row.to(tl.int64)[:, None] * (hidden // 32) + word[None, :]
                words = tl.load(address, mask=inside, other=0)
                bits = words[:, :, None] & (1 << tl.arange(0, 32))[None, None, :]
                factor = tl.where(tl.reshape(bits, (BLOCK_M, HALF)) != 0, factor, negative[:, None])
            dpre_desc.store([m, column], (factor * (tl.sqrt(post) * dpost)).to(dpre_desc.dtype))
        if NORM:
            tl.store(euler_ptr + n // BLOCK_N * rows + row, euler, mask=row < rows)


@triton.jit
def dx_kernel(
    dpre_desc,
    w_up_desc,
    x_desc,
    dy_desc,
    dx_desc,
    x_ptr,
    dy_ptr,
    rstd_ptr,
    euler_ptr,
    rows,
    hidden,
    width,
    parts,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes dx from dpre `(rows, hidden)` and w_up `(hidden, width)`.

    `euler` `(parts, rows)` has the partial sums of ⟨post, dpost⟩ per row. PARTS is `parts` rounded up to a power of 2.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tl.assume(hidden > 0)
    late = _late(hidden, BLOCK_K)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _origin(tile, width, BLOCK_M, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, hidden, BLOCK_K):
            if k == late:
                if NORM:
                    _prefetch(x_ptr, m, n, rows, width, BLOCK_M, BLOCK_N)
                if ADD:
                    _prefetch(dy_ptr, m, n, rows, width, BLOCK_M, BLOCK_N)
            product = tl.dot(dpre_desc.load([m, k]), w_up_desc.load([k, n]), product)
        row = m + tl.arange(0, BLOCK_M)
        factor = tl.zeros((BLOCK_M,), tl.float32)
        if NORM:
            part = tl.arange(0, PARTS)
            inside = (part < parts)[:, None] & (row < rows)[None, :]
            factor = tl.sum(tl.load(euler_ptr + part[:, None] * rows + row[None, :], mask=inside, other=0.0), axis=0)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            factor *= rstd * rstd * (2.0 / width)
        halves = _halves(product, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            column = n + half * HALF
            dx = halves[half]
            if ADD:
                dx += dy_desc.load([m, column]).to(tl.float32)
            if NORM:
                dx -= x_desc.load([m, column]).to(tl.float32) * factor[:, None]
            dx_desc.store([m, column], dx.to(dx_desc.dtype))


class Tile(NamedTuple):
    """Block sizes m, n and k of a matrix product, warps per program, pipeline stages, and programs per SM."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int


# wide tiles read the fewest bytes; narrow tiles let two programs share an SM: one multiplies, one runs its epilogue
TILES = {
    "up": {"wide": Tile(128, 256, 64, 8, 4, 1), "narrow": Tile(128, 128, 64, 4, 2, 2)},
    "down": {"wide": Tile(128, 256, 64, 8, 3, 1), "narrow": Tile(128, 128, 64, 4, 2, 2)},
    "dpre": {"wide": Tile(128, 256, 64, 8, 3, 1), "narrow": Tile(128, 128, 64, 4, 2, 2)},
    "dx": {"wide": Tile(128, 256, 64, 8, 3, 1), "narrow": Tile(128, 128, 64, 4, 2, 2)},
}
# a GPU of compute capability 12 has 99 KB of shared memory per block; the others with TMA have 227 KB
SMALL_TILE = Tile(128, 128, 64, 4, 2, 1)
INVERSE_RMS = {"BLOCK_M": 16, "BLOCK_K": 128}
# most partial sums per row that the dx kernel adds without spilling registers
MAX_PARTS = 16
KERNELS = {"up": up_kernel, "down": down_kernel, "dpre": dpre_kernel, "dx": dx_kernel}


def forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    slope: float,
    norm_eps: float | None,
    gain: float,
    add_x: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements `golf::leaky_relu2_mlp`: returns y, post, sign and rstd.

    Args:
        x: `(rows, d)`, bfloat16 or float16; d is a multiple of 8.
        w_up, w_down: `(hidden, d)` and `(d, hidden)`; hidden is a multiple of 64.
        residual, scale: `(rows, d)` and `(d,)`, or None.
        slope: slope of leaky_relu for negative numbers, in [0, 1).
        norm_eps: epsilon of the norm; None: no norm.
        gain: factor on the norm's output.
        add_x: whether x is the residual.
        save: whether to return post, sign and rstd for `backward`. If False, they are empty tensors.
    """
    rows, hidden = x.shape[0], w_up.shape[0]
    x, w_up = _laid_out(x), _laid_out(w_up)
    norm, signed = norm_eps is not None, save and slope > 0
    rstd = x.new_empty((rows if norm else 0,), dtype=torch.float32)
    sign = x.new_empty((rows, hidden // 8) if signed else (0, 0), dtype=torch.uint8)
    post = x.new_empty((rows, hidden))
    if rows:
        with torch.cuda.device_of(x):
            if norm:
                grid = (triton.cdiv(rows, INVERSE_RMS["BLOCK_M"]),)
                inverse_rms_kernel[grid](x, rstd, rows, x.shape[1], norm_eps, **INVERSE_RMS)
            pointers = (rstd, _words(sign))
            numbers = (rows, hidden, x.shape[1], gain, slope)
            _launch("up", (x, w_up, post), *pointers, *numbers, NORM=norm, LEAKY=slope > 0, SIGN=signed)
    y = down(post, w_down if scale is None else scale.unsqueeze(1) * w_down, x if add_x else residual)
    if not save:
        post, rstd = post.new_empty((0, 0)), rstd.new_empty((0,))
    return y, post, sign, rstd


def down(post: Tensor, w_down: Tensor, residual: Tensor | None) -> Tensor:
    """Returns post · w_downᵀ + residual."""
    if residual is None:
        return post @ w_down.T
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if y.numel():
        with torch.cuda.device_of(y):
            residual = _laid_out(residual)
            numbers = (y.shape[0], post.shape[1], y.shape[1])
            _launch("down", (_laid_out(post), _laid_out(w_down), residual, y), residual, *numbers)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale: Tensor | None,
    post: Tensor,
    sign: Tensor,
    rstd: Tensor,
    slope: float,
    norm: bool,
    gain: float,
    add_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements `golf::leaky_relu2_mlp_backward`: returns dx, dw_up, dw_down and dscale.

    With `add_x`, dx includes the gradient of the residual.
    """
    (rows, width), hidden = x.shape, w_up.shape[0]
    dy, x, w_up, post = _laid_out(dy), _laid_out(x), _laid_out(w_up), _laid_out(post)
    columns = _laid_out(w_down if scale is None else scale.unsqueeze(1) * w_down)
    dpre, dx = torch.empty_like(post), torch.empty_like(x)
    if rows:
        with torch.cuda.device_of(x):
            parts = triton.cdiv(hidden, choose_tile("dpre", hidden).n)
            euler = rstd.new_empty((parts, rows) if norm else (0, 0))
            numbers = (rows, hidden, width, gain, slope)
            arguments = (post, rstd, _words(sign), euler, *numbers)
            _launch("dpre", (dy, columns, post, dpre), *arguments, NORM=norm, LEAKY=slope > 0)
            if parts > MAX_PARTS:
                euler, parts = euler.sum(0, keepdim=True), 1
            flags = {"NORM": norm, "ADD": add_x, "PARTS": triton.next_power_of_2(parts)}
            _launch("dx", (dpre, w_up, x, dy, dx), x, dy, rstd, euler, rows, hidden, width, parts, **flags)
    dw_up, dw_down = dpre.T @ x, dy.T @ post
    dscale = x.new_empty((0,))
    if scale is not None:
        dscale = torch.linalg.vecdot(dw_down, w_down)
        dw_down = scale.unsqueeze(1) * dw_down
    return dx, dw_up, dw_down, dscale


def choose_tile(product: str, columns: int) -> Tile:
    """Returns the tile of a product on the current GPU; without a GPU, that of an H100.

    Most GPUs have two tiles per product. The wide one is returned if its n divides the number of columns of the
    result, otherwise the narrow one.
    """
    tiles = TILES[product]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 12:
        return SMALL_TILE
    return tiles["narrow" if columns % tiles["wide"].n else "wide"]


def _blocks(product: str, tile: Tile) -> list[list[int]]:
    """Returns the block shapes of a kernel's tensor descriptors: two operands, then the half tiles of its epilogue."""
    halves = sum(name.endswith("_desc") for name in KERNELS[product].arg_names) - 2
    right = [tile.n, tile.k] if product in ("up", "down") else [tile.k, tile.n]
    return [[tile.m, tile.k], right, *([[tile.m, tile.n // 2]] * halves)]


def _launch(product: str, tensors: tuple[Tensor, ...], *arguments: Any, **flags: int) -> None:
    (rows, columns), device = tensors[-1].shape, tensors[-1].device
    tile = choose_tile(product, columns)
    # the interpreter counts as one SM, so that a program takes several tiles there
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n), processors * tile.programs)
    descriptors = map(TensorDescriptor.from_tensor, tensors, _blocks(product, tile))
    KERNELS[product][(programs,)](
        *descriptors, *arguments, **flags, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _words(sign: Tensor) -> Tensor:
    return sign.flatten().view(torch.int32)


def _laid_out(tensor: Tensor) -> Tensor:
    """Returns the tensor if it is contiguous and aligned to 16 bytes, as TMA needs. Otherwise returns an aligned copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

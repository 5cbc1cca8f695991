"""Triton kernels of Newton-Schulz orthogonalization. Each launch takes a whole list of matrices.

This file imports only torch and triton, so it can be pasted into a single-file script:

    results = newton_schulz(matrices, (3.4445, -4.7750, 2.0315) * 5)

One workspace holds all matrices, each padded with zeros to whole tiles. Each phase below is one launch. A table tells
each program its tile. The tables depend only on the shapes (`make_plan`).

    matrices ─ pack, norm ─► X ─┬─ symmetric ─► A ─ symmetric ─► B ─┬─ product ─► X ─► … ─► results
                                └───────────────────────────────────┘   the workspace: | X | next X | A | B |

    pack       X ← matrix in the compute dtype; also stores the largest entry and sum of squares of each block of rows
    norm       s = 1 / max(‖X‖, eps), from these sums; multiplies very small or very large matrices by a power of two
    symmetric  A = s²·X·Xᵀ (tall matrices: s²·Xᵀ·X): computes the lower triangle, stores it and its mirror image
    symmetric  B = b·A + c·A² in the same way; skipped if c = 0
    product    X ← s·(a·X + B·X), tall: s·(a·X + X·B); s is 1 after the first iteration

AOL scaling follows the first `symmetric` phase. It divides row i of X (tall: column i) by √Σⱼ|A|ᵢⱼ and scales A to
match. Equal inputs give equal bits.
"""

# kernel arguments have no annotations, because Triton infers their types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools
import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

T = TypeVar("T")

# tables of addresses hold a dtype as its index in this tuple, called its code
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# an elementwise kernel's program takes ROWS rows, and CHUNK columns at a time
ROWS, CHUNK = 16, 256
# inner dimension of one step of a product; output tiles are square
STEP = 64
ELEMENTWISE = {"num_warps": 8}
PRODUCT = {"num_warps": 8, "num_stages": 3}
# two programs fit on an SM: one loads and stores while the other multiplies
TWO_PROGRAMS = {**PRODUCT, "maxnreg": 128}

# each row of a table is one of these tuples; kernels read a field by its index
# Matrix: size, leading dimension (ld) and start of X; first block and number of blocks; start and leading dimension of
# the Gram matrix A; start of the AOL factors
Matrix = namedtuple("Matrix", "rows columns ld start first_block blocks tall gram gram_ld factors")
# SymmetricTile, a tile of A or B: start of both operands, number of steps, start of the result and of its mirror image;
# if the inner sum is split: number of splits, first partial sum, own split, counter of finished splits
SymmetricTile = namedtuple(
    "SymmetricTile",
    "matrix tall left right ld steps out mirror out_ld parts first_partial part counter",
    defaults=(1, 0, 0, 0),
)
# ProductTile, a tile of X ← a·X + B·X: start of both operands, number of steps, start of the result within X
ProductTile = namedtuple("ProductTile", "matrix tall left right left_ld right_ld steps out")
LAYOUT, SYMMETRIC, PRODUCTS = (tl.constexpr(len(kind._fields)) for kind in (Matrix, SymmetricTile, ProductTile))


@triton.jit
def pointer_to(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load_float(address, offsets, mask, code, ALIGNED: tl.constexpr):
    """Loads elements as float32 from a tensor that is given by its address and the code of its dtype."""
    if code == 0:
        value = tl.load(pointer_to(address, tl.float32, ALIGNED) + offsets, mask=mask, other=0.0)
    elif code == 1:
        value = tl.load(pointer_to(address, tl.bfloat16, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(pointer_to(address, tl.float16, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def reciprocal_power(value):
    """Returns exactly 2^-e for a value in [2^e, 2^(e+1))."""
    bits = value.to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def add_squares(largest, squares, value, AXIS: tl.constexpr = None):
    """Updates the largest entry and the sum of squares with the entries of `value`, along an axis or over all of them.

    Entries are divided by a power of two near the largest entry before they are squared, so that no square overflows.
    """
    before = reciprocal_power(largest)
    largest = tl.maximum(largest, tl.max(tl.abs(value), axis=AXIS))
    unit = reciprocal_power(largest)
    scaled = value * (unit if AXIS is None else tl.expand_dims(unit, AXIS))
    return largest, squares * (unit / before) * (unit / before) + tl.sum(scaled * scaled, axis=AXIS)


@triton.jit(do_not_specialize=["matrices"])
def pack_kernel(
    addresses_ptr, layout_ptr, blocks_ptr, x_ptr, stats_ptr, scales_ptr, matrices,
    SCALED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    matrix = tl.load(blocks_ptr + 3 * block)
    at = tl.load(blocks_ptr + 3 * block + 1) + tl.arange(0, ROWS)[:, None]
    layout = layout_ptr + matrix * LAYOUT
    rows, columns = tl.load(layout), tl.load(layout + 1)
    ld, start = tl.multiple_of(tl.load(layout + 2), 16), tl.multiple_of(tl.load(layout + 3), 16)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    source, code = tl.load(addresses_ptr + 2 * matrix), tl.load(addresses_ptr + 2 * matrix + 1)
    largest = 0.0
    squares = 0.0
    for first in range(0, ld, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        value = load_float(source, at * columns + column, (at < rows) & (column < columns), code, ALIGNED)
        if SCALED:
            # multiplied by one factor after the other, because the product of both factors may overflow
            value = value * tl.load(scales_ptr + 2 * matrices + matrix) * tl.load(scales_ptr + matrix)
        else:
            largest, squares = add_squares(largest, squares, value)
        # float16 can hold only the scaled matrix
        if SCALED or x_ptr.dtype.element_ty != tl.float16:
            tl.store(x_ptr + start + at * ld + column, value.to(x_ptr.dtype.element_ty), mask=column < ld)
    if not SCALED:
        tl.store(stats_ptr + 2 * block, largest)
        tl.store(stats_ptr + 2 * block + 1, squares)


@triton.jit(do_not_specialize=["matrices"])
def norm_kernel(
    layout_ptr, blocks_ptr, x_ptr, stats_ptr, scales_ptr, matrices, eps,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    matrix = tl.load(blocks_ptr + 3 * block)
    layout = layout_ptr + matrix * LAYOUT
    first_block, count = tl.load(layout + 4), tl.load(layout + 5)
    largest = 0.0
    for first in range(0, count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        largest = tl.maximum(
            largest, tl.max(tl.load(stats_ptr + 2 * (first_block + index), mask=index < count, other=0.0))
        )
    unit = reciprocal_power(largest)
    squares = 0.0
    for first in range(0, count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        own = reciprocal_power(tl.load(stats_ptr + 2 * (first_block + index), mask=index < count, other=0.0))
        part = tl.load(stats_ptr + 2 * (first_block + index) + 1, mask=index < count, other=0.0)
        squares += tl.sum(part * (unit / own) * (unit / own))
    # if the largest entry is in this range, products of two entries are far from the limits of float32
    tame = (largest > 9.1e-13) & (largest < 1.1e12)
    unit = tl.where(tame, 1.0, unit)
    norm = tl.sqrt(squares) * tl.where(tame, 1.0 / reciprocal_power(largest), 1.0)
    if block == first_block:
        tl.store(scales_ptr + matrix, 1.0 / tl.maximum(norm, eps * unit, propagate_nan=tl.PropagateNan.ALL))
        tl.store(scales_ptr + matrices + matrix, 1.0)
        tl.store(scales_ptr + 2 * matrices + matrix, unit)
    if unit != 1.0 and x_ptr.dtype.element_ty != tl.float16:
        at = tl.load(blocks_ptr + 3 * block + 1) + tl.arange(0, ROWS)[:, None]
        ld, start = tl.multiple_of(tl.load(layout + 2), 16), tl.multiple_of(tl.load(layout + 3), 16)
        for first in range(0, ld, CHUNK):
            column = first + tl.arange(0, CHUNK)[None, :]
            pointers = x_ptr + start + at * ld + column
            value = tl.load(pointers, mask=column < ld, other=0.0).to(tl.float32) * unit
            tl.store(pointers, value.to(x_ptr.dtype.element_ty), mask=column < ld)


@triton.jit
def aol_sums_kernel(
    layout_ptr, blocks_ptr, gram_ptr, factors_ptr, eps,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    entry = blocks_ptr + 3 * tl.program_id(0)
    layout = layout_ptr + tl.load(entry) * LAYOUT
    at = tl.load(entry + 1) + tl.arange(0, ROWS)
    start, ld = tl.multiple_of(tl.load(layout + 7), 16), tl.multiple_of(tl.load(layout + 8), 16)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, ld, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        value = tl.load(gram_ptr + start + at[:, None] * ld + column, mask=column < ld, other=0.0)
        sums += tl.sum(tl.abs(value.to(tl.float32)), axis=1)
    # eps bounds a norm, but these sums are squares of norms
    sums = tl.maximum(sums, eps * eps, propagate_nan=tl.PropagateNan.ALL)
    tl.store(factors_ptr + tl.load(layout + 9) + at, tl.rsqrt(sums))


@triton.jit
def aol_scale_kernel(
    layout_ptr, blocks_ptr, work_ptr, gram_start, scales_ptr, factors_ptr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scales in place: X ← s·D·X (tall: s·X·D) and A ← D·A·D, where D has the AOL factors on its diagonal."""
    entry = blocks_ptr + 3 * tl.program_id(0)
    matrix, is_gram = tl.load(entry), tl.load(entry + 2) != 0
    layout = layout_ptr + matrix * LAYOUT
    tall = tl.load(layout + 6) != 0
    at = tl.load(entry + 1) + tl.arange(0, ROWS)[:, None]
    start = tl.multiple_of(tl.load(layout + tl.where(is_gram, 7, 3)) + tl.where(is_gram, gram_start, 0), 16)
    ld = tl.multiple_of(tl.load(layout + tl.where(is_gram, 8, 2)), 16)
    factors = factors_ptr + tl.load(layout + 9)
    scale = tl.where(is_gram, 1.0, tl.load(scales_ptr + matrix))
    scale = scale * tl.load(factors + at, mask=(at >= 0) & (is_gram | (not tall)), other=1.0)
    for first in range(0, ld, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        pointers = work_ptr + start + at * ld + column
        value = tl.load(pointers, mask=column < ld, other=0.0).to(tl.float32) * scale
        value = value * tl.load(factors + column, mask=(column < ld) & (is_gram | tall), other=1.0)
        tl.store(pointers, value.to(work_ptr.dtype.element_ty), mask=column < ld)


@triton.jit
def add_rows_product(total, lefts, rights, ld, steps, TILE: tl.constexpr, STEP: tl.constexpr):
    """Returns total + L·Rᵀ. The rows of L and R are contiguous in memory."""
    within = tl.arange(0, TILE)[:, None] * ld + tl.arange(0, STEP)[None, :]
    lefts, rights = lefts + within, rights + within
    for _ in range(steps):
        total = tl.dot(tl.load(lefts), tl.trans(tl.load(rights)), total, input_precision="ieee")
        lefts += STEP
        rights += STEP
    return total


@triton.jit
def add_columns_product(total, lefts, rights, ld, steps, TILE: tl.constexpr, STEP: tl.constexpr):
    """Returns total + Lᵀ·R. The rows of L and R are contiguous in memory."""
    within = tl.arange(0, STEP)[:, None] * ld + tl.arange(0, TILE)[None, :]
    lefts, rights = lefts + within, rights + within
    for _ in range(steps):
        total = tl.dot(tl.trans(tl.load(lefts)), tl.load(rights), total, input_precision="ieee")
        lefts += STEP * ld
        rights += STEP * ld
    return total


@triton.jit
def store_symmetric(
    total, entry, in_ptr, out_ptr, scales_ptr, partials_ptr, counters_ptr, linear, quadratic,
    GRAM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    side = tl.arange(0, TILE)
    out, mirror = tl.multiple_of(tl.load(entry + 6), 16), tl.multiple_of(tl.load(entry + 7), 16)
    out_ld = tl.multiple_of(tl.load(entry + 8).to(tl.int32), 16)
    within = side[:, None] * out_ld + side[None, :]
    complete = True
    if GRAM:
        parts = tl.load(entry + 9)
        if parts > 1:
            # the program that finishes last adds the partial sums of all splits, always in the same order
            partial = partials_ptr + tl.load(entry + 10) * TILE * TILE + side[:, None] * TILE + side[None, :]
            tl.store(partial + tl.load(entry + 11) * TILE * TILE, total)
            tl.debug_barrier()
            counter = counters_ptr + tl.load(entry + 12)
            complete = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
            if complete:
                total = tl.zeros((TILE, TILE), dtype=tl.float32)
                for part in range(parts):
                    total += tl.load(partial + part * TILE * TILE, cache_modifier=".cg")
                tl.store(counter, 0)
        scale = tl.load(scales_ptr + tl.load(entry))
        total = total * scale * scale
    else:
        total = quadratic * total + linear * tl.load(in_ptr + out + within).to(tl.float32)
    if complete:
        result = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out + within, result)
        if mirror != out:
            tl.store(out_ptr + mirror + within, tl.trans(result))


@triton.jit(do_not_specialize_on_alignment=["scales_ptr"])
def symmetric_kernel(
    in_ptr, out_ptr, tiles_ptr, scales_ptr, partials_ptr, counters_ptr, linear, quadratic,
    GRAM: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Computes a tile of A = s²·X·Xᵀ (tall: s²·Xᵀ·X) if GRAM, otherwise of B = linear·A + quadratic·A·Aᵀ."""
    entry = tiles_ptr + tl.program_id(0) * SYMMETRIC
    tall = tl.load(entry + 1)
    left, right = tl.multiple_of(tl.load(entry + 2), 16), tl.multiple_of(tl.load(entry + 3), 16)
    # offsets within a tile fit in 32 bits, which saves registers
    ld, steps = tl.multiple_of(tl.load(entry + 4).to(tl.int32), 16), tl.load(entry + 5).to(tl.int32)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    # each branch stores its own accumulator; a variable of both branches would make each wgmma wait for the previous one
    if GRAM and tall != 0:
        total = add_columns_product(total, in_ptr + left, in_ptr + right, ld, steps, TILE, STEP)
        store_symmetric(
            total, entry, in_ptr, out_ptr, scales_ptr, partials_ptr, counters_ptr, linear, quadratic, GRAM, TILE
        )
    else:
        total = add_rows_product(total, in_ptr + left, in_ptr + right, ld, steps, TILE, STEP)
        store_symmetric(
            total, entry, in_ptr, out_ptr, scales_ptr, partials_ptr, counters_ptr, linear, quadratic, GRAM, TILE
        )


@triton.jit(do_not_specialize_on_alignment=["scales_ptr"])
def product_kernel(
    work_ptr, tiles_ptr, scales_ptr, x_start, square_start, out_start, linear, quadratic,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Computes a tile of the next X = s·(linear·X + quadratic·B·X), tall: s·(linear·X + quadratic·X·B)."""
    entry = tiles_ptr + tl.program_id(0) * PRODUCTS
    matrix, tall = tl.load(entry), tl.load(entry + 1) != 0
    left = tl.multiple_of(tl.load(entry + 2) + tl.where(tall, x_start, square_start), 16)
    right = tl.multiple_of(tl.load(entry + 3) + tl.where(tall, square_start, x_start), 16)
    left_ld = tl.multiple_of(tl.load(entry + 4).to(tl.int32), 16)
    right_ld = tl.multiple_of(tl.load(entry + 5).to(tl.int32), 16)
    inner, side = tl.arange(0, STEP), tl.arange(0, TILE)
    lefts = work_ptr + left + side[:, None] * left_ld + inner[None, :]
    rights = work_ptr + right + inner[:, None] * right_ld + side[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for _ in range(tl.load(entry + 6).to(tl.int32)):
        total = tl.dot(tl.load(lefts), tl.load(rights), total, input_precision="ieee")
        lefts += STEP
        rights += STEP * right_ld
    # the result has the layout and leading dimension of X
    out = tl.multiple_of(tl.load(entry + 7), 16)
    within = side[:, None] * tl.multiple_of(tl.where(tall, left_ld, right_ld), 16) + side[None, :]
    before = tl.load(work_ptr + x_start + out + within).to(tl.float32)
    total = (linear * before + quadratic * total) * tl.load(scales_ptr + matrix)
    tl.store(work_ptr + out_start + out + within, total.to(work_ptr.dtype.element_ty))


class Plan(NamedTuple):
    """Sizes and tables of all launches, which depend only on the matrices' shapes. The tables are on the device."""

    shapes: tuple[tuple[int, int], ...]
    tile: int
    layout: Tensor
    # for each program of an elementwise kernel: matrix, first row, and whether it is a row of the Gram matrix
    blocks: Tensor
    gram_blocks: Tensor
    gram_tiles: Tensor
    square_tiles: Tensor
    product_tiles: Tensor
    x_size: int
    gram_size: int
    factors: int
    partials: int
    counters: int
    # start and leading dimension of each matrix
    places: tuple[tuple[int, int], ...]


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copies a table to the device.

    Raises:
        RuntimeError: a CUDA graph is being captured. The graph must not contain a copy from the host.
    """
    if device.type != "cuda":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("new tensors during CUDA graph capture: run once with the same tensors before")
    return table.to(device, non_blocking=table.is_pinned())


@functools.lru_cache(maxsize=32)
def _send(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    table = torch.tensor(entries, dtype=torch.int64)
    if device.type != "cuda":
        return table, None
    sent = torch.cuda.Event()
    table = on_device(table.pin_memory(), device)
    sent.record(torch.cuda.current_stream(device))
    return table, sent


def upload(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Returns a table on the device. The first call copies the table there without waiting for the copy.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the table was not copied before.
    """
    table, sent = _send(entries, device)
    # waits for a copy on another CUDA stream; when a capture begins, all copies have ended
    if sent is not None and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).wait_event(sent)
    return table


_captured: list[object] = []


def lasting(table: T, device: torch.device) -> T:
    """Returns the table. During a CUDA graph capture, also keeps it forever, because replays read its address."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table


def tile_of(dtype: torch.dtype) -> int:
    """Side length of a tile. It is shorter for float32, whose products use no tensor cores and need more registers."""
    return 64 if dtype == torch.float32 else 128


@functools.lru_cache(maxsize=32)
def make_plan(shapes: tuple[tuple[int, int], ...], tile: int, device: torch.device, processors: int = 132) -> Plan:
    """Plans all launches: offsets in the workspace, and the tables that tell each program its tile.

    Args:
        shapes: (rows, columns) of each matrix, all positive.
        tile: side length of a product's output tile.
        device: device of the tables.
        processors: number of SMs. A tile's inner sum is split across SMs if it is longer than the average work per SM.
    """
    layout: list[Matrix] = []
    blocks: list[tuple[int, int, bool]] = []
    gram_blocks: list[tuple[int, int, bool]] = []
    grams: list[SymmetricTile] = []
    squares: list[SymmetricTile] = []
    products: list[ProductTile] = []
    x_size = gram_size = factors = partials = counters = 0
    padded = [(-(-rows // tile) * tile, -(-columns // tile) * tile) for rows, columns in shapes]
    work = sum(min(p) // tile * (min(p) // tile + 1) // 2 * (max(p) // STEP) for p in padded)
    average = max(8, work // processors)
    for matrix, (rows, columns) in enumerate(shapes):
        height, ld = padded[matrix]
        tall = rows > columns
        short, long = sorted((height, ld))
        own = [(matrix, row, False) for row in range(0, height, ROWS)]
        layout.append(Matrix(rows, columns, ld, x_size, len(blocks), len(own), tall, gram_size, short, factors))
        blocks += own
        gram_blocks += [(matrix, row, True) for row in range(0, short, ROWS)]
        parts = -(-(long // STEP) // average)
        cuts = [long // STEP * part // parts for part in range(parts + 1)]
        # tiles of the lower triangle; a kernel stores a tile and its mirror image
        for i, j in ((high, low) for high in range(0, short, tile) for low in range(0, high + 1, tile)):
            out, mirror = gram_size + i * short + j, gram_size + j * short + i
            for part, (cut, next_cut) in enumerate(itertools.pairwise(cuts)):
                k = cut * STEP
                left, right = (x_size + (k * ld + at if tall else at * ld + k) for at in (i, j))
                split = (parts, partials, part, counters)
                grams.append(SymmetricTile(matrix, tall, left, right, ld, next_cut - cut, out, mirror, short, *split))
            partials += parts if parts > 1 else 0
            counters += parts > 1
            left, right = (gram_size + at * short for at in (i, j))
            squares.append(SymmetricTile(matrix, False, left, right, short, short // STEP, out, mirror, short))
        for i, j in itertools.product(range(0, height, tile), range(0, ld, tile)):
            operands = (x_size + i * ld, gram_size + j) if tall else (gram_size + i * short, x_size + j)
            lds = (ld, short) if tall else (short, ld)
            products.append(ProductTile(matrix, tall, *operands, *lds, short // STEP, x_size + i * ld + j))
        x_size += height * ld
        gram_size += short * short
        factors += short

    # tiles with the most steps first, so that the last programs are short
    for tiles in (grams, squares, products):
        tiles.sort(key=lambda entry: -entry.steps)
    tables = [
        on_device(torch.tensor(entries, dtype=torch.int64), device)
        for entries in (layout, blocks, gram_blocks, grams, squares, products)
    ]
    places = tuple((entry.start, entry.ld) for entry in layout)
    return Plan._make((shapes, tile, *tables, x_size, gram_size, factors, partials, counters, places))


class Workspace:
    """Device memory of one call. `work` holds two buffers for X, then A and B. The other tensors are norms and sums."""

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        device = plan.layout.device
        self.plan = plan
        self.work = torch.empty(2 * (plan.x_size + plan.gram_size), dtype=dtype, device=device)
        self.stats = torch.empty(2 * len(plan.blocks), dtype=torch.float32, device=device)
        self.scales = torch.empty(3 * len(plan.shapes), dtype=torch.float32, device=device)
        self.factors = torch.empty(plan.factors, dtype=torch.float32, device=device)
        self.partials = torch.empty(plan.partials * plan.tile**2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(plan.counters, dtype=torch.int32, device=device)
        # other tensor cores than Hopper's need more registers, for operands or for a copy of the accumulators
        other = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9
        self.product_options = PRODUCT if other and dtype != torch.float32 else TWO_PROGRAMS

    def views(self, start: int) -> list[Tensor]:
        """Returns the matrices, without padding, of the buffer for X that begins at index `start` of `work`."""
        shapes = zip(self.plan.shapes, self.plan.places, strict=True)
        return [self.work.as_strided(shape, (ld, 1), start + place) for shape, (place, ld) in shapes]

    def norms(self, eps: float) -> None:
        """Computes ‖X‖ of each matrix from the blocks' sums of squares in `stats`."""
        plan = self.plan
        norm_kernel[(len(plan.blocks),)](
            plan.layout, plan.blocks, self.work, self.stats, self.scales, len(plan.shapes), eps,
            ROWS=ROWS, CHUNK=CHUNK, **ELEMENTWISE,
        )  # fmt: skip

    def _symmetric(self, tiles: Tensor, source: int, target: int, ones: bool, b: float, c: float, gram: bool) -> None:
        symmetric_kernel[(len(tiles),)](
            self.work[source:], self.work[target:], tiles, self._scales(ones), self.partials, self.counters, b, c,
            GRAM=gram, TILE=self.plan.tile, STEP=STEP, **self.product_options,
        )  # fmt: skip

    def _scales(self, ones: bool) -> Tensor:
        return self.scales[len(self.plan.shapes) :] if ones else self.scales

    def _aol(self, gram: int, eps: float, ones: bool) -> None:
        plan = self.plan
        aol_sums_kernel[(len(plan.gram_blocks),)](
            plan.layout, plan.gram_blocks, self.work[gram:], self.factors, eps, ROWS=ROWS, CHUNK=CHUNK, **ELEMENTWISE
        )
        for blocks in (plan.blocks, plan.gram_blocks):
            aol_scale_kernel[(len(blocks),)](
                plan.layout, blocks, self.work, gram, self._scales(ones), self.factors,
                ROWS=ROWS, CHUNK=CHUNK, **ELEMENTWISE,
            )  # fmt: skip

    def iterate(self, coefficients: Sequence[float], eps: float, prescale: str, *, scaled: bool = False) -> int:
        """Runs all iterations. The first X is at the start of `work`.

        Args:
            coefficients: a, b, c of the first iteration, then of the second, and so on.
            eps: see `newton_schulz`.
            prescale: `frobenius` or `aol`.
            scaled: whether X is already divided by its norm.

        Returns:
            Index in `work` at which the last X begins.
        """
        plan = self.plan
        x, other = 0, plan.x_size
        gram = 2 * plan.x_size
        square = gram + plan.gram_size
        for number in range(0, len(coefficients), 3):
            a, b, c = coefficients[number : number + 3]
            ones = scaled or number > 0
            self._symmetric(plan.gram_tiles, x, gram, ones, 0.0, 0.0, True)
            if prescale == "aol" and number == 0:
                self._aol(gram, eps, ones)
                ones = True
            if c != 0.0:
                self._symmetric(plan.square_tiles, gram, square, ones, b, c, False)
            product_kernel[(len(plan.product_tiles),)](
                self.work, plan.product_tiles, self._scales(ones), x, square if c != 0.0 else gram, other,
                a, 1.0 if c != 0.0 else b, TILE=plan.tile, STEP=STEP, **self.product_options,
            )  # fmt: skip
            x, other = other, x
        return x


def processors_of(device: torch.device) -> int:
    """Returns the number of SMs of a GPU. In Triton's interpreter it is 132, as on an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def matrices_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the matrices of a list. A bank `(b, m, n)` counts as b matrices."""
    return [piece for t in tensors for piece in (t.unbind() if t.ndim == 3 else (t,))]


def newton_schulz(
    matrices: Sequence[Tensor],
    coefficients: Sequence[float],
    eps: float = 1e-7,
    prescale: str = "frobenius",
    compute_dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Orthogonalizes every matrix of a list: U·S·Vᵀ → U·f(S)·Vᵀ with f(S) close to 1.

    Args:
        matrices: matrices `(m, n)` and banks of matrices `(b, m, n)`, float32, bfloat16 or float16, on one GPU, with
            any strides.
        coefficients: a, b, c of the first iteration, then of the second, and so on.
        eps: smallest divisor in X / max(‖X‖_F, eps).
        prescale: `frobenius` divides X by its norm. `aol` divides rows or columns, see the module's docstring.
        compute_dtype: dtype of the products: bfloat16, float16 or float32. Sums are float32.

    Returns:
        New contiguous tensors with the shapes and dtypes of the inputs.
    """
    results = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in matrices]
    sources = [matrix for matrix in matrices_of([m.contiguous() for m in matrices]) if matrix.numel()]
    if not sources:
        return results
    device = sources[0].device
    shapes = tuple((matrix.shape[0], matrix.shape[1]) for matrix in sources)
    aligned = all(m.data_ptr() % 16 == 0 and m.shape[1] % 8 == 0 for m in sources)
    with torch.cuda.device_of(sources[0]):
        plan = lasting(make_plan(shapes, tile_of(compute_dtype), device, processors_of(device)), device)
        w = Workspace(plan, compute_dtype)
        entries = tuple((m.data_ptr(), DTYPES.index(m.dtype)) for m in sources)
        addresses = lasting(upload(entries, device), device)

        def pack(scaled: bool) -> None:
            pack_kernel[(len(plan.blocks),)](
                addresses, plan.layout, plan.blocks, w.work, w.stats, w.scales, len(shapes),
                SCALED=scaled, ALIGNED=aligned, ROWS=ROWS, CHUNK=CHUNK, **ELEMENTWISE,
            )  # fmt: skip

        pack(False)
        w.norms(eps)
        scaled = compute_dtype == torch.float16
        if scaled:
            pack(True)
        start = w.iterate(coefficients, eps, prescale, scaled=scaled)
        targets = [matrix for matrix in matrices_of(results) if matrix.numel()]
        for dtype in DTYPES:
            # one call per dtype: PyTorch before 2.11 copies mixed dtypes wrongly, and later versions tensor by tensor
            alike = [pair for pair in zip(targets, w.views(start), strict=True) if pair[0].dtype == dtype]
            if alike:
                torch._foreach_copy_([target for target, _ in alike], [view for _, view in alike])
    return results

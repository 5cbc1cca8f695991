"""Entropy coding of byte matrices with asymmetric numeral systems (ANS).

The encoder divides the bytes into classes of similar magnitude. Each class has its own table of symbol weights. The
class of a byte is the label of its row plus the label of its column. A row may also be stored as the difference from
the row above.

A stream is a header and W words of one ANS coder, all little-endian.

    offset   bytes  content
    0        1      uint8  A, the number of row labels 0 … A−1, at least 2. A = 0: every row has label 0
    1        1      uint8  B, the number of column labels, with the same rules
    2        1      uint8  1 if rows may be differences, otherwise 0
    3        1      int8   lowest symbol
    4        1      int8   highest symbol; the alphabet has n = highest − lowest + 1 ≥ 2 symbols
    5        0 / 8  uint32 R, uint32 C: the data are L matrices of R rows and C columns, one after another, row by row;
                    absent if the first three bytes are 0
    5 / 13   4      uint32 CRC-32 of all earlier bytes of the header followed by the decoded data
    9 / 17   4 · W  uint32 words of the coder

The decoder reads from the coder, in this order:

    1. if A > 0: a table of A symbols, then L·R row labels coded with this table
    2. if B > 0: a table of B symbols, then L·C column labels coded with this table, matrix by matrix
    3. if rows may be differences: a table of 2 symbols, then L·R flags coded with this table; 1: the row is a
       difference
    4. K = max(A, 1) + max(B, 1) − 1 ≤ 256 tables of n symbols, one for each class
    5. the bytes, each coded with its class's table. The data are divided into blocks of 2²⁰ bytes. In each block all
       bytes of class 0 come first, in the order of their positions, then all bytes of class 1, and so on. Symbol s is
       the byte (lowest + s) mod 256.

Then the decoder goes from top to bottom and adds to each flagged row the row above, mod 256. The row above a matrix's
first row is the last row of the previous matrix, and zeros for the first matrix. A stream may have any labels; this
encoder derives them from mean magnitudes.

A table gives each of its symbols an 8-bit float t (0 … 255), which encodes a weight: 0 for t = 0, otherwise
(8 + t mod 8) · 2^⌊t/8⌋. The coder holds one number z (0 … 255) per symbol, with the fixed weights ⌊2²⁰ / (z + 6)²⌋.
z encodes a step d: z/2 for even z, −(z + 1)/2 for odd z. A symbol's t is the previous symbol's t plus d, mod 256;
before the first symbol of a table t is 0.

For m symbols of weights w (all 1 if all are 0) the frequencies are f = 1 + ⌊w · (2²⁴ − m) / Σw⌋. The first symbol of
largest weight also gets what is missing from the sum 2²⁴. Let c be the sum of the frequencies of all earlier symbols.

The coder has a state below 2⁶⁴. To decode a symbol: q = state mod 2²⁴; find the symbol with c ≤ q < c + f;
state ← ⌊state / 2²⁴⌋ · f + q − c; if state < 2³² and words are left, remove the last word, state ← state · 2³² + word.
The state starts at 0, and the last two words (or the only one) enter it by that last assignment. At the end the state
must be 0 and no words left. This is the ANS coder of `constriction`.
"""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.common.errors import CodecError, MissingCodec
from train.common.wording import counted

PACKAGE = "constriction>=0.4"

_HEADER = struct.Struct("<BBBbb")
_SHAPE = struct.Struct("<II")
_CRC = struct.Struct("<I")
_PRECISION = 24
_STEP_WEIGHTS = (1 << 20) // (np.arange(256) + 6) ** 2
_STEP_BITS = -np.log2(_STEP_WEIGHTS / _STEP_WEIGHTS.sum())

# number of labels per factor 2 of magnitude. More labels cost more bits than they save, fewer labels mix unlike rows.
_CLASSES_PER_OCTAVE = (2, 4, 8)
_MOST_LABELS = 32
_BLOCK_BYTES = 1 << 20
# size in bytes of the sample on which plans are compared
_SAMPLE_BYTES = 1 << 20
# rows and columns shorter than this get no label or flag, which would cost more bits than it can save
_LEAST_LABELLED = 16

_Bytes = NDArray[np.uint8]
_Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Plan:
    """The encoder's choice: row labels, column labels, and flags of rows that are differences. None: not used."""

    rows: _Integers | None = None
    columns: _Integers | None = None
    flags: _Integers | None = None

    @property
    def classes(self) -> int:
        return _labels(self.rows) + _labels(self.columns) - 1


def ans_encode(data: bytes, shape: tuple[int, int] | None = None) -> bytes:
    """Encode bytes, which represent two's-complement numbers, to the stream that the module's docstring describes.

    `shape`: number of rows and columns of the matrices in `data`; None if `data` contains no matrices.

    Raises:
        MissingCodec: constriction is not installed.
    """
    stream = _library()
    rows, columns = shape or (1, len(data))
    if rows <= 0 or columns <= 0 or len(data) % (rows * columns):
        rows, columns = 1, max(len(data), 1)
    matrices = np.frombuffer(data, np.int8).reshape(-1, rows, columns)
    plan = _choose(matrices)
    if plan.flags is not None:
        matrices = np.where(plan.flags.reshape(-1, rows, 1) > 0, _differences(matrices), matrices)
    low, high = (int(matrices.min()), int(matrices.max())) if matrices.size else (0, 1)
    low -= low == high == 127
    high += low == high
    symbols = (matrices.view(np.uint8) - np.uint8(low % 256)).reshape(-1)
    pieces = []
    counts = np.zeros((plan.classes, high - low + 1), np.int64)
    for block, order, ends in _blocks(_class_map(plan, (len(symbols) // columns, columns), rows), plan.classes):
        for k, piece in enumerate(np.split(symbols[block][order], ends)):
            counts[k] += np.bincount(piece, minlength=counts.shape[1])
            pieces.append((k, piece))
    floats = _small_floats(counts)
    parts: list[tuple[NDArray[Any], Any]] = []
    for labels in (plan.rows, plan.columns, plan.flags):
        if labels is not None:
            table = _small_floats(np.bincount(labels, minlength=2)[None])
            parts += [(_steps(table), _model(stream, _STEP_WEIGHTS)), (labels, _model(stream, _weights(table[0])))]
    parts.append((_steps(floats), _model(stream, _STEP_WEIGHTS)))
    tables = [_model(stream, _weights(table)) for table in floats]
    parts += [(piece, tables[k]) for k, piece in pieces]
    coder = stream.stack.AnsCoder()
    for part, table_model in reversed(parts):
        coder.encode_reverse(np.ascontiguousarray(part, np.int32), table_model)
    label_counts = [0 if given is None else _labels(given) for given in (plan.rows, plan.columns)]
    header = _HEADER.pack(*label_counts, plan.flags is not None, low, high)
    if any(header[:3]):
        header += _SHAPE.pack(rows, columns)
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return header + _CRC.pack(zlib.crc32(data, zlib.crc32(header))) + words


def ans_decode(data: bytes, size: int) -> bytes:
    """Decode a stream to `size` bytes. The memory used is proportional to `size`, even for a malicious stream.

    Raises:
        MissingCodec: constriction is not installed.
        CodecError: `data` is no such stream, or is damaged.
    """
    stream = _library()
    data = bytes(data)
    begin = _HEADER.size + (_SHAPE.size if any(data[:3]) else 0)
    if len(data) < begin + _CRC.size or (len(data) - begin) % 4:
        raise CodecError(f"codec ans: expected a header and words of 4 bytes, found {counted(len(data), 'byte')}")
    row_labels, column_labels, flagged, low, high = _HEADER.unpack_from(data)
    rows, columns = _SHAPE.unpack_from(data, _HEADER.size) if begin > _HEADER.size else (1, max(size, 1))
    classes = max(row_labels, 1) + max(column_labels, 1) - 1
    labelled = 1 not in (row_labels, column_labels) and classes <= 256 and flagged <= 1
    if not rows * columns or size % (rows * columns) or low >= high or not labelled:
        raise CodecError(
            f"codec ans: the header does not fit {size:,} decoded bytes: {rows:,} x {columns:,}, symbols {low}..{high}, "
            f"labels {row_labels} and {column_labels}"
        )
    words = np.frombuffer(data, "<u4", offset=begin + _CRC.size).astype(np.uint32)
    try:
        coder = stream.stack.AnsCoder(words)
    except ValueError as error:
        raise CodecError("codec ans: the stream ends early") from error
    height, matrices = size // columns, size // (rows * columns)

    def take_tables(count: int, symbols: int) -> list[Any]:
        steps = coder.decode(_model(stream, _STEP_WEIGHTS), count * symbols).reshape(count, symbols)
        floats = np.cumsum(np.where(steps % 2, -(steps + 1) // 2, steps // 2), axis=1) % 256
        return [_model(stream, _weights(table)) for table in floats]

    def take_labels(symbols: int, count: int) -> _Integers | None:
        return coder.decode(take_tables(1, symbols)[0], count) if symbols else None

    plan = _Plan(take_labels(row_labels, height), take_labels(column_labels, matrices * columns))
    flags = take_labels(2 * flagged, height)
    tables = take_tables(classes, high - low + 1)
    decoded = np.empty(size, np.uint8)
    for block, order, ends in _blocks(_class_map(plan, (height, columns), rows), classes):
        counts = np.diff(ends, prepend=0, append=len(order))
        symbols = [coder.decode(table, count) for table, count in zip(tables, counts.tolist(), strict=True) if count]
        decoded[block][order] = np.concatenate(symbols)
    decoded += np.uint8(low % 256)
    result = (decoded if flags is None else _sums(decoded.reshape(height, columns), flags)).tobytes()
    # check the CRC, because the coder raises no error if it reads beyond the end of a stream
    found = zlib.crc32(result, zlib.crc32(data[:begin]))
    if not coder.is_empty() or (found,) != _CRC.unpack_from(data, begin):
        raise CodecError(f"codec ans: the stream does not hold {size:,} bytes with its checksum: it is damaged")
    return result


def _library() -> ModuleType:
    try:
        stream: ModuleType = importlib.import_module("constriction").stream
    except ImportError as error:
        raise MissingCodec(f"codec ans: needs {PACKAGE}: pip install {PACKAGE!r}, or set CODEC=brotli") from error
    return stream


def _choose(matrices: NDArray[np.int8]) -> _Plan:
    """Return the plan with the fewest estimated bits among `_candidates`, with and without difference flags."""
    if not matrices.size:
        return _Plan()
    height, columns = matrices.shape[0] * matrices.shape[1], matrices.shape[2]
    plain = _magnitude(matrices)
    plans = list(_candidates(plain))
    if columns >= _LEAST_LABELLED and height > 1:
        differences = _differences(matrices)
        spread = _magnitude(differences)
        flags = (spread.sum(2, dtype=np.int64) < 0.8 * plain.sum(2, dtype=np.int64)).astype(np.int64)
        if flags.any():
            mixed = np.where(flags[:, :, None] > 0, spread, plain)
            plans += [replace(plan, flags=flags.reshape(-1)) for plan in _candidates(mixed)]
    if len(plans) == 1:
        return plans[0]
    # take sample rows at equal distances
    sample = np.unique(np.linspace(0, height - 1, min(max(_SAMPLE_BYTES // columns, 1), height)).astype(np.int64))
    flat = matrices.reshape(height, columns)
    shown = flat[sample]
    shown_differences = (shown - np.where(sample[:, None] > 0, flat[sample - 1], 0)).astype(np.int8)

    def bits(plan: _Plan) -> float:
        codes = shown if plan.flags is None else np.where(plan.flags[sample, None] > 0, shown_differences, shown)
        classes = _class_map(plan, (height, columns), matrices.shape[1], sample)
        cells = np.bincount(
            (classes * np.uint16(256) + (codes.view(np.uint8) ^ np.uint8(128))).reshape(-1),
            minlength=256 * plan.classes,
        )
        counts = cells.reshape(plan.classes, 256) * (height / len(sample))
        return _bits(counts) + sum(
            _bits(np.bincount(labels)[None]) for labels in (plan.rows, plan.columns, plan.flags) if labels is not None
        )

    return min(plans, key=bits)


def _candidates(magnitudes: _Bytes) -> Iterator[_Plan]:
    yield _Plan()
    _, rows, columns = magnitudes.shape
    of_rows, of_columns = magnitudes.mean(2).reshape(-1), magnitudes.mean(1).reshape(-1)
    for steps in _CLASSES_PER_OCTAVE:
        by_row = _by_spread(of_rows, steps) if columns >= _LEAST_LABELLED else None
        by_column = _by_spread(of_columns, steps) if rows >= _LEAST_LABELLED else None
        if by_row is not None:
            yield _Plan(_compact(by_row))
        if by_column is not None:
            yield _Plan(None, _compact(by_column))
        if by_row is not None and by_column is not None:
            yield _Plan(by_row, by_column)


def _by_spread(means: NDArray[np.float64], steps: int) -> _Integers | None:
    octaves = np.log2(means + 1 / 256)
    labels = np.rint(steps * (octaves - np.median(octaves))).astype(np.int64)
    labels = np.clip(labels, -_MOST_LABELS // 2, _MOST_LABELS // 2 - 1)
    labels -= labels.min()
    return labels if labels.any() else None


def _compact(labels: _Integers) -> _Integers:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _bits(counts: NDArray[Any]) -> float:
    """Estimate the bits of symbols and of their tables, from the symbols' counts `(tables, symbols)`."""
    used = np.flatnonzero(counts.any(0))
    if not len(used):
        return 0.0
    counts = counts[:, used[0] : used[-1] + 1]
    floats = _small_floats(np.rint(counts).astype(np.int64))
    weights = _weights(floats)
    chances = np.maximum(weights / np.maximum(weights.sum(1, keepdims=True), 1), 2.0**-_PRECISION)
    return float(-(counts * np.log2(chances)).sum() + _STEP_BITS[_steps(floats)].sum())


def _blocks(classes: _Bytes, count: int) -> Iterator[tuple[slice, _Integers, _Integers]]:
    """Yield for each block: its slice, the coding order of its bytes, and where classes 1, 2, … begin in this order."""
    flat = classes.reshape(-1)
    for begin in range(0, len(flat), _BLOCK_BYTES):
        block = flat[begin : begin + _BLOCK_BYTES]
        order = np.argsort(block, kind="stable") if count > 1 else np.arange(len(block))
        ends = np.cumsum(np.bincount(block, minlength=count))[:-1]
        yield slice(begin, begin + _BLOCK_BYTES), order, ends


def _class_map(plan: _Plan, shape: tuple[int, int], rows: int, chosen: _Integers | None = None) -> _Bytes:
    """Return the class of each byte, `(height, columns)`. If `chosen` is given, only for these rows."""
    lines = np.arange(shape[0]) if chosen is None else chosen
    classes = np.zeros((len(lines), shape[1]), np.uint8)
    if plan.columns is not None:
        classes += plan.columns.astype(np.uint8).reshape(-1, shape[1])[lines // rows]
    if plan.rows is not None:
        classes += plan.rows.astype(np.uint8)[lines, None]
    return classes


def _labels(labels: _Integers | None) -> int:
    return 1 if labels is None else int(labels.max()) + 1


def _magnitude(matrices: NDArray[np.int8]) -> _Bytes:
    # view as uint8, because np.abs(−128) is −128 in int8, and the same bits are 128 in uint8
    return np.abs(matrices).view(np.uint8)


def _differences(matrices: NDArray[np.int8]) -> NDArray[np.int8]:
    flat = matrices.reshape(-1, matrices.shape[2])
    return np.diff(flat, axis=0, prepend=np.zeros_like(flat[:1])).reshape(matrices.shape)


def _sums(differences: _Bytes, flags: _Integers) -> _Bytes:
    """Undo `_differences`: from top to bottom, add to each flagged row the row above."""
    total = np.cumsum(differences, axis=0, dtype=np.uint8)
    start = np.maximum.accumulate(np.where(flags > 0, 0, np.arange(len(flags))))
    before = np.where(start[:, None] > 0, total[start - 1], np.uint8(0))
    sums: _Bytes = total - before
    return sums


def _small_floats(counts: _Integers) -> _Integers:
    """Round 16 · counts to the nearest 8-bit floats, with 5 bits of exponent and 3 bits of mantissa."""
    values = 16 * counts
    exponents = np.maximum(np.frexp(values.astype(np.float64))[1] - 4, 0)
    mantissas = np.rint(values / 2.0**exponents).astype(np.int64)
    # a mantissa that is rounded up to 16 is correct in this sum: it becomes mantissa 8 of the next exponent
    return np.where(counts > 0, np.minimum(8 * exponents + mantissas - 8, 255), 0)


def _weights(floats: _Integers) -> _Integers:
    wide = floats.astype(np.int64)
    return np.where(wide > 0, (8 + wide % 8) << (wide // 8), 0)


def _steps(floats: _Integers) -> _Integers:
    steps = (np.diff(floats, axis=1, prepend=0) + 128) % 256 - 128
    return np.where(steps < 0, -2 * steps - 1, 2 * steps).reshape(-1)


def _model(stream: ModuleType, weights: _Integers) -> Any:
    """Return constriction's model with these weights. constriction adds 1 to each frequency."""
    weights = weights if weights.any() else np.ones_like(weights)
    free = (1 << _PRECISION) - len(weights)
    frequencies = weights * free // weights.sum()
    frequencies[weights.argmax()] += free - frequencies.sum()
    return stream.model.Categorical(frequencies.astype(np.float64), perfect=False, lazy=False)

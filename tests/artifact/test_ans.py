"""The entropy coder: its stream read by a second implementation, its size held against the entropy, its refusals."""

import struct
import sys
import tracemalloc

import numpy as np
import pytest
from ans_reader import SecondReader
from hypothesis import given, settings
from hypothesis import strategies as st

from train.artifact.ans import _small_floats, _weights, ans_decode, ans_encode
from train.artifact.codecs import CODECS, CodecError, MissingCodec

GENERATOR = np.random.default_rng(0)


def entropy_bytes(codes: np.ndarray) -> float:
    """Order-0 entropy of a whole array in bytes."""
    counts = np.bincount(codes.reshape(-1).view(np.uint8))
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum() * codes.size / 8)


def codes(shape: tuple[int, ...], spread: object = 1.0, bits: int = 6) -> np.ndarray:
    """Codes as SDClip at its published width makes them of Gaussian rows."""
    limit = 2 ** (bits - 1) - 1
    width = {6: 12.85, 8: 20.0}[bits]
    return np.clip(np.rint(GENERATOR.standard_normal(shape) * spread * limit / width), -limit, limit).astype(np.int8)


def stripes(*shape: int) -> np.ndarray:
    """Codes of rows and columns of very different spread, and near-copies of one row among them."""
    data = codes(shape, np.exp2(3 * GENERATOR.integers(-1, 2, (*shape[:-1], 1))))
    data[..., ::2] //= 4
    data[0, shape[1] // 2 :] = data[0, :1] + GENERATOR.integers(0, 2, data[0, shape[1] // 2 :].shape)
    return data


CASES = {
    "flat": (codes((2, 20, 30)), (20, 30)),
    "rows": (codes((2, 32, 128), np.exp2(3 * GENERATOR.integers(-1, 2, (2, 32, 1)))), (32, 128)),
    "columns": (codes((2, 128, 32), np.exp2(3 * GENERATOR.integers(-1, 2, (2, 1, 32)))), (128, 32)),
    "both": (
        codes((1, 96, 96), np.exp2(GENERATOR.integers(-1, 3, (96, 1)) + GENERATOR.integers(-1, 3, (1, 96)))),
        (96, 96),
    ),
    "all": (stripes(2, 64, 64), (64, 64)),
    "no shape": (codes((1, 1, 501)), None),
    "extremes": (np.array([-128, 127, 0, -128] * 40, np.int8), (4, 40)),
    "one symbol": (np.full(300, 127, np.int8), (10, 30)),
    "nothing": (np.zeros(0, np.int8), None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_second_implementation_reads_the_stream_from_its_description(case: str) -> None:
    data, shape = CASES[case]
    stream = ans_encode(data.tobytes(), shape)
    assert SecondReader(stream, data.size).content == data.tobytes() == ans_decode(stream, data.size)


def test_the_cases_use_every_part_of_the_stream() -> None:
    used = [tuple(ans_encode(data.tobytes(), shape)[:3]) for data, shape in CASES.values()]
    assert {(rows > 0, columns > 0) for rows, columns, _ in used} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert {flags for _, _, flags in used} == {0, 1}


@settings(deadline=None)
@given(
    data=st.binary(max_size=400) | st.tuples(st.binary(max_size=6), st.integers(0, 300)).map(lambda t: t[0] * t[1]),
    rows=st.integers(-1, 40),
    columns=st.integers(-1, 40),
)
def test_bytes_come_back_whatever_shape_is_claimed(data: bytes, rows: int, columns: int) -> None:
    assert ans_decode(ans_encode(data, (rows, columns)), len(data)) == data


@settings(deadline=None)
@given(seed=st.integers(0, 99), matrices=st.integers(0, 3), rows=st.integers(1, 70), columns=st.integers(1, 70))
def test_striped_matrices_come_back(seed: int, matrices: int, rows: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    spread = np.exp2(generator.integers(-3, 5, (matrices, rows, 1)) + generator.integers(-2, 3, (matrices, 1, columns)))
    data = np.clip(generator.standard_normal((matrices, rows, columns)) * spread, -128, 127).astype(np.int8)
    data[:, 1::3] = data[:, :-1:3][:, : data[:, 1::3].shape[1]]
    assert ans_decode(ans_encode(data.tobytes(), (rows, columns)), data.size) == data.tobytes()


def test_blocks_beyond_the_first_come_back() -> None:
    data = codes((3, 700, 1024), np.exp(0.5 * GENERATOR.standard_normal((3, 1, 1024))))
    stream = ans_encode(data.tobytes(), (700, 1024))
    assert stream[1] > 1
    assert ans_decode(stream, data.size) == data.tobytes()


@pytest.mark.parametrize(("bits", "rows"), [(6, 64), (6, 512), (8, 512)])
def test_codes_of_equal_rows_take_their_entropy(bits: int, rows: int) -> None:
    data = codes((4, rows, 512), bits=bits)
    assert len(ans_encode(data.tobytes(), (rows, 512))) <= 1.003 * entropy_bytes(data)


@pytest.mark.parametrize("axis", [1, 2])
def test_codes_of_unequal_rows_or_columns_take_less_than_their_entropy(axis: int) -> None:
    shape = [2, 256, 256]
    shape[3 - axis] = 1
    spread = np.exp(0.3 * GENERATOR.standard_normal(shape))
    data = codes((2, 256, 256), spread)
    # what a coder that knew each row's deviation would take
    known = sum(
        entropy_bytes(part)
        for level in np.split(np.sort(spread.reshape(-1)), 32)
        for part in [codes((64, 256), level.mean())]
    )
    coded = len(ans_encode(data.tobytes(), (256, 256)))
    assert coded < 0.985 * entropy_bytes(data)
    assert coded < 1.02 * known * data.size / (32 * 64 * 256)


def test_near_copies_of_a_row_cost_little() -> None:
    data = codes((1, 256, 128), bits=8)
    data[0, 128:] = data[0, 128] + GENERATOR.integers(0, 2, (128, 128))
    assert len(ans_encode(data.tobytes(), (256, 128))) < 0.75 * entropy_bytes(data)


def test_tables_hold_any_count_with_three_bits() -> None:
    counts = np.unique(np.concatenate([np.arange(1, 5000), np.geomspace(5000, 2**31 - 1, 500).astype(np.int64)]))
    weights = _weights(_small_floats(counts[None]))[0]
    np.testing.assert_allclose(weights, 16 * counts, rtol=1 / 16)
    assert np.array_equal(weights[:8], 16 * counts[:8])
    assert _small_floats(np.array([[0, 2**32]])).tolist() == [[0, 255]]


def test_brotli_takes_more() -> None:
    data = codes((4, 128, 128)).tobytes()
    assert len(ans_encode(data, (128, 128))) < 0.99 * len(CODECS["brotli"].encode(data))


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, 1), (1, 1), (0, 250), (1, 250), (2, 2), (3, 127), (4, 128), (5, 0), (9, 0), (5, 77), (12, 255)],
)  # fmt: skip
def test_headers_that_do_not_fit_are_refused(position: int, value: int) -> None:
    data, shape = CASES["all"]
    stream = bytearray(ans_encode(data.tobytes(), shape))
    stream[position] = value
    with pytest.raises(CodecError, match="codec ans"):
        ans_decode(bytes(stream), data.size)


def test_every_damaged_byte_is_refused() -> None:
    data, shape = CASES["all"]
    stream = ans_encode(data.tobytes(), shape)
    for position in range(len(stream)):
        damaged = bytearray(stream)
        damaged[position] ^= int(GENERATOR.integers(1, 256))
        with pytest.raises(CodecError, match="codec ans"):
            ans_decode(bytes(damaged), data.size)


def test_memory_is_bounded_by_the_promised_size() -> None:
    data, shape = CASES["all"]
    stream = bytearray(ans_encode(data.tobytes(), shape))
    for rows, columns in ((1, data.size), (data.size, 1), (4_000_000_000, 4_000_000_000)):
        struct.pack_into("<II", stream, 5, rows, columns)
        stream[0:3] = 255, 255, 1
        tracemalloc.start()
        try:
            with pytest.raises(CodecError):
                ans_decode(bytes(stream), data.size)
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ans_encode(b"abc")
    monkeypatch.setitem(sys.modules, "constriction", None)
    for call in (lambda: ans_encode(b"abc"), lambda: ans_decode(stream, 3)):
        with pytest.raises(MissingCodec, match=r"codec ans: needs constriction>=0.4: pip install 'constriction>=0.4'"):
            call()

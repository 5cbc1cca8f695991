"""Codecs: bit-exact round trips, bounded decoding, and refusals that say what to do."""

import lzma
import sys
import tracemalloc
import types
import zlib

import brotli
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from train.artifact.codecs import (
    CODECS,
    SHUFFLE_HEADER_BYTES,
    CodecError,
    MissingCodec,
    byte_shuffle,
    byte_unshuffle,
)

BYTE_CODECS = sorted(name for name, codec in CODECS.items() if codec.max_bits == 8)
STREAM_CODECS = sorted(set(BYTE_CODECS) - {"raw"})
SAMPLE = bytes(np.random.default_rng(0).integers(0, 7, 3001, dtype=np.uint8))


def test_the_table_has_the_promised_names() -> None:
    assert {"brotli", "zstd", "lzma", "zlib", "raw", "raw6"} <= set(CODECS)
    assert all(codec.name == name for name, codec in CODECS.items())


@settings(deadline=None)
@given(data=st.binary(max_size=300) | st.integers(0, 5000).map(bytes), name=st.sampled_from(BYTE_CODECS))
def test_bytes_come_back_with_a_shape_and_without(data: bytes, name: str) -> None:
    codec = CODECS[name]
    assert codec.decode(codec.encode(data), len(data)) == data
    assert codec.decode(codec.encode(data, (1, len(data))), len(data)) == data


@settings(deadline=None)
@given(st.lists(st.integers(-32, 31), max_size=100))
def test_codes_come_back_from_six_bits_each(codes: list[int]) -> None:
    data = np.array(codes, np.int8).tobytes()
    packed = CODECS["raw6"].encode(data)
    assert len(packed) == -(-6 * len(codes) // 8)
    number = sum((code & 63) << (6 * i) for i, code in enumerate(codes))
    assert packed == number.to_bytes(len(packed), "little")
    assert CODECS["raw6"].decode(packed, len(codes)) == data


def test_the_streams_are_those_that_other_programs_read() -> None:
    assert brotli.decompress(CODECS["brotli"].encode(SAMPLE)) == SAMPLE
    assert zstandard.ZstdDecompressor().decompress(CODECS["zstd"].encode(SAMPLE)) == SAMPLE
    assert lzma.decompress(CODECS["lzma"].encode(SAMPLE), lzma.FORMAT_XZ) == SAMPLE
    assert zlib.decompress(CODECS["zlib"].encode(SAMPLE)) == SAMPLE
    assert CODECS["raw"].encode(SAMPLE) == SAMPLE


def test_the_published_levels_are_used() -> None:
    text = b"".join(b"line %d of %d\n" % (i, i * i) for i in range(4000))
    assert len(CODECS["brotli"].encode(text)) == len(brotli.compress(text, quality=11))
    assert len(CODECS["zstd"].encode(text)) == len(zstandard.ZstdCompressor(level=22).compress(text))
    assert len(CODECS["brotli"].encode(text)) < len(brotli.compress(text, quality=9))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_the_same_bytes_give_the_same_stream(name: str) -> None:
    assert CODECS[name].encode(SAMPLE) == CODECS[name].encode(bytes(bytearray(SAMPLE)))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_wrong_size_is_refused(name: str) -> None:
    stream = CODECS[name].encode(SAMPLE)
    for size in (0, 1, len(SAMPLE) - 8, len(SAMPLE) - 1, len(SAMPLE) + 1, 10 * len(SAMPLE)):
        with pytest.raises(CodecError, match=f"codec {name}"):
            CODECS[name].decode(stream, size)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_truncation_and_any_addition_is_refused(name: str) -> None:
    stream = CODECS[name].encode(SAMPLE[:200])
    for damaged in [stream[:i] for i in range(len(stream))] + [stream + b"\0", stream + stream]:
        with pytest.raises(CodecError, match=f"codec {name}"):
            CODECS[name].decode(damaged, 200)


def test_a_stream_that_has_all_its_bytes_but_no_end_is_refused() -> None:
    encoder = brotli.Compressor()
    stream = encoder.process(SAMPLE) + encoder.flush()
    with pytest.raises(CodecError, match="codec brotli: the stream ends early, after 3,001 decoded bytes"):
        CODECS["brotli"].decode(stream, len(SAMPLE))


@pytest.mark.parametrize(("name", "kind"), [("lzma", "an xz"), ("zlib", "a zlib")])
def test_what_is_wrong_with_a_stream_is_said(name: str, kind: str) -> None:
    stream = CODECS[name].encode(SAMPLE)
    for damaged, said in (
        (b"\xff" * 50, rf"not {kind} stream, or a damaged one \("),
        (stream[:-1], "the stream ends early$"),
        (stream + b"\0\0", "2 bytes after the stream's end$"),
    ):
        with pytest.raises(CodecError, match=f"^codec {name}: {said}"):
            CODECS[name].decode(damaged, len(SAMPLE))


@pytest.mark.parametrize("name", STREAM_CODECS)
def test_foreign_bytes_are_refused(name: str) -> None:
    for foreign in (b"", b"\xff" * 50, SAMPLE):
        with pytest.raises(CodecError, match=f"codec {name}"):
            CODECS[name].decode(foreign, len(SAMPLE))


@pytest.mark.parametrize("name", STREAM_CODECS)
def test_a_bomb_does_not_go_off(name: str) -> None:
    bomb = CODECS[name].encode(bytes(30_000_000))
    tracemalloc.start()
    with pytest.raises(CodecError, match=f"codec {name}"):
        CODECS[name].decode(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # xz asks for its dictionary before the first byte; an unbounded decoder would take 30 MB beside it
    assert peak < (40_000_000 if name == "lzma" else 3_000_000)


def test_a_zstd_frame_without_its_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(SAMPLE)
    with pytest.raises(CodecError, match=r"codec zstd: expected a frame of 3,001 decoded bytes"):
        CODECS["zstd"].decode(frame, len(SAMPLE))


def test_six_bits_refuse_larger_codes() -> None:
    for code in (-33, 32):
        with pytest.raises(CodecError, match=r"codec raw6: expected codes in -32\.\.31"):
            CODECS["raw6"].encode(np.array([0, code], np.int8).tobytes())


@pytest.mark.parametrize(
    ("name", "module", "package"), [("brotli", "brotli", "brotli>=1.2"), ("zstd", "zstandard", "zstandard")]
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
    stream = CODECS[name].encode(SAMPLE)
    monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: CODECS[name].encode(SAMPLE), lambda: CODECS[name].decode(stream, len(SAMPLE))):
        with pytest.raises(MissingCodec, match=f"codec {name}: needs {package}: pip install '{package}'"):
            call()


def test_a_brotli_that_cannot_bound_its_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(__version__="1.1.0", Decompressor=type("Decompressor", (), {}))
    monkeypatch.setitem(sys.modules, "brotli", old)
    with pytest.raises(MissingCodec, match=r"brotli 1\.1\.0 is too old: pip install --upgrade"):
        CODECS["brotli"].decode(b"", 0)


@settings(deadline=None)
@given(data=st.binary(max_size=100), stride=st.integers(1, 255))
def test_the_shuffle_comes_back_and_is_five_bytes_longer(data: bytes, stride: int) -> None:
    shuffled = byte_shuffle(data, stride)
    assert len(shuffled) == len(data) + SHUFFLE_HEADER_BYTES == len(data) + 5
    assert byte_unshuffle(shuffled) == data


def test_the_shuffle_has_the_published_layout() -> None:
    assert byte_shuffle(b"abcdefg") == b"BSHF\x02" + b"aceg" + b"bdf"
    assert byte_shuffle(b"abcdefg", 3) == b"BSHF\x03" + b"adg" + b"be" + b"cf"
    assert byte_shuffle(b"") == b"BSHF\x02"


def test_other_bytes_are_not_unshuffled() -> None:
    for foreign in (b"", b"BSHF", b"BSHF\0abc", b"bshf\x02abc"):
        with pytest.raises(CodecError, match="byte shuffle: expected a header BSHF"):
            byte_unshuffle(foreign)
    for stride in (0, 256):
        with pytest.raises(ValueError, match="stride: expected 1 to 255"):
            byte_shuffle(b"abc", stride)

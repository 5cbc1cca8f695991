"""Lossless byte codecs, and a byte shuffle that helps some codecs to compress floats.

If a stream ends early, has bytes after its end or decodes to an unexpected size, decoding raises a `CodecError`. The
codecs brotli, zstd and ans need one package each. If the package is missing, the error names it. Only ans
(`train.artifact.ans`) uses the rows and columns of the data.
"""

from __future__ import annotations

import importlib
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from golf_kernels import int6_pack, int6_unpack
from train.common.errors import CodecError, MissingCodec
from train.common.wording import counted

SHUFFLE_MAGIC = b"BSHF"
SHUFFLE_HEADER_BYTES = 5

_BROTLI_QUALITY = 11
_ZSTD_LEVEL = 22
_ZSTD_WINDOW_BYTES = 1 << 27
_LZMA_PRESET = 9 | lzma.PRESET_EXTREME
_LZMA_LEAST_DICTIONARY = 1 << 12
_LZMA_LARGEST_DICTIONARY = 1 << 26
_LZMA_MEMORY_BYTES = 2 * _LZMA_LARGEST_DICTIONARY


@dataclass(frozen=True)
class Codec:
    """A lossless byte codec."""

    name: str
    max_bits: int  # bits of the largest two's-complement number that a byte may contain
    _encode: Callable[..., bytes]
    _decode: Callable[[Any, int], bytes | memoryview]
    shaped: bool = False  # whether the encoder uses the shape of the matrices in the data

    def encode(self, data: bytes, shape: tuple[int, int] | None = None) -> bytes:
        """Encode `data`. The same data give the same bytes.

        `shape`: number of rows and columns of the matrices in `data`; None if `data` contains no matrices.

        Raises:
            MissingCodec: the codec's package is not installed. The message names the package.
            CodecError: a byte exceeds `max_bits`.
        """
        return self._encode(data, shape) if self.shaped else self._encode(data)

    def decode(self, data: bytes | memoryview, size: int) -> bytes | memoryview:
        """Decode `data` to exactly `size` bytes. The codec `raw` returns `data` itself.

        Raises:
            MissingCodec: the codec's package is not installed. The message names the package.
            CodecError: `data` is no stream of this codec, is truncated, has bytes after its end, or has another size
                when decoded.
        """
        decoded = self._decode(data, size)
        if len(decoded) != size:
            found = "more" if len(decoded) > size else f"{len(decoded):,}"
            raise CodecError(f"codec {self.name}: expected {size:,} decoded bytes, found {found}: the data are damaged")
        return decoded

    def decode_up_to(self, data: bytes | memoryview, limit: int) -> bytes | memoryview:
        """Decode a stream of unknown size. If it has more than `limit` bytes, the result may end after limit + 1 bytes.

        Raises the errors of `decode`.
        """
        return self._decode(data, limit)


def byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    """Reorder the bytes of numbers that have `stride` bytes each (1 to 255): first all bytes 0, then all bytes 1, ….

    The result is `BSHF`, the stride as one byte, data[0::stride], data[1::stride], …, which is 5 bytes more than
    `data`. The last number may be incomplete.

    Raises:
        ValueError: `stride` is out of range.

    Source: #1471.
    """
    if not 1 <= stride <= 255:
        raise ValueError(f"stride: expected 1 to 255, got {stride}")
    return b"".join([SHUFFLE_MAGIC, bytes([stride]), *(data[i::stride] for i in range(stride))])


def byte_unshuffle(data: bytes | memoryview) -> bytes:
    """Undo `byte_shuffle`.

    Raises:
        CodecError: `data` does not begin with a shuffle header.
    """
    stride = data[4] if len(data) >= SHUFFLE_HEADER_BYTES else 0
    if data[:4] != SHUFFLE_MAGIC or not stride:
        raise CodecError(f"byte shuffle: expected a header BSHF and a stride, found {bytes(data[:5])!r}")
    planes = np.frombuffer(data, np.uint8, offset=SHUFFLE_HEADER_BYTES)
    result = np.empty_like(planes)
    begin = 0
    for i in range(stride):
        end = begin + len(result[i::stride])
        result[i::stride] = planes[begin:end]
        begin = end
    return result.tobytes()


def _library(codec: str, module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingCodec(f"codec {codec}: needs {package}: pip install {package!r}, or set CODEC=lzma") from error


def _brotli() -> ModuleType:
    brotli = _library("brotli", "brotli", "brotli>=1.2")
    # older versions of brotli cannot limit the size of the decoded data
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise MissingCodec(
            f"codec brotli: brotli {brotli.__version__} is too old: pip install --upgrade 'brotli>=1.2', or set CODEC=lzma"
        )
    return brotli


def _brotli_encode(data: bytes) -> bytes:
    packed: bytes = _brotli().compress(data, quality=_BROTLI_QUALITY)
    return packed


def _brotli_decode(data: bytes, size: int) -> bytes:
    brotli = _brotli()
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    total, rest = 0, data
    try:
        while total <= size:
            parts.append(decoder.process(rest, output_buffer_limit=size + 1 - total))
            total += len(parts[-1])
            rest = b""
            if decoder.is_finished() or decoder.can_accept_more_data():
                break
    except brotli.error as error:
        raise CodecError(f"codec brotli: not a brotli stream, or a damaged one ({error})") from error
    if total <= size and not decoder.is_finished():
        raise CodecError(f"codec brotli: the stream ends early, after {total:,} decoded bytes")
    return b"".join(parts)


def _zstd_encode(data: bytes) -> bytes:
    packed: bytes = _library("zstd", "zstandard", "zstandard").ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
    return packed


def _zstd_decode(data: bytes, size: int) -> bytes:
    zstandard = _library("zstd", "zstandard", "zstandard")
    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    try:
        # check the size that the frame states, because the library allocates so much memory. It decodes no more bytes.
        promised = zstandard.frame_content_size(data)
        if not 0 <= promised <= size:
            raise CodecError(f"codec zstd: expected a frame of {size:,} decoded bytes at most, found {promised:,}")
        unpacked: bytes = decoder.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"codec zstd: not a zstd frame, or a damaged one ({error})") from error
    return unpacked


def _lzma_encode(data: bytes) -> bytes:
    # a dictionary larger than the data saves no bytes, and the encoder needs ten times the dictionary's size in memory
    dictionary = min(max(len(data), _LZMA_LEAST_DICTIONARY), _LZMA_LARGEST_DICTIONARY)
    chain = [{"id": lzma.FILTER_LZMA2, "preset": _LZMA_PRESET, "dict_size": dictionary}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=chain)


def _lzma_decode(data: bytes, size: int) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_MEMORY_BYTES)
    return _decompress("lzma", "an xz stream", decoder, lzma.LZMAError, data, size)


def _decompress(codec: str, kind: str, decoder: Any, failure: type[Exception], data: bytes, size: int) -> bytes:
    try:
        decoded: bytes = decoder.decompress(data, size + 1)
    except failure as error:
        raise CodecError(f"codec {codec}: not {kind}, or a damaged one ({error})") from error
    # the caller refuses a result that is longer than `size`
    if len(decoded) <= size:
        if not decoder.eof:
            raise CodecError(f"codec {codec}: the stream ends early")
        if decoder.unused_data:
            raise CodecError(f"codec {codec}: {counted(len(decoder.unused_data), 'byte')} after the stream's end")
    return decoded


def _zlib_encode(data: bytes) -> bytes:
    return zlib.compress(data, 9)


def _zlib_decode(data: bytes, size: int) -> bytes:
    return _decompress("zlib", "a zlib stream", zlib.decompressobj(), zlib.error, data, size)


# function → condition under which a packed script contains the module that the function imports
IMPORTED_IF = {"_ans_encode": "config.codec == 'ans'", "_ans_decode": "config.codec == 'ans'"}


def _ans_encode(data: bytes, shape: tuple[int, int] | None = None) -> bytes:
    from train.artifact.ans import ans_encode

    return ans_encode(data, shape)


def _ans_decode(data: bytes, size: int) -> bytes:
    from train.artifact.ans import ans_decode

    return ans_decode(data, size)


def _raw_decode(data: bytes | memoryview, size: int) -> bytes | memoryview:
    return data


def _raw6_encode(data: bytes) -> bytes:
    codes = np.frombuffer(data, np.int8)
    if len(codes) and not -32 <= int(codes.min()) <= int(codes.max()) <= 31:
        raise CodecError(
            f"codec raw6: expected codes in -32..31, found {codes.min()}..{codes.max()}: choose another codec"
        )
    return int6_pack(torch.from_numpy(codes.copy())).numpy().tobytes()


def _raw6_decode(data: bytes, size: int) -> bytes:
    expected = (6 * size + 7) // 8
    if len(data) != expected:
        raise CodecError(f"codec raw6: {size:,} codes take {expected:,} bytes, found {len(data):,}")
    packed = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return int6_unpack(packed, size).numpy().tobytes()


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("brotli", 8, _brotli_encode, _brotli_decode),
        Codec("zstd", 8, _zstd_encode, _zstd_decode),
        Codec("lzma", 8, _lzma_encode, _lzma_decode),
        Codec("zlib", 8, _zlib_encode, _zlib_decode),
        Codec("ans", 8, _ans_encode, _ans_decode, shaped=True),
        Codec("raw", 8, bytes, _raw_decode),
        Codec("raw6", 6, _raw6_encode, _raw6_decode),
    )
}
"""All codecs by name. The names are the values of the setting `codec`."""

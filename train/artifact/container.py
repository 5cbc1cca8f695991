"""The bytes of an artifact: a preamble, a compressed JSON header, and sections. Checksums cover every byte.

All numbers are little-endian. There is no alignment and no padding.

    offset   bytes  content
    0        8      magic 89 47 4F 4C 46 0D 0A 1A ("\\x89GOLF\\r\\n\\x1a"; a transfer as text would change it)
    8        2      uint16  version of the format from offset 22 on, now 1. All versions have the same preamble.
    10       4      uint32  H, bytes of the header in the file
    14       4      uint32  J, bytes of the header's JSON, at most 2^24
    18       4      uint32  CRC-32 (that of zlib and PNG) of bytes 0..17 followed by the H bytes of the header
    22       H      the header: a zlib stream (RFC 1950) of J bytes of UTF-8 JSON
    22 + H   …      section 0, section 1, … in the header's order

The JSON is one object:

    {"config": {field: value, …},
     "sections": [[group, type, codec, stride, unpacked, packed, crc], …],
     "tensors": [[name, [dimension, …], section, scales], …]}

config     the fields of `train.config.Config` that determine what the model computes
           (`train.artifact.storage.MODEL_FIELDS`), and two removed settings. Tuples are written as lists. A missing
           field has its default.
sections   group: the tensor group, for display. type: "int2" … "int8" (one signed byte per code, for any number of
           bits), "float16", "bfloat16" or "float32". codec: a name in `train.artifact.codecs.CODECS`: "brotli" (RFC
           7932), "zstd" (RFC 8878, one frame that states its content size), "lzma" (.xz, one stream), "zlib" (RFC
           1950), "ans" (see `train.artifact.ans`), "raw" (the bytes themselves) or "raw6" (a stream of 6-bit codes,
           lowest bit first). Sections of one file may have different codecs. stride: 0, or the n of the byte shuffle
           that was applied before the codec: 5 bytes (`BSHF`, n), then bytes 0, n, 2n, …, then 1, n+1, …, and so on.
           unpacked: size in bytes before shuffle and codec. packed: size in the file. crc: CRC-32 of the packed bytes.
tensors    name and shape of a parameter, up to 4 dimensions. section: index of the section that holds the tensor's
           values. The tensors fill a section in the order of this list, row by row, without gaps. scales: for codes the
           index of the float16 section that holds one scale per row, filled in the same order; null for floats. A
           weight is its code times its row's scale, in float32.

To read a file: check magic, CRC and version. Inflate the header. Check that the packed sizes of the sections add up to
the size of the file, and that the unpacked size of each section is the size of its tensors. Check the CRC of each
section before decoding it. The reader executes and unpickles nothing. It maps the file into memory and allocates memory
only for decoded sections.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from train.artifact.codecs import CODECS, SHUFFLE_HEADER_BYTES, byte_unshuffle
from train.common.errors import CodecError, MissingCodec, UserError

MAGIC = b"\x89GOLF\r\n\x1a"
VERSION = 1
PREAMBLE_BYTES = 22
MAX_HEADER_BYTES = 1 << 24
# far more than a model needs; a file larger than 4 MiB may take 32 times its size
MAX_UNPACKED_BYTES = 1 << 27
MAX_TENSORS = 1 << 14
MAX_DIMENSIONS = 4

_AGAIN = "the file is damaged: copy it again, or write it anew with python -m train"

_FIELDS = struct.Struct("<8sHII")
_CRC = struct.Struct("<I")

ITEM_BYTES = {**{f"int{bits}": 1 for bits in range(2, 9)}, "float16": 2, "bfloat16": 2, "float32": 4}
"""Section type → bytes per value before the codec."""


class ArtifactError(UserError):
    """A file is not an artifact, is damaged, or has another version of the format."""


@dataclass(frozen=True)
class Section:
    """The entry for one section in the header. The module's docstring explains the fields."""

    group: str
    type: str
    codec: str
    stride: int
    unpacked_bytes: int
    packed_bytes: int
    crc32: int

    @property
    def elements(self) -> int:
        return self.unpacked_bytes // ITEM_BYTES[self.type]


@dataclass(frozen=True)
class TensorEntry:
    """The entry for one tensor in the header. The module's docstring explains the fields."""

    name: str
    shape: tuple[int, ...]
    section: int
    scales: int | None

    @property
    def elements(self) -> int:
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count


@dataclass(frozen=True)
class Header:
    """The header of an artifact. The module's docstring explains the three tables."""

    config: dict[str, Any]
    sections: list[Section]
    tensors: list[TensorEntry]


class Packed(NamedTuple):
    """An encoded artifact."""

    data: bytes
    header_bytes: int  # size of preamble and header in the file
    json_bytes: int  # size of the header's JSON, uncompressed


class Unpacked(NamedTuple):
    """A decoded artifact."""

    header: Header
    contents: list[bytes | memoryview]  # decoded bytes of each section
    header_bytes: int  # size of preamble and header in the file
    json_bytes: int  # size of the header's JSON, uncompressed


def pack(header: Header, payloads: list[bytes]) -> Packed:
    """Encode an artifact from its header and `payloads`, the packed sections in the header's order."""
    table = {
        "config": header.config,
        "sections": [list(astuple(section)) for section in header.sections],
        "tensors": [[entry.name, list(entry.shape), entry.section, entry.scales] for entry in header.tensors],
    }
    text = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    packed = zlib.compress(text, 9)
    fields = _FIELDS.pack(MAGIC, VERSION, len(packed), len(text))
    crc = zlib.crc32(packed, zlib.crc32(fields))
    data = b"".join([fields, _CRC.pack(crc), packed, *payloads])
    return Packed(data, PREAMBLE_BYTES + len(packed), len(text))


def unpack(path: Path) -> Unpacked:
    """Read the header and sections of an artifact. Decode and unshuffle the sections.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or inconsistent, has another version, or is no artifact.
            The message names the file and the damaged section or entry, and says what was expected and what to do.
        MissingCodec: the package of a section's codec is not installed.
    """
    data = _map(path)
    header, begin, json_bytes = _unpack_header(path, data)
    header_bytes = begin
    limit = max(MAX_UNPACKED_BYTES, 32 * len(data))
    if sum(section.unpacked_bytes for section in header.sections) > limit:
        _damaged(path, "header", f"at most {limit:,} bytes of tensors in a file of {len(data):,}", "more")
    _check_length(path, header, begin, len(data))
    contents = []
    for index, section in enumerate(header.sections):
        packed = data[begin : begin + section.packed_bytes]
        begin += section.packed_bytes
        found = zlib.crc32(packed)
        if found != section.crc32:
            _damaged(path, _name(index, section), f"checksum {section.crc32:08x}", f"{found:08x}")
        contents.append(_decode(path, index, section, packed))
    return Unpacked(header, contents, header_bytes, json_bytes)


def _map(path: Path) -> memoryview:
    try:
        # refuse a pipe: opening it would wait for its writer
        if path.is_fifo():
            raise ArtifactError(f"{path}: a pipe, not an artifact: give the file, model.golf")
        with open(path, "rb") as file:
            # check the magic before reading a large file
            start = file.read(PREAMBLE_BYTES)
            if start[: len(MAGIC)] != MAGIC:
                raise ArtifactError(
                    f"{path}: not an artifact: expected it to begin with {MAGIC.hex(' ')}, found "
                    f"{start[: len(MAGIC)].hex(' ') or 'nothing'}: give a model.golf that python -m train wrote"
                )
            # the file stays mapped until the last view of the mapping is freed
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file: give a model.golf that python -m train wrote") from error
    except IsADirectoryError as error:
        raise ArtifactError(f"{path}: a folder, not an artifact: give the file in it, model.golf") from error


def _unpack_header(path: Path, data: memoryview) -> tuple[Header, int, int]:
    if len(data) < PREAMBLE_BYTES:
        _damaged(path, "preamble", f"{PREAMBLE_BYTES} bytes", f"{len(data)}")
    _, version, packed_bytes, text_bytes = _FIELDS.unpack_from(data)
    packed = data[PREAMBLE_BYTES : PREAMBLE_BYTES + packed_bytes]
    if len(packed) < packed_bytes:
        _damaged(path, "header", f"{packed_bytes:,} bytes", f"{len(packed):,}")
    (expected,) = _CRC.unpack_from(data, _FIELDS.size)
    found = zlib.crc32(packed, zlib.crc32(data[: _FIELDS.size]))
    if found != expected:
        _damaged(path, "preamble and header", f"checksum {expected:08x}", f"{found:08x}")
    if version != VERSION:
        raise ArtifactError(
            f"{path}: preamble: expected version {VERSION}, found {version}: read it with the golf_kernels that wrote it, "
            "or a newer one"
        )
    if text_bytes > MAX_HEADER_BYTES:
        _damaged(path, "header", f"at most {MAX_HEADER_BYTES:,} bytes", f"{text_bytes:,}")
    try:
        table = json.loads(bytes(CODECS["zlib"].decode(packed, text_bytes)))
    except (CodecError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: header: expected JSON in a zlib stream, found another ({error}): {_AGAIN}"
        ) from error
    return _parse(path, table), PREAMBLE_BYTES + packed_bytes, text_bytes


def _parse(path: Path, table: Any) -> Header:
    try:
        header = Header(
            dict(table["config"]),
            [Section(*row) for row in table["sections"]],
            [TensorEntry(name, tuple(shape), section, scales) for name, shape, section, scales in table["tensors"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: header: expected config, sections and tensors, found other JSON ({error})"
        ) from error
    if max(len(header.sections), len(header.tensors)) > MAX_TENSORS:
        _damaged(path, "header", f"at most {MAX_TENSORS:,} tensors", f"{len(header.tensors):,}")
    for index, section in enumerate(header.sections):
        _check_section(path, index, section)
    filled = [0] * len(header.sections)
    for entry in header.tensors:
        _check_entry(path, header.sections, entry)
        filled[entry.section] += entry.elements
        if entry.scales is not None:
            filled[entry.scales] += entry.shape[0]
    for index, section in enumerate(header.sections):
        if filled[index] * ITEM_BYTES[section.type] != section.unpacked_bytes:
            _damaged(
                path,
                _name(index, section),
                f"{filled[index] * ITEM_BYTES[section.type]:,} bytes for its tensors",
                f"{section.unpacked_bytes:,}",
            )
    if len({entry.name for entry in header.tensors}) != len(header.tensors):
        _damaged(path, "header", "each tensor once", "a name twice")
    return header


def _check_section(path: Path, index: int, section: Section) -> None:
    where = f"section {index}"
    texts = (section.group, section.type, section.codec)
    named = isinstance(section.group, str) and section.group.isprintable()
    numbers = (section.stride, section.unpacked_bytes, section.packed_bytes, section.crc32)
    sound = named and all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    if not sound or min(numbers) < 0:
        _damaged(path, where, "three names and four whole numbers", ascii(astuple(section))[:200])
    if section.type not in ITEM_BYTES or section.stride > 255:
        _damaged(path, where, f"one of {', '.join(ITEM_BYTES)} and a stride up to 255", repr(astuple(section)))
    if section.codec not in CODECS:
        raise ArtifactError(
            f"{path}: {where}: expected a codec among {', '.join(CODECS)}, found {section.codec!r}: read it with a newer "
            "golf_kernels"
        )


def _check_entry(path: Path, sections: list[Section], entry: TensorEntry) -> None:
    where = f"tensor {ascii(entry.name)[:200]}"
    named = isinstance(entry.name, str) and entry.name.isprintable()
    indices = [entry.section] if entry.scales is None else [entry.section, entry.scales]
    sizes = all(type(size) is int and 0 <= size < 1 << 32 for size in entry.shape)
    if not named or not sizes or len(entry.shape) > MAX_DIMENSIONS:
        _damaged(path, where, "a name and a shape", ascii(astuple(entry))[:200])
    if not all(type(index) is int and 0 <= index < len(sections) for index in indices):
        _damaged(path, where, f"sections 0 to {len(sections) - 1}", repr(indices))
    coded = sections[entry.section].type.startswith("int")
    if coded != (entry.scales is not None):
        _damaged(path, where, "scales for codes and none for floats", repr(astuple(entry)))
    if entry.scales is not None and (sections[entry.scales].type != "float16" or len(entry.shape) != 2):
        _damaged(path, where, "a matrix with float16 scales", repr(astuple(entry)))


def _check_length(path: Path, header: Header, begin: int, length: int) -> None:
    end = begin
    for index, section in enumerate(header.sections):
        end += section.packed_bytes
        if end > length:
            _damaged(
                path, _name(index, section), f"the section to end at byte {end:,}", f"the file's end at {length:,}"
            )
    if end != length:
        _damaged(path, "end of file", f"{end:,} bytes", f"{length:,}")


def _decode(path: Path, index: int, section: Section, packed: memoryview) -> bytes | memoryview:
    header_bytes = SHUFFLE_HEADER_BYTES if section.stride else 0
    try:
        content = CODECS[section.codec].decode(packed, section.unpacked_bytes + header_bytes)
        return byte_unshuffle(content) if section.stride else content
    except MissingCodec as error:
        raise MissingCodec(f"{path}: {_name(index, section)}: {error}") from error
    except CodecError as error:
        raise ArtifactError(f"{path}: {_name(index, section)}: {error}: {_AGAIN}") from error


def _name(index: int, section: Section) -> str:
    return f"section {index} ({section.group}, {section.type})"


def _damaged(path: Path, where: str, expected: str, found: str) -> NoReturn:
    raise ArtifactError(f"{path}: {where}: expected {expected}, found {found}: {_AGAIN}")

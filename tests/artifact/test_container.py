"""The container: every byte is checked, and what is wrong with a file is said by part."""

import json
import lzma
import math
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from ans_reader import SecondReader
from artifact_example import ROOMY, quantized, tiny

from train.artifact.container import MAGIC, PREAMBLE_BYTES, ArtifactError
from train.artifact.storage import read_artifact, write_artifact
from train.config import Config
from train.quantize.tensors import QuantizedTensor, StoredTensors, dequantize_state


def arrays(rows: int, columns: int, bits: int, generator: torch.Generator) -> QuantizedTensor:
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.randn(rows, generator=generator).half()
    return QuantizedTensor(codes, scales, bits)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.golf"
    small_file(path)
    return path


def small_file(path: Path, codec: str = "brotli") -> bytes:
    """An artifact of a few hundred bytes with every kind of section in it."""
    generator = torch.Generator().manual_seed(0)
    stored: StoredTensors = {
        "blocks.0.w": arrays(8, 40, 6, generator),
        "e": arrays(4, 9, 8, generator),
        "s": torch.ones(300),
        "h": torch.ones(9).half(),
    }
    write_artifact(path, stored, Config(codec=codec), **ROOMY)
    return path.read_bytes()


def second_reader(data: bytes) -> dict[str, np.ndarray]:
    """A reader written from the format's description alone."""
    magic, version, packed, size = struct.unpack_from("<8sHII", data)
    (crc,) = struct.unpack_from("<I", data, 18)
    header = data[22 : 22 + packed]
    assert (magic, version) == (b"\x89GOLF\r\n\x1a", 1)
    assert zlib.crc32(data[:18] + header) == crc
    text = zlib.decompress(header)
    assert len(text) == size
    table, position, contents = json.loads(text), 22 + packed, []
    for _, kind, codec, stride, unpacked, length, section_crc in table["sections"]:
        payload, position = data[position : position + length], position + length
        assert zlib.crc32(payload) == section_crc
        decode = {"brotli": brotli.decompress, "lzma": lzma.decompress, "raw": bytes}
        # a stream of the entropy coder says only how its bytes are distributed, not how many there are
        content = SecondReader(payload, unpacked).content if codec == "ans" else decode[codec](payload)
        if stride:
            assert content[:5] == b"BSHF" + bytes([stride])
            body, content = content[5:], bytearray(len(content) - 5)
            for i in range(stride):
                count = len(content[i::stride])
                content[i::stride], body = body[:count], body[count:]
        assert len(content) == unpacked
        contents.append(np.frombuffer(content, {"i": "<i1", "f": "<f2"}[kind[0]]))
    assert position == len(data)
    used = [0] * len(contents)

    def take(index: int, count: int) -> np.ndarray:
        used[index] += count
        return contents[index][used[index] - count : used[index]]

    tensors = {}
    for name, shape, section, scales in table["tensors"]:
        values = take(section, int(np.prod(shape))).reshape(shape).astype(np.float32)
        if scales is not None:
            values *= take(scales, shape[0]).astype(np.float32)[:, None]
        tensors[name] = values
    return tensors


@pytest.mark.parametrize("codec", ["brotli", "ans"])
def test_a_second_implementation_reads_the_format_from_its_description(tmp_path: Path, codec: str) -> None:
    tensors = quantized(tiny())
    write_artifact(tmp_path / "a", tensors, tiny(codec=codec), **ROOMY)
    found, expected = second_reader((tmp_path / "a").read_bytes()), dequantize_state(tensors)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize("codec", ["brotli", "ans"])
def test_every_flipped_byte_is_detected(tmp_path: Path, codec: str) -> None:
    data = small_file(tmp_path / "good", codec)
    path = tmp_path / "bad"
    generator = np.random.default_rng(0)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=str(path)):
            read_artifact(path)


@pytest.mark.parametrize("codec", ["brotli", "ans"])
def test_every_truncation_and_any_addition_is_detected(tmp_path: Path, codec: str) -> None:
    data = small_file(tmp_path / "good", codec)
    path = tmp_path / "bad"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=str(path)):
            read_artifact(path)
    for more in (b"\0", b"\n", data):
        path.write_bytes(data + more)
        with pytest.raises(
            ArtifactError, match=rf"end of file: expected {len(data):,} bytes, found {len(data + more):,}"
        ):
            read_artifact(path)


def test_truncation_at_each_boundary_names_the_part_that_is_missing(tmp_path: Path, file: Path) -> None:
    data, info = file.read_bytes(), read_artifact(file).info
    path = tmp_path / "bad"

    def message(length: int) -> str:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError) as caught:
            read_artifact(path)
        return str(caught.value)

    assert "not an artifact" in message(0)
    assert "preamble: expected 22 bytes, found 21" in message(PREAMBLE_BYTES - 1)
    assert "header: expected" in message(PREAMBLE_BYTES)
    end = info.header_bytes
    for index, section in enumerate(info.sections):
        text = message(end)
        assert f"section {index} ({section.group}, {section.type}): expected the section to end at byte" in text
        assert f"the file's end at {end:,}: the file is damaged: copy it again" in text
        end += section.packed_bytes
    assert end == len(data)


def rewritten(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The artifact with another header, under a good checksum: what a hostile writer could make."""
    packed, _ = struct.unpack_from("<II", data, 10)
    table = json.loads(zlib.decompress(data[22 : 22 + packed]))
    change(table)
    text = json.dumps(table).encode()
    header = zlib.compress(text)
    fields = struct.pack("<8sHII", MAGIC, 1, len(header), len(text))
    return fields + struct.pack("<I", zlib.crc32(header, zlib.crc32(fields))) + header + data[22 + packed :]


def test_a_field_younger_than_the_file_has_its_default(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "old.golf"
    path.write_bytes(rewritten(file.read_bytes(), lambda t: t["config"].pop("skip_gates")))
    assert read_artifact(path).config.skip_gates == Config().skip_gates


def test_the_header_keeps_the_fields_that_are_settings_no_more(file: Path) -> None:
    held: dict[str, Any] = {}
    rewritten(file.read_bytes(), lambda table: held.update(table["config"]))
    # torch.finfo(torch.float32).eps, as every artifact has had it
    assert (held["norm_eps"], held["unet_skips"]) == (1.1920928955078125e-07, True)


def corrupted(table: dict[str, Any], part: str, row: int, column: int, value: Any) -> None:
    table[part][row][column] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("config"), "header: expected config, sections and tensors"),
        (lambda t: t.pop("tensors"), "header: expected config, sections and tensors"),
        (lambda t: t["sections"][0].pop(), "header: expected config, sections and tensors"),
        (lambda t: t["config"].update(num_layers="three"), "config: .*num_layers"),
        (lambda t: t["config"].update(new_field=1), "config: .*new_field: not expected"),
        (lambda t: t["config"].update(model_dim=17), "config: .*model_dim 17"),
        (lambda t: t["config"].update(norm_eps=1e-6), "config: .*norm_eps=1e-06: norm_eps was removed in 0.2.0"),
        (lambda t: corrupted(t, "sections", 0, 1, "int9"), "section 0: expected one of int2"),
        (lambda t: corrupted(t, "sections", 0, 2, "pickle"), "section 0: expected a codec among .*'pickle'"),
        (lambda t: corrupted(t, "sections", 0, 4, 1 << 60), "expected .* bytes for its tensors"),
        (lambda t: corrupted(t, "sections", 0, 2, []), "section 0: expected three names and four whole numbers"),
        (lambda t: corrupted(t, "sections", 0, 5, -1), "section 0: expected three names and four whole numbers"),
        (lambda t: corrupted(t, "sections", 0, 5, True), "section 0: expected three names and four whole numbers"),
        (lambda t: corrupted(t, "tensors", 0, 1, [1 << 20, 1 << 20]), "expected .* bytes for its tensors"),
        (lambda t: corrupted(t, "tensors", 0, 1, [1 << 40, 0]), "expected a name and a shape"),
        (lambda t: corrupted(t, "tensors", 0, 1, [1] * 100_000), "expected a name and a shape"),
        (lambda t: corrupted(t, "tensors", 0, 1, [-1, 2]), "expected a name and a shape"),
        (lambda t: corrupted(t, "tensors", 0, 1, 7), "header: expected config, sections and tensors"),
        (lambda t: corrupted(t, "tensors", 0, 2, 99), "expected sections 0 to"),
        (lambda t: corrupted(t, "tensors", 0, 3, None), "expected scales for codes"),
        (lambda t: corrupted(t, "tensors", 0, 3, 0), "expected a matrix with float16 scales"),
        (lambda t: corrupted(t, "tensors", 1, 0, t["tensors"][0][0]), "expected each tensor once"),
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves_are_refused(
    tmp_path: Path, file: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "bad.golf"
    path.write_bytes(rewritten(file.read_bytes(), change))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(path)
    assert str(path) in str(caught.value)


def test_a_header_bomb_and_a_section_bomb_do_not_go_off(tmp_path: Path, file: Path) -> None:
    path, data = tmp_path / "bad.golf", file.read_bytes()
    header = zlib.compress(bytes(20_000_000))
    for promised, message in (
        (20_000_000, "header: expected at most 16,777,216 bytes"),
        (1000, "header: expected JSON"),
    ):
        fields = struct.pack("<8sHII", MAGIC, 1, len(header), promised)
        path.write_bytes(fields + struct.pack("<I", zlib.crc32(header, zlib.crc32(fields))) + header)
        with pytest.raises(ArtifactError, match=message):
            read_artifact(path)

    def huge(table: dict[str, Any]) -> None:
        table["sections"] = [["g", "float32", "raw", 0, 1 << 40, 0, 0]]
        table["tensors"] = [["x", [1 << 19, 1 << 19], 0, None]]

    path.write_bytes(rewritten(data, huge))
    with pytest.raises(ArtifactError, match="header: expected at most 134,217,728 bytes of tensors"):
        read_artifact(path)


@pytest.mark.parametrize("unpacked", [1 << 28, 1 << 30, 1 << 32])
def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path, file: Path, unpacked: int) -> None:
    def claim(table: dict[str, Any]) -> None:
        section, name = len(table["sections"]), "claim"
        table["sections"].append(["claim", "float32", "brotli", 0, unpacked, 0, 0])
        table["tensors"].append([name, [unpacked // 4], section, None])

    target = tmp_path / "claim.golf"
    target.write_bytes(rewritten(file.read_bytes(), claim))
    with pytest.raises(ArtifactError, match="expected at most 134,217,728 bytes of tensors in a file of"):
        read_artifact(target)


def test_a_header_cannot_list_tensors_for_minutes(tmp_path: Path, file: Path) -> None:
    target = tmp_path / "many.golf"
    many = [[f"t{i}", [0], 0, None] for i in range(20_000)]
    target.write_bytes(rewritten(file.read_bytes(), lambda table: table["tensors"].extend(many)))
    with pytest.raises(ArtifactError, match="expected at most 16,384 tensors, found 20,0"):
        read_artifact(target)


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\ud800", "a\nb", "\u202ea"])
@pytest.mark.parametrize("part", ["tensors", "sections"])
def test_a_name_that_is_not_text_is_refused(tmp_path: Path, file: Path, name: str, part: str) -> None:
    target = tmp_path / "name.golf"
    target.write_bytes(rewritten(file.read_bytes(), lambda table: corrupted(table, part, 0, 0, name)))
    with pytest.raises(ArtifactError, match=r"expected .*name") as refused:
        read_artifact(target)
    assert str(refused.value).isprintable()


def test_the_file_is_mapped_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "raw.golf"
    write_artifact(path, {"w": torch.randn(1000, 1000)}, Config(codec="raw"), **ROOMY)
    tracemalloc.start()
    try:
        read_artifact(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the tensor itself, and little beside it
    assert 4_000_000 <= peak < 4_500_000


def test_codes_outside_their_bits_are_refused_when_read(tmp_path: Path) -> None:
    codes = torch.full((2, 3), 100, dtype=torch.int8)
    write_artifact(tmp_path / "a", {"w": QuantizedTensor(codes, torch.ones(2).half(), 8)}, Config(), **ROOMY)
    path = tmp_path / "bad"
    path.write_bytes(rewritten((tmp_path / "a").read_bytes(), lambda t: corrupted(t, "sections", 0, 1, "int6")))
    with pytest.raises(ArtifactError, match=r"tensor w: expected codes in -32\.\.31 for int6, found 100\.\.100"):
        read_artifact(path)


def test_newer_versions_and_foreign_files_are_refused(tmp_path: Path, file: Path) -> None:
    data, path = file.read_bytes(), tmp_path / "bad"
    packed, size = struct.unpack_from("<II", data, 10)
    fields = struct.pack("<8sHII", MAGIC, 2, packed, size)
    crc = struct.pack("<I", zlib.crc32(data[22 : 22 + packed], zlib.crc32(fields)))
    path.write_bytes(fields + crc + data[22:])
    with pytest.raises(
        ArtifactError, match="preamble: expected version 1, found 2: read it with the golf_kernels that wrote it"
    ):
        read_artifact(path)
    for foreign in (b"", b"PK\x03\x04 torch.save", data.replace(b"\r\n", b"\n")):
        path.write_bytes(foreign)
        with pytest.raises(
            ArtifactError, match="not an artifact: expected it to begin with 89 47 4f 4c 46 0d 0a 1a, found"
        ):
            read_artifact(path)
    with pytest.raises(ArtifactError, match=r"none\.golf: no such file"):
        read_artifact(tmp_path / "none.golf")
    with pytest.raises(ArtifactError, match="a folder, not an artifact"):
        read_artifact(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe: a pipe, not an artifact"):
        read_artifact(tmp_path / "pipe")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    path, bad = tmp_path / "bad", torch.ones(300)
    bad[5] = value
    with monkeypatch.context() as hostile:
        hostile.setattr("train.artifact.storage._need_finite", lambda *_: None)
        write_artifact(path, {"norm": bad}, Config(), **ROOMY)
    with pytest.raises(ArtifactError, match="bad: tensor norm: 1 of 300 values are NaN or infinite"):
        read_artifact(path)

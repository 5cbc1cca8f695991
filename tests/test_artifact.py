"""The artifact: bit-exact round trips, every byte checked, the cap kept, and the command line."""

import ast
import json
import lzma
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_artifact_ans import SecondReader
from torch import Tensor

from train.artifact import (
    MODEL_FIELDS,
    ArtifactError,
    BudgetError,
    load_model,
    read_artifact,
    write_artifact,
)
from train.artifact.__main__ import main
from train.artifact.codecs import CODECS
from train.config import Config
from train.errors import MissingCodec, UserError
from train.model.gpt import GPT
from train.quantize.tensors import QuantizedTensor, StoredTensors, dequantize_state, quantize_model

ROOT = Path(__file__).resolve().parents[1]
ROOMY = {"code_bytes": 0, "max_bytes": 10**9}


def tiny(**changes: Any) -> Config:
    shape: dict[str, Any] = {
        "vocab_size": 260, "num_layers": 3, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_slope": 0.5,
        "train_seq_len": 8, "train_batch_tokens": 64, "ve_dim": 4, "ve_layers": (1, 2), "skip_gates": True,
        "recur_layers": (1,), "quantizer": "rtn", "passthrough_max_elements": 100, "scale_floor": "none",
        "compute_dtype": "float32",
    }  # fmt: skip
    return Config(**(shape | changes))


def quantized(config: Config, seed: int = 0) -> StoredTensors:
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    return quantize_model(model, config, {})


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny()


@pytest.fixture(scope="module")
def tensors(config: Config) -> StoredTensors:
    return quantized(config)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, config: Config, tensors: StoredTensors) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.golf"
    write_artifact(path, tensors, config, **ROOMY)
    return path


def assert_same(found: StoredTensors, expected: StoredTensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor), name
        if isinstance(tensor, QuantizedTensor):
            assert found[name].bits == tensor.bits
            assert torch.equal(found[name].codes, tensor.codes), name
            assert torch.equal(found[name].scales.view(torch.int16), tensor.scales.view(torch.int16)), name
        else:
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            # by their bits, since −0 equals 0
            assert (
                found[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
                if (tensor.dtype != torch.bfloat16)
                else torch.equal(found[name].view(torch.int16), tensor.view(torch.int16))
            )


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_tensors_and_fields_come_back_bit_for_bit(
    tmp_path: Path, config: Config, tensors: StoredTensors, codec: str
) -> None:
    path = tmp_path / "model.golf"
    info = write_artifact(path, tensors, config.replace(codec=codec), **ROOMY)
    artifact = read_artifact(path)
    assert_same(artifact.tensors, tensors)
    assert {name: getattr(artifact.config, name) for name in MODEL_FIELDS} == {
        name: getattr(config, name) for name in MODEL_FIELDS
    }
    assert artifact.info == info
    assert info.model_bytes == path.stat().st_size == sum(row.packed_bytes for row in info.rows())
    used = {section.codec for section in info.sections if section.type == "int6"}
    assert used == {codec}


def arrays(rows: int, columns: int, bits: int, pattern: str, generator: torch.Generator) -> QuantizedTensor:
    """A matrix of codes that is random, or of a kind that a coder could stumble over."""
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
    if pattern == "lowest":
        codes.fill_(-limit)
    elif pattern == "ends":
        codes = torch.where(codes < 0, -limit, limit - 1).to(torch.int8)
    elif pattern == "copies":
        codes[rows // 2 :] = codes[:1]
    elif pattern == "stripes":
        codes[:, ::2] //= 2 ** min(bits - 1, 4)
        codes[::3] = 0
    elif pattern == "lonely":
        codes.zero_()
        codes[-1:, -1:] = limit - 1
    return QuantizedTensor(codes, torch.randn(rows, generator=generator).half(), bits)


PATTERNS = ["random", "lowest", "ends", "copies", "stripes", "lonely"]
SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 16, 31, 64, 65])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.tuples(SIZES, SIZES, st.integers(2, 8), st.sampled_from(PATTERNS), st.integers(1, 3)), max_size=4
    ),
    floats=st.lists(
        st.tuples(
            st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=4,
    ),
    codec=st.sampled_from(sorted(CODECS)),
    seed=st.integers(0, 1000),
)
def test_any_tensors_come_back(
    tmp_path: Path,
    parts: list[tuple[int, int, int, str, int]],
    floats: list[tuple[torch.dtype, list[int]]],
    codec: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # tensors that differ in a number alone share a section
    stored: StoredTensors = {
        f"{i}.blocks.{layer}.w": arrays(*part, generator)
        for i, (*part, layers) in enumerate(parts)
        for layer in range(layers)
    }
    stored |= {f"f.{i}": torch.randn(shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(floats)}
    stored |= {
        "zeros": QuantizedTensor(torch.zeros(3, 5, dtype=torch.int8), torch.zeros(3).half(), 6),
        "é": -torch.zeros(2),
    }
    write_artifact(tmp_path / "a", stored, tiny(codec=codec), **ROOMY)
    assert_same(read_artifact(tmp_path / "a").tensors, stored)


def test_a_loaded_model_equals_the_quantized_one_in_memory(file: Path, config: Config, tensors: StoredTensors) -> None:
    model = GPT(config)
    model.load_state_dict(dequantize_state(tensors))
    loaded = load_model(file)
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(load_model(file, config).logits(ids, recurrence=True), model.logits(ids, recurrence=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_draws_no_random_numbers(file: Path) -> None:
    state = torch.get_rng_state()
    load_model(file)
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_other_than_the_models_are_the_callers(file: Path) -> None:
    loaded = load_model(file, Config(compute_dtype="bfloat16", num_layers=9))
    assert loaded.compute_dtype == torch.bfloat16
    assert len(loaded.blocks) == 3


def test_every_setting_that_the_model_reads_is_stored_or_of_no_matter() -> None:
    read = {
        node.attr
        for path in (ROOT / "train/model").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and "config" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))
    }
    derived = {"head_dim", "kv_dim", "mlp_hidden", "replace"}
    initial = {"orthogonal_init", "qk_gain_init", "tied_embed_init_std"}
    callers = {"attention", "compile", "compute_dtype", "device", "qat", "ve_proj_optimizer", "train_seq_len"}
    assert read - derived - initial - callers <= set(MODEL_FIELDS)
    # computed from, not read by name
    assert set(MODEL_FIELDS) - read <= {"num_kv_heads", "mlp_mult"}


def test_the_same_tensors_give_the_same_bytes(
    tmp_path: Path, file: Path, config: Config, tensors: StoredTensors
) -> None:
    write_artifact(tmp_path / "other.golf", tensors, config.replace(run_id="other", seed=2), **ROOMY)
    assert (tmp_path / "other.golf").read_bytes() == file.read_bytes()


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
def test_a_second_implementation_reads_the_format_from_its_description(
    tmp_path: Path, config: Config, tensors: StoredTensors, codec: str
) -> None:
    write_artifact(tmp_path / "a", tensors, config.replace(codec=codec), **ROOMY)
    found, expected = second_reader((tmp_path / "a").read_bytes()), dequantize_state(tensors)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize(("codec", "module"), [("ans", "constriction"), ("zstd", "zstandard")])
def test_a_missing_codec_is_named_with_the_file_and_what_to_install(
    tmp_path: Path, config: Config, tensors: StoredTensors, codec: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.golf"
    write_artifact(path, tensors, config.replace(codec=codec), **ROOMY)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingCodec, match=rf"{path}: section 0 \(.*\): codec {codec}: needs {module}.*: pip install '{module}"
    ):
        read_artifact(path)
    with pytest.raises(MissingCodec, match=f"codec {codec}: needs {module}"):
        write_artifact(tmp_path / "other.golf", tensors, config.replace(codec=codec), **ROOMY)
    assert os.listdir(tmp_path) == ["model.golf"]


def test_tensors_of_another_model_are_refused(tmp_path: Path, config: Config, tensors: StoredTensors) -> None:
    path = tmp_path / "model.golf"
    fewer = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.mlp.up"}
    write_artifact(path, fewer, config, **ROOMY)
    with pytest.raises(ArtifactError, match=r"tensor blocks\.1\.mlp\.up: expected \(32, 16\), found none"):
        load_model(path)
    for huge in ({"num_layers": 1024}, {"model_dim": 2**16}, {"mlp_mult": 1024.0}, {"bigram_vocab_size": 2**24}):
        write_artifact(path, tensors, config.replace(**huge), **ROOMY)
        with pytest.raises(ArtifactError, match=r"expected tensors of .* layers and widths up to .*, found 37 tensors"):
            load_model(path)
    write_artifact(path, tensors, config.replace(mlp_mult=3.0), **ROOMY)
    with pytest.raises(ArtifactError, match=r"tensor blocks\.0\.mlp\.down: expected \(16, 48\), found \(16, 32\)"):
        load_model(path)


def test_what_exceeds_the_cap_is_not_written(
    tmp_path: Path, file: Path, config: Config, tensors: StoredTensors
) -> None:
    size, path = file.stat().st_size, tmp_path / "model.golf"
    write_artifact(path, tensors, config, code_bytes=1000, max_bytes=1000 + size)
    path.unlink()
    with pytest.raises(BudgetError) as caught:
        write_artifact(path, tensors, config, code_bytes=1001, max_bytes=1000 + size)
    assert os.listdir(tmp_path) == []
    text = str(caught.value)
    assert f"code 1,001 + model {size:,} = {size + 1001:,} bytes, expected at most {size + 1000:,}" in text
    assert ": 1 byte over" in text
    rows = read_artifact(file).info.rows()
    for row in rows:
        assert f"{row.group} " in text
        assert f"{row.packed_bytes:,}" in text
    assert f"{max(rows, key=lambda row: row.packed_bytes).group} costs most" in text
    with pytest.raises(BudgetError, match="expected at most 1,000 "):
        write_artifact(path, tensors, config.replace(max_artifact_bytes=1000), code_bytes=0)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, config: Config, tensors: StoredTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.golf"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_artifact(path, tensors, config, **ROOMY)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.golf"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "w: 1 of 2 values are NaN or infinite"),
        (torch.tensor([1.0, float("inf")]).half(), "w: 1 of 2 values are NaN or infinite"),
        (QuantizedTensor(torch.zeros(2, 3).char(), torch.tensor([1, float("inf")]).half(), 6), "w: 1 of 2 values are NaN"),
        (QuantizedTensor(torch.full((2, 3), 32).char(), torch.ones(2).half(), 6), r"w: expected codes in -32\.\.31 for int6, found 32\.\.32"),
        (torch.ones(3).double(), r"w: expected float16, bfloat16, float32, got torch\.float64"),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused_by_name(tmp_path: Path, tensor: Tensor | QuantizedTensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_artifact(tmp_path / "model.golf", {"w": tensor}, tiny(), **ROOMY)
    assert os.listdir(tmp_path) == []


def test_other_bad_arguments_are_refused(tmp_path: Path, tensors: StoredTensors) -> None:
    with pytest.raises(UserError, match="its folder does not exist"):
        write_artifact(tmp_path / "none/model.golf", tensors, tiny(), **ROOMY)
    with pytest.raises(UserError, match=r"codec: expected one of .*brotli.* got 'rar'"):
        write_artifact(tmp_path / "model.golf", tensors, tiny(codec="rar"), **ROOMY)


def test_inspect_and_verify(file: Path, tensors: StoredTensors, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = sum(tensor.shape.numel() for tensor in tensors.values())
    main(["inspect", str(file)])
    text = capsys.readouterr().out
    assert "blocks.*.mlp.up" in text and f"{file.stat().st_size:,}" in text and f"{parameters:,} parameters" in text
    main(["inspect", "--json", str(file)])
    report = json.loads(capsys.readouterr().out)
    assert sum(group["packed_bytes"] for group in report["groups"]) == report["model_bytes"] == file.stat().st_size
    up = next(group for group in report["groups"] if group["group"] == "blocks.*.mlp.up")
    assert (up["type"], up["elements"], up["unpacked_bytes"]) == ("int6", 3 * 32 * 16, 3 * 32 * 16)
    assert up["bits_per_element"] == 8 * up["packed_bytes"] / up["elements"]
    assert report["config"]["num_layers"] == 3
    main(["verify", str(file)])
    assert f"good: {file.stat().st_size:,} bytes" in capsys.readouterr().out
    main(["verify", "--json", str(file)])
    assert json.loads(capsys.readouterr().out)["parameters"] == parameters


def test_the_command_ends_on_a_sentence_and_code_2(tmp_path: Path, file: Path) -> None:
    bad = tmp_path / "bad.golf"
    bad.write_bytes(file.read_bytes()[:-1])
    run = [sys.executable, "-m", "train.artifact", "verify", str(bad)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {bad}: section")
    assert "Traceback" not in done.stderr


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "python -m train.artifact inspect runs/" in capsys.readouterr().out

"""Writing and reading artifacts: bit-exact round trips, one model from the bytes alone, and the cap kept."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch
from artifact_example import ROOMY, assert_same, quantized, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.artifact.budget import BudgetError
from train.artifact.codecs import CODECS
from train.artifact.container import ArtifactError
from train.artifact.storage import MODEL_FIELDS, load_model, read_artifact, write_artifact
from train.common.errors import MissingCodec, UserError
from train.config import Config, field_names
from train.model.gpt import GPT
from train.quantize.tensors import QuantizedTensor, StoredTensors, dequantize_state

ROOT = Path(__file__).resolve().parents[2]


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
    loaded = load_model(file, Config(device="cuda", num_layers=9))
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
    initial = {"orthogonal_init", "qk_gain_init"}
    callers = {"attention", "compile", "device", "loader", "qat", "ve_proj_optimizer", "train_seq_len"}
    read &= set(field_names())
    assert read - initial - callers <= set(MODEL_FIELDS)
    # computed from, not read by name
    assert set(MODEL_FIELDS) - read <= {"num_kv_heads", "mlp_mult"}


def test_the_same_tensors_give_the_same_bytes(
    tmp_path: Path, file: Path, config: Config, tensors: StoredTensors
) -> None:
    write_artifact(tmp_path / "other.golf", tensors, config.replace(run_id="other", seed=2), **ROOMY)
    assert (tmp_path / "other.golf").read_bytes() == file.read_bytes()


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
    assert f"{max(rows, key=lambda row: row.packed_bytes).group} is the largest" in text
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

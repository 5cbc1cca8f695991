"""Published formats: payloads equal the published figures, and a plain reader finds the identical weights."""

import io
import zlib
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
import zstandard
from artifact_example import tiny
from torch import Tensor

from train.artifact import write_artifact
from train.artifact.__main__ import main
from train.artifact.export import PUBLISHED_FORMATS, export, published_name
from train.artifact.storage import read_artifact
from train.common.errors import UserError
from train.config import Config
from train.model.gpt import GPT
from train.quantize.quantize_model import quantize_model
from train.quantize.tensors import QuantizedTensor, StoredTensors, dequantize_state, stored_bits
from train.recipes import load_recipe

BITS_OF_EMBEDDINGS = {"baseline": 16, "pr122": 16, "pr262": 8, "pr1392": 8, "pr1471": 8}


def zeros(config: Config) -> StoredTensors:
    """What a model of this configuration stores, all zero: only the shapes matter."""
    with torch.device("meta"):
        parameters = dict(GPT(config).named_parameters())
    stored: StoredTensors = {}
    for name, parameter in parameters.items():
        bits = stored_bits(name, parameter, config)
        codes, scales = torch.zeros(parameter.shape, dtype=torch.int8), torch.zeros(parameter.shape[:1]).half()
        stored[name] = QuantizedTensor(codes, scales, bits) if bits < 16 else torch.zeros(parameter.shape).half()
    return stored


@pytest.mark.parametrize(
    ("recipe", "changes", "form", "expected"),
    [
        ("baseline", {"matrix_bits": 8}, "baseline", 17_178_912),
        ("baseline", {"matrix_bits": 8, "embed_bits": 16, "mlp_mult": 992 / 512}, "baseline", 17_405_664),
        ("baseline", {"matrix_bits": 8, "num_layers": 10}, "baseline", 19_030_336),
        ("sp2048_normuon", {}, "pr122", 16_384_256),
        ("sp1024_smear_bigram", {}, "pr262", 19_893_378),
        ("sp1024_smear_bigram", {"tied_embed_bits": 16}, "pr262", 20_415_618),
        ("sp4096_recurrence", {}, "pr1392", 34_566_326),
        ("sp8192_sdclip", {}, "pr1471", 37_206_200),
    ],
)
def test_payloads_are_the_published_ones(recipe: str, changes: dict[str, Any], form: str, expected: int) -> None:
    config = load_recipe(recipe).config(**changes)
    exported = export(zeros(config), form)
    assert exported.payload_bytes == expected
    # the archive around the tensors, as the published logs show it
    assert 0 < exported.pickled_bytes - exported.payload_bytes < 1 << 16


def stored(form: str) -> StoredTensors:
    """A small model with every part that has a published name, quantized as the format needs it."""
    config = tiny(
        embed_bits=BITS_OF_EMBEDDINGS[form],
        embed_clip_sigmas=4.0,
        smear_gate="published",
        bigram_vocab_size=40,
        bigram_dim=8,
    )
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    return quantize_model(model, config, {})


def plain_weights(data: bytes, form: str) -> dict[str, Tensor]:
    """The weights in a published file, read as a submission's single script reads them."""
    unpack = {
        "baseline": zlib.decompress,
        "pr122": zstandard.ZstdDecompressor().decompress,
        "pr262": zstandard.ZstdDecompressor().decompress,
        "pr1392": brotli.decompress,
        "pr1471": brotli.decompress,
    }
    content = unpack[form](data)
    if form == "pr1471":
        assert content[:5] == b"BSHF\x02"
        planes = np.frombuffer(content, np.uint8, offset=5)
        even = -(-len(planes) // 2)
        joined = np.empty_like(planes)
        joined[::2], joined[1::2] = planes[:even], planes[even:]
        content = joined.tobytes()
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    weights = {}
    if form in ("baseline", "pr122"):
        tags = {"baseline": "int8_clean_per_row_v1", "pr122": "w6_e16_clean_per_row_v1"}
        assert loaded["__quant_format__"] == tags[form]
        for name, codes in loaded["quantized"].items():
            meta = loaded["qmeta"][name]
            assert (meta["scheme"], meta["axis"], loaded["dtypes"][name]) == ("per_row", 0, "float32")
            if form == "pr122":
                rows, columns = meta["shape"]
                number = int.from_bytes(codes.numpy().tobytes(), "little")
                fields = [number >> 6 * i & 63 for i in range(rows * columns)]
                codes = torch.tensor([f - 64 if f > 31 else f for f in fields]).reshape(rows, columns)
            weights[name] = codes.float() * loaded["scales"][name].float()[:, None]
        for name, tensor in loaded["passthrough"].items():
            assert tensor.dtype == (torch.float16 if name in loaded["passthrough_orig_dtypes"] else torch.float32)
            weights[name] = tensor.float()
        return weights
    for name, kind in loaded["m"].items():
        if kind == "passthrough":
            assert loaded["w"][name].dtype == torch.float16
            weights[name] = loaded["w"][name].float()
        else:
            assert kind["type"] in ("int6", "int8")
            weights[name] = loaded["w"][f"{name}.q"].float() * loaded["w"][f"{name}.scale"].float()[:, None]
    assert set(loaded["w"]) == {
        part
        for name, kind in loaded["m"].items()
        for part in ([name] if kind == "passthrough" else [f"{name}.q", f"{name}.scale"])
    }
    return weights


@pytest.mark.parametrize("form", sorted(PUBLISHED_FORMATS))
def test_an_exported_model_reloads_to_the_identical_weights(tmp_path: Path, form: str) -> None:
    tensors = stored(form)
    file, out = tmp_path / "model.golf", tmp_path / "final_model.ptz"
    write_artifact(file, tensors, tiny(), code_bytes=0, max_bytes=10**9)
    main(["convert", str(file), "--format", form, "--out", str(out)])
    found, expected = plain_weights(out.read_bytes(), form), dequantize_state(read_artifact(file).tensors)
    scales = expected.pop("ve.layer_scales")
    for i, scale in enumerate(scales):
        assert torch.equal(found.pop(f"ve_layer_scales.{i}"), scale.reshape(1))
    assert {published_name(name) for name in expected} == set(found)
    for name, weight in expected.items():
        assert torch.equal(found[published_name(name)], weight), name


def test_names_are_those_of_the_published_scripts() -> None:
    names = {
        "embedding.weight": "tok_emb.weight",
        "blocks.10.attention.query": "blocks.10.attn.c_q.weight",
        "blocks.0.attention.output": "blocks.0.attn.proj.weight",
        "blocks.3.mlp.down": "blocks.3.mlp.proj.weight",
        "blocks.3.attn_scale": "blocks.3.attn_scale",
        "skips.weights": "skip_weights",
        "ve.scale": "ve_shared.scale",
        "smear.gate": "smear.gate",
        "recur_scales": "recur_scales",
    }
    assert {name: published_name(name) for name in names} == names


def test_the_same_tensors_give_the_same_file() -> None:
    assert export(stored("pr1471"), "pr1471") == export(stored("pr1471"), "pr1471")


def test_codes_beyond_six_bits_do_not_fit_w6e16() -> None:
    codes = torch.tensor([[0, 32]], dtype=torch.int8)
    with pytest.raises(
        UserError, match=r"w: format w6e16 holds codes of 6 bits, found 0\.\.32: quantize .* --embed_bits 16"
    ):
        export({"w": QuantizedTensor(codes, torch.ones(1).half(), 8)}, "pr122")

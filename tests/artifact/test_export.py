"""Published formats: payloads equal the published figures, and a plain reader finds the identical weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_example import ROOMY, quantized, tiny
from published_tables import described, own_name, table, unpacked, weights

from train.artifact.__main__ import main
from train.artifact.export import PUBLISHED_FORMATS, export
from train.artifact.published_names import published_parameters, to_published
from train.artifact.storage import read_artifact, write_artifact
from train.common.errors import UserError
from train.config import Config
from train.model.gpt import GPT
from train.quantize.tensors import QuantizedTensor, StoredTensors, dequantize_state, stored_bits
from train.recipes import load_recipe

BITS_OF_EMBEDDINGS = {"baseline": 16, "pr122": 16, "pr262": 8, "pr1392": 8, "pr1471": 8}
FULL_SIZE = {
    "baseline": ("baseline", {"matrix_bits": 8}),
    "pr122": ("sp2048_normuon", {}),
    "pr262": ("sp1024_smear_bigram", {}),
    "pr1392": ("sp4096_recurrence", {}),
    "pr1471": ("sp8192_sdclip", {}),
}


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
    exported = export(zeros(config), form, config)
    assert exported.payload_bytes == expected
    # the archive around the tensors, as the published logs show it
    assert 0 < exported.pickled_bytes - exported.payload_bytes < 1 << 16


@pytest.mark.parametrize("form", sorted(PUBLISHED_FORMATS))
def test_every_entry_is_the_one_that_the_script_loads(form: str) -> None:
    recipe, changes = FULL_SIZE[form]
    config = load_recipe(recipe).config(**changes)
    content = PUBLISHED_FORMATS[form].layout.write(to_published(zeros(config)), published_parameters(config))
    assert described(content) == table(form)


def settings(form: str) -> Config:
    return tiny(
        embed_bits=BITS_OF_EMBEDDINGS[form], embed_clip_sigmas=4.0, smear_gate="published", bigram_vocab_size=40, bigram_dim=8,
        parallel_start_layer=1, parallel_form="lanes", recur_scale_params=2,
    )  # fmt: skip


@pytest.mark.parametrize("form", sorted(PUBLISHED_FORMATS))
def test_an_exported_model_reloads_to_the_identical_weights(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(form)
    file, out = tmp_path / "model.golf", tmp_path / "final_model.ptz"
    write_artifact(file, quantized(config), config, **ROOMY)
    main(["convert", "--json", str(file), "--format", form, "--out", str(out)])
    assert json.loads(capsys.readouterr().out)["bytes"] == out.stat().st_size
    loaded = unpacked(form, out.read_bytes())
    found, expected = weights(form, loaded), dequantize_state(read_artifact(file).tensors)
    read = {}
    for name, weight in found.items():
        own, row = own_name(name)
        part = expected[own] if row is None else expected[own][row].reshape(weight.shape)
        assert torch.equal(weight, part), name
        read[own] = read.get(own, 0) + weight.numel()
    assert read == {name: tensor.numel() for name, tensor in expected.items()}
    assert {"lane_merge", "recur_scales.0", "recur_scales.1", "ve_layer_scales.1"} <= set(found)


def test_the_same_tensors_give_the_same_file() -> None:
    config = settings("pr1471")
    assert export(quantized(config), "pr1471", config) == export(quantized(config), "pr1471", config)


def test_codes_beyond_six_bits_do_not_fit_w6e16() -> None:
    tensors = quantized(settings("pr122"))
    codes = torch.zeros(tensors["blocks.0.mlp.up"].shape, dtype=torch.int8)
    codes[0, 1] = 32
    tensors["blocks.0.mlp.up"] = QuantizedTensor(codes, torch.ones(len(codes)).half(), 8)
    with pytest.raises(
        UserError,
        match=r"blocks.0.mlp.fc.weight: format w6e16 holds codes of 6 bits, found 0\.\.32: quantize .* --embed_bits 16",
    ):
        export(tensors, "pr122", settings("pr122"))


def test_tensors_of_other_settings_are_refused() -> None:
    tensors = quantized(settings("pr1392"))
    with pytest.raises(
        UserError, match=r"blocks.3.attn.c_k.weight: the tensors do not match the artifact's model fields"
    ):
        export(tensors, "pr1392", settings("pr1392").replace(num_layers=4))
    del tensors["lane_mix"]
    with pytest.raises(UserError, match="lane_merge: the tensors do not match"):
        export(tensors, "pr1392", settings("pr1392"))

"""Quantizing a whole model: classes, Hessians on the evaluated function, refusals, and the way back to weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_systems import block_matrices
from quantize_example import random_batches, random_model, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from train.common.errors import UserError
from train.config import Config
from train.model.gpt import GPT
from train.model.linear import observe_inputs
from train.quantize.calibrate import collect_hessians, second_moment
from train.quantize.gptq import gptq
from train.quantize.quantize_model import quantize_model
from train.quantize.row_scales import percentile_candidates, quantile, row_max, rtn, sdclip
from train.quantize.tensors import QuantizedTensor, dequantize_state, matrices_to_calibrate, stored_bits


class Notes(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny()


@pytest.fixture(scope="module")
def model(config: Config) -> GPT:
    return random_model(config)


@pytest.fixture(scope="module")
def hessians(model: GPT, config: Config) -> dict[str, Tensor]:
    return collect_hessians(model, random_batches(config), matrices_to_calibrate(model, config), recurrence=True)


def test_hessians_are_the_second_moments_of_the_inputs_over_all_uses(model: GPT, config: Config) -> None:
    inputs: dict[str, list[Tensor]] = {}
    batches = random_batches(config)
    names = [*block_matrices(model), "embedding.weight", "ve.proj"]
    with torch.no_grad(), observe_inputs(model, lambda name, x: inputs.setdefault(name, []).append(x.clone())):
        for ids in batches:
            model.hidden(ids, recurrence=True)
    hessians = collect_hessians(model, batches, names, recurrence=True)
    assert sorted(hessians) == sorted(names)
    for name, hessian in hessians.items():
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]]).double()
        torch.testing.assert_close(hessian.double(), rows.T @ rows / 3, rtol=1e-4, atol=1e-5)
    # layers 1 and 2 run twice
    assert [len(inputs[f"blocks.{layer}.attention.query"]) for layer in range(4)] == [3, 6, 6, 3]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moments_of_bfloat16_are_summed_in_float32(device: str) -> None:
    rows = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0)).bfloat16() + 3
    moment = second_moment(rows.to(device)).cpu()
    exact = rows.double().T @ rows.double()
    assert moment.dtype == torch.float32
    # bfloat16 sums would be off by 4e-3
    torch.testing.assert_close(moment.double(), exact, rtol=1e-5, atol=0)


def test_moments_on_a_gpu_are_float32_too() -> None:
    with FakeTensorMode():
        moment = second_moment(torch.empty(9, 5, dtype=torch.bfloat16, device="cuda"))
    assert (moment.dtype, moment.shape, moment.device.type) == (torch.float32, (5, 5), "cuda")


def test_query_key_and_value_share_a_hessian_but_not_its_memory(hessians: dict[str, Tensor]) -> None:
    query, key = hessians["blocks.2.attention.query"], hessians["blocks.2.attention.key"]
    assert torch.equal(query, key)
    assert query.data_ptr() != key.data_ptr()
    assert not torch.equal(query, hessians["blocks.1.attention.query"])


def test_hessians_follow_the_recurrence_that_is_asked_for(
    model: GPT, config: Config, hessians: dict[str, Tensor]
) -> None:
    plain = collect_hessians(model, random_batches(config), ["blocks.3.mlp.up"], recurrence=False)
    assert not torch.allclose(plain["blocks.3.mlp.up"], hessians["blocks.3.mlp.up"], rtol=1e-3)


def test_the_tied_embedding_is_calibrated_on_the_final_norms_output(model: GPT, config: Config) -> None:
    batches = random_batches(config)
    hessian = collect_hessians(model, batches, ["embedding.weight"], recurrence=True)["embedding.weight"]
    with torch.no_grad():
        rows = torch.cat([model.hidden(ids, recurrence=True).flatten(0, 1) for ids in batches]).double()
    torch.testing.assert_close(hessian.double(), rows.T @ rows / 3, rtol=1e-4, atol=1e-5)


def test_ranks_add_up(model: GPT, config: Config) -> None:
    names, batches = ["blocks.0.mlp.down", "blocks.1.attention.output"], random_batches(config, 4)
    together = collect_hessians(model, batches, names, recurrence=True)
    queues: list[list[Tensor]] = [[], []]
    for rank, mine in enumerate((batches[:1], batches[1:])):
        collect_hessians(
            model, mine, names, recurrence=True, all_reduce=lambda x, rank=rank: queues[rank].append(x.clone())
        )
    assert len(queues[0]) == len(queues[1]) == 3
    sums = iter([first + second for first, second in zip(*queues, strict=True)])
    ranks = collect_hessians(model, batches[:1], names, recurrence=True, all_reduce=lambda x: x.copy_(next(sums)))
    for name in names:
        torch.testing.assert_close(ranks[name], together[name], rtol=1e-5, atol=1e-6)


def test_calibration_leaves_the_model_as_it_was(model: GPT, config: Config) -> None:
    model.train()
    collect_hessians(model, random_batches(config, 1), ["blocks.0.mlp.up"], recurrence=True)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibration_sees_no_fake_quantization() -> None:
    plain, qat = tiny(), tiny(qat=True)
    state = random_model(plain).state_dict()
    found = []
    for config in (plain, qat):
        model = GPT(config)
        model.load_state_dict(state)
        found.append(collect_hessians(model.train(), random_batches(config), ["blocks.3.mlp.down"], recurrence=True))
    assert torch.equal(found[0]["blocks.3.mlp.down"], found[1]["blocks.3.mlp.down"])


def test_calibration_names_what_is_missing(model: GPT, config: Config) -> None:
    with pytest.raises(UserError, match=r"blocks\.9\.mlp\.up: the model has no such matrix"):
        collect_hessians(model, random_batches(config), ["blocks.9.mlp.up"], recurrence=True)
    with pytest.raises(UserError, match=r"bigram\.embedding: the model never multiplied"):
        collect_hessians(model, random_batches(config), ["bigram.embedding"], recurrence=True)
    with pytest.raises(UserError, match="gptq_calib_batches: no batch"):
        collect_hessians(model, [], ["blocks.0.mlp.up"], recurrence=True)


def test_tensors_fall_into_the_published_classes(model: GPT, config: Config, hessians: dict[str, Tensor]) -> None:
    stored = quantize_model(model, config, hessians)
    assert list(stored) == [name for name, _ in model.named_parameters()]
    codes = {name: tensor.bits for name, tensor in stored.items() if isinstance(tensor, QuantizedTensor)}
    blocks = [f"blocks.{layer}.{part}" for layer in range(4) for part in (
        "attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"
    )]  # fmt: skip
    assert codes == dict.fromkeys(blocks, 6) | dict.fromkeys(
        ["embedding.weight", "bigram.embedding", "ve.embedding"], 8
    )
    parameters = dict(model.named_parameters())
    rest = {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    # by their class these two are matrices, by their size they pass through
    assert {"bigram.proj", "ve.proj", "blocks.0.attention.q_gain"} <= set(rest)
    for name, tensor in rest.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, parameters[name].detach().half())


def test_the_threshold_lets_exactly_65536_elements_pass() -> None:
    config = Config()
    name = "blocks.0.attention.key"
    assert config.passthrough_max_elements == 65536
    assert stored_bits(name, torch.empty(128, 512, device="meta"), config) == 16
    assert stored_bits(name, torch.empty(128, 513, device="meta"), config) == 6
    assert stored_bits("embedding.weight", torch.empty(1024, 512, device="meta"), config) == 8
    assert stored_bits("embedding.weight", torch.empty(1024, 512, device="meta"), config.replace(embed_bits=16)) == 16
    assert stored_bits("blocks.0.resid_mix", torch.empty(300, 512, device="meta"), config) == 16
    with pytest.raises(UserError, match=r"embed_bits: .* got 12"):
        stored_bits("embedding.weight", torch.empty(1024, 512, device="meta"), config.replace(embed_bits=12))


SP4096_RECURRENT: dict[str, Any] = {
    "vocab_size": 4096, "num_layers": 11, "mlp_mult": 4.0, "smear_gate": "published", "ve_dim": 128, "ve_layers": (9, 10),
    "recur_scale_params": 2,
}  # fmt: skip
SP8192_SDCLIP: dict[str, Any] = {
    "vocab_size": 8192, "num_layers": 11, "mlp_mult": 4.0, "ve_dim": 128, "ve_layers": (9, 10), "skip_gates": True,
    "parallel_start_layer": 7, "parallel_form": "lanes", "recur_layers": (3, 4, 5),
}  # fmt: skip
SP1024_8_LAYERS: dict[str, Any] = {
    "num_layers": 8, "mlp_mult": 3.0, "smear_gate": "published", "bigram_vocab_size": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (SP4096_RECURRENT, 34_566_326),
        (SP8192_SDCLIP, 37_206_200),
        (SP1024_8_LAYERS, 19_893_378),
        (SP1024_8_LAYERS | {"tied_embed_bits": 16}, 20_415_618),
    ],
    ids=["1392", "1471", "262", "262 with a float16 embedding"],
)
def test_payload_bytes_are_those_of_the_published_systems(changes: dict[str, Any], expected: int) -> None:
    config = Config(**changes)
    with torch.device("meta"):
        model = GPT(config)
    payload = 0
    for name, parameter in model.named_parameters():
        coded = stored_bits(name, parameter, config) < 16
        # int8 containers of one byte per code, float16 row scales, float16 for the rest
        payload += parameter.numel() + 2 * len(parameter) if coded else 2 * parameter.numel()
    assert payload == expected


def test_matrices_get_gptq_and_embeddings_are_rounded(model: GPT, config: Config, hessians: dict[str, Tensor]) -> None:
    stored = quantize_model(model, config, hessians)
    for name, bits, sigmas in (("blocks.1.mlp.down", 6, 12.85), ("ve.embedding", 8, 20.0)):
        weight = dict(model.named_parameters())[name].detach()
        scales = sdclip(weight, bits, sigmas=sigmas, floor="none")
        truth = gptq(weight, hessians[name], scales, bits).codes if name in hessians else rtn(weight, scales, bits)
        assert torch.equal(stored[name].scales, scales)
        assert torch.equal(stored[name].codes, truth)
    nearest = quantize_model(model, config.replace(quantizer="rtn"), {})
    assert not torch.equal(nearest["blocks.1.mlp.down"].codes, stored["blocks.1.mlp.down"].codes)
    assert matrices_to_calibrate(model, config.replace(quantizer="rtn")) == []


def test_gptq_lowers_the_output_error_of_every_matrix(model: GPT, hessians: dict[str, Tensor]) -> None:
    config = tiny(matrix_bits=4, matrix_clip_sigmas=3.0)
    ours, nearest = quantize_model(model, config, hessians), quantize_model(model, config.replace(quantizer="rtn"), {})
    for name in matrices_to_calibrate(model, config):
        weight, hessian = dict(model.named_parameters())[name].detach().double(), hessians[name].double()

        def error(stored: QuantizedTensor, weight: Tensor = weight, hessian: Tensor = hessian) -> float:
            difference = weight - stored.dequantize().double()
            return (difference @ hessian * difference).sum().item()

        assert error(ours[name]) < error(nearest[name]), name


def test_a_hessian_for_the_tied_embedding_means_gptq_for_it(
    model: GPT, config: Config, hessians: dict[str, Tensor]
) -> None:
    config = config.replace(embed_bits=4, embed_clip_sigmas=3.0)
    head = collect_hessians(model, random_batches(config), ["embedding.weight"], recurrence=True)
    stored = quantize_model(model, config, hessians | head)["embedding.weight"]
    weight = model.embedding.weight.detach()
    scales = sdclip(weight, 4, sigmas=3.0, floor="none")
    assert torch.equal(stored.codes, gptq(weight, head["embedding.weight"], scales, 4).codes)
    # #1394: 66 matrices and the embedding; no other table is multiplied by
    asking = config.replace(gptq_tied_embed=True)
    assert set(matrices_to_calibrate(model, asking)) - set(matrices_to_calibrate(model, config)) == {"embedding.weight"}
    assert matrices_to_calibrate(model, asking.replace(embed_bits=16)) == matrices_to_calibrate(model, config)
    with pytest.raises(UserError, match=r"embedding\.weight: GPTQ needs this matrix's Hessian"):
        quantize_model(model, asking, hessians)
    assert not torch.equal(stored.codes, rtn(weight, scales, 4))


def test_row_clips_are_taken_from_the_settings(model: GPT, config: Config, hessians: dict[str, Tensor]) -> None:
    changed = config.replace(matrix_clip="row_max", embed_clip="quantile", scale_floor="published")
    stored, parameters = quantize_model(model, changed, hessians), dict(model.named_parameters())
    matrix, table = parameters["blocks.0.mlp.up"].detach(), parameters["embedding.weight"].detach()
    assert torch.equal(stored["blocks.0.mlp.up"].scales, row_max(matrix, 6, floor="published"))
    assert torch.equal(stored["embedding.weight"].scales, quantile(table, 8, floor="published"))


def test_percentile_search_keeps_the_gptq_pass_with_the_least_squared_error(
    model: GPT, config: Config, hessians: dict[str, Tensor]
) -> None:
    name = "blocks.2.mlp.up"
    stored = quantize_model(model, config.replace(matrix_clip="percentile_search", matrix_bits=4), hessians)[name]
    weight = dict(model.named_parameters())[name].detach()
    passes = []
    for scales in percentile_candidates(weight, 4, floor="none"):
        codes = gptq(weight, hessians[name], scales, 4).codes
        passes.append((((weight - codes * scales.float()[:, None]).double() ** 2).sum().item(), codes))
    least = min(passes, key=lambda found: found[0])
    assert torch.equal(stored.codes, least[1])


def test_dequantized_weights_are_codes_times_scales(model: GPT, config: Config, hessians: dict[str, Tensor]) -> None:
    stored = quantize_model(model, config, hessians)
    state = dequantize_state(stored)
    for name, tensor in stored.items():
        assert state[name].dtype == torch.float32
        if isinstance(tensor, QuantizedTensor):
            truth = tensor.codes.numpy().astype(np.float64) * tensor.scales.numpy().astype(np.float64)[:, None]
            np.testing.assert_array_equal(state[name].numpy(), truth.astype(np.float32))
    quantized = GPT(config)
    quantized.load_state_dict(state)
    ids = random_batches(config, 1)[0]
    with torch.no_grad():
        before, after = model.logits(ids, recurrence=True), quantized.logits(ids, recurrence=True)
    difference = F.mse_loss(after, before) / before.var()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.mlp.up", "blocks.1.mlp_scale", "embedding.weight"])
def test_nan_and_infinity_are_refused_by_name(
    config: Config, hessians: dict[str, Tensor], name: str, value: float
) -> None:
    model = random_model(config)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[5] = value
    with pytest.raises(UserError, match=rf"^{name}: 1 of .* values are NaN or infinite"):
        quantize_model(model, config, hessians)


def test_what_float16_cannot_hold_is_refused_by_name(config: Config, hessians: dict[str, Tensor]) -> None:
    model = random_model(config)
    with torch.no_grad():
        model.blocks[0].mlp_scale[3] = 70_000.0
    with pytest.raises(UserError, match=r"blocks\.0\.mlp_scale: holds 70000, above float16's maximum 65504"):
        quantize_model(model, config, hessians)
    model = random_model(config)
    with torch.no_grad():
        model.blocks[0].mlp.up[7] *= 1e9
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.up: row 7 has weights so large"):
        quantize_model(model, config, hessians)


def test_rows_of_one_element_are_refused_by_the_tensors_name(config: Config) -> None:
    class Narrow(torch.nn.Module):
        def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
            yield "blocks.0.mlp.down", torch.ones(600, 1)

    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.down: sdclip: rows of one element .*MATRIX_CLIP"):
        quantize_model(Narrow(), config.replace(quantizer="rtn", passthrough_max_elements=0), {})  # type: ignore[arg-type]


def test_missing_and_bad_hessians_are_refused_by_name(model: GPT, config: Config, hessians: dict[str, Tensor]) -> None:
    name = "blocks.3.attention.key"
    with pytest.raises(UserError, match=rf"{name}: GPTQ needs this matrix's Hessian"):
        quantize_model(model, config, {other: hessians[other] for other in hessians if other != name})
    with pytest.raises(UserError, match=rf"{name}: its Hessian holds NaN"):
        quantize_model(model, config, hessians | {name: hessians[name] * float("nan")})
    with pytest.raises(UserError, match=rf"{name}: expected a Hessian \(32, 32\), got \(8, 8\)"):
        quantize_model(model, config, hessians | {name: torch.eye(8)})


def test_more_damping_and_rounding_to_nearest_are_said(model: GPT, config: Config, hessians: dict[str, Tensor]) -> None:
    notes = Notes()
    quantize_model(model, config, hessians, note=notes)
    assert notes == []
    bad = hessians | {"blocks.0.mlp.up": -torch.ones(32, 32)}
    stored = quantize_model(model, config, bad, note=notes)
    assert notes == [
        "blocks.0.mlp.up: the Hessian could not be factorized at any damping; rounded to nearest instead of GPTQ"
    ]
    weight = model.blocks[0].mlp.up.detach()
    assert torch.equal(stored["blocks.0.mlp.up"].codes, rtn(weight, stored["blocks.0.mlp.up"].scales, 6))
    with pytest.warns(UserWarning, match=r"blocks\.0\.mlp\.up"):
        quantize_model(model, config, bad)


def test_malformed_quantized_tensors_are_refused() -> None:
    codes, scales = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="codes: expected an int8 matrix"):
        QuantizedTensor(codes.int(), scales, 6)
    with pytest.raises(ValueError, match="scales: expected float16"):
        QuantizedTensor(codes, scales[:1], 6)
    with pytest.raises(UserError, match="bits"):
        QuantizedTensor(codes, scales, 9)

"""The search for row clips that fit a target, with real encodes."""

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from model_systems import narrow_config, random_ids, random_model

from train.artifact.fit_to_target import TOLERANCE, fit_to_target, search_clips
from train.artifact.storage import EncodedArtifact, encode_artifact
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config
from train.data.dataset import Dataset
from train.model.gpt import GPT
from train.quantize.calibrate import collect_hessians
from train.quantize.clip_curves import group_curves, loss_factors
from train.quantize.quantize_model import quantize_model
from train.quantize.tensors import StoredTensors, matrices_to_calibrate
from train.run.logger import RunLogger

WIDE: dict[str, Any] = {"model_dim": 128, "num_heads": 4, "passthrough_max_elements": 1024, "scale_floor": "none"}
CODE_BYTES = 777


@pytest.fixture(scope="module")
def config() -> Config:
    return narrow_config(
        "sp8192", num_layers=4, recur_layers=(1,), parallel_start_layer=3, ve_layers=(2, 3), xsa_last_n=4, codec="zlib",
        **WIDE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(config: Config) -> GPT:
    return random_model(config).float()


@pytest.fixture(scope="module")
def hessians(model: GPT, config: Config) -> dict[str, torch.Tensor]:
    model.compute_dtype = torch.float32
    return collect_hessians(model, [random_ids(config, 4, 16)], matrices_to_calibrate(model, config), recurrence=True)


def total_bytes(tensors: StoredTensors, config: Config) -> int:
    return CODE_BYTES + len(encode_artifact(tensors, config).data)


def fitted(
    model: GPT, config: Config, hessians: dict[str, torch.Tensor], target: int
) -> tuple[StoredTensors, EncodedArtifact, list[str]]:
    ids, notes = random_ids(config, 4, 17, seed=3), []

    def quantize(sigmas: Mapping[str, float]) -> StoredTensors:
        return quantize_model(model, config, hessians, note=notes.append, sigmas=sigmas)

    def loss() -> float:
        return float(model.loss(ids[:, :-1], ids[:, 1:], recurrence=True).detach())

    curves = group_curves(model, config, hessians)
    tensors, encoded = search_clips(
        model,
        curves,
        loss_factors(model, config, curves, hessians, loss),
        target,
        counted_bytes=CODE_BYTES,
        quantize=quantize,
        encode=lambda tensors: encode_artifact(tensors, config),
        note=notes.append,
    )
    return tensors, encoded, notes


@pytest.mark.parametrize("clip", ["sdclip", "hessian_sdclip"])
@pytest.mark.parametrize("part", [0.6, 1.1])
def test_the_fitted_model_is_just_below_the_target(
    model: GPT, config: Config, hessians: dict[str, torch.Tensor], clip: str, part: float
) -> None:
    config = config.replace(matrix_clip=clip)
    target = int(part * total_bytes(quantize_model(model, config, hessians), config))
    tensors, encoded, notes = fitted(model, config, hessians, target)
    assert encoded.data == encode_artifact(tensors, config).data
    assert target * (1 - TOLERANCE) <= CODE_BYTES + len(encoded.data) <= target
    assert sum(f" of {target} bytes" in line for line in notes) <= 5
    assert any(line.startswith("fit:blocks.*.mlp.up int6 k 12.85 -> ") for line in notes)


def test_a_target_below_the_code_is_refused_before_the_search(model: GPT, config: Config) -> None:
    data, log = cast(Dataset, None), cast(RunLogger, None)
    with pytest.raises(
        UserError, match=r"^target_bytes: 777 leaves no byte for the model, because the code takes 777: raise it$"
    ):
        fit_to_target(
            config.replace(target_bytes=777), model, {}, pytest.fail, data, Ranks(), log, counted_bytes=CODE_BYTES
        )


def test_a_target_out_of_reach_gives_the_smallest_and_a_generous_one_the_most_exact(
    model: GPT, config: Config, hessians: dict[str, torch.Tensor]
) -> None:
    tensors, encoded, _ = fitted(model, config, hessians, 1000)
    assert CODE_BYTES + len(encoded.data) > 1000
    assert encoded.data == encode_artifact(tensors, config).data
    coarsest = quantize_model(model, config, hessians, sigmas=dict.fromkeys(hessians, 62.0))
    assert CODE_BYTES + len(encoded.data) <= total_bytes(coarsest, config)
    tensors, encoded, _ = fitted(model, config, hessians, 10**8)
    plain = quantize_model(model, config, hessians)
    weights = dict(model.named_parameters())

    def error(stored: StoredTensors) -> float:
        return sum(
            float((weights[name] - tensor.dequantize()).detach().square().sum())
            for name, tensor in stored.items()
            if name in hessians
        )

    assert error(tensors) < error(plain)

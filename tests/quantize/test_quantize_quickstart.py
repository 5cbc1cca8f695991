"""GPTQ on a trained quickstart model, at its full width: every matrix gains, on text that calibration has not seen too."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_training import Training
from torch import Tensor

from train.config import Config
from train.model.gpt import GPT
from train.quantize.calibrate import collect_hessians
from train.quantize.quantize_model import quantize_model
from train.quantize.tensors import QuantizedTensor, StoredTensors, matrices_to_calibrate
from train.recipes import load_recipe

STEPS = 24


@pytest.fixture(scope="module")
def config(dataset: Path) -> Config:
    return load_recipe("quickstart").config(
        data_path=str(dataset), corpus="", vocab_size=512, iterations=STEPS,
        max_wallclock_seconds=0.0, gptq_reserve_seconds=0.0, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: Config) -> Training:
    training = Training.begin(config)
    losses = training.run(STEPS)
    # from ln 512 = 6.2
    assert losses[-1] < 4.8
    return training


def batches(training: Training) -> list[Tensor]:
    return [inputs for inputs, _ in training.loader.next_batch()]


def output_error(model: GPT, stored: StoredTensors, name: str, hessian: Tensor) -> float:
    """Σ ‖(W − Ŵ) x‖² over the inputs x behind the Hessian, in float64."""
    tensor = stored[name]
    assert isinstance(tensor, QuantizedTensor)
    difference = dict(model.named_parameters())[name].detach().double() - tensor.dequantize().double()
    return (difference @ hessian.double() * difference).sum().item()


def test_the_output_error_of_every_matrix_is_below_that_of_rounding_to_nearest(
    trained: Training, config: Config
) -> None:
    model = trained.model
    names = matrices_to_calibrate(model, config)
    assert len(names) == 19
    seen = collect_hessians(model, batches(trained), names, recurrence=True)
    unseen = collect_hessians(model, batches(trained), names, recurrence=True)
    notes: list[str] = []
    ours = quantize_model(model, config, seen, note=notes.append)
    nearest = quantize_model(model, config.replace(quantizer="rtn"), {})
    assert notes == []
    for hessians in (seen, unseen):
        gains = {
            name: output_error(model, ours, name, hessians[name]) / output_error(model, nearest, name, hessians[name])
            for name in names
        }
        # at 40 steps between 0.05 and 0.42
        assert max(gains.values()) < 0.6, gains

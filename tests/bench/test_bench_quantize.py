"""The benchmark of quantization runs, its arithmetic is the model's, and what is computed otherwise has no time."""

import re

import pytest
import torch

from benchmarks import bench_quantize
from benchmarks.measure import common
from train.model.gpt import GPT
from train.quantize.tensors import matrices_to_calibrate
from train.recipes import load_recipe

TINY = ["--device", "cpu", "--rounds", "1", "--warmup-ms", "0", "--tiny"]


def test_every_stage_is_checked_and_reported(capsys):
    assert bench_quantize.main(TINY) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(calibrate|gptq|generate), (.*), float32, on cpu", printed, re.MULTILINE) == [
        ("calibrate", "26 matrices 2 batches of 128 tokens"),
        ("gptq", "26 matrices"),
        ("generate", "2 texts of 64 tokens"),
    ]


def test_arithmetic_of_the_goals():
    config = load_recipe(bench_quantize.RECIPE).config(gptq_tied_embed=True, device="cpu")
    with torch.device("meta"):
        model = GPT(config)
    names = matrices_to_calibrate(model, config)
    gptq = bench_quantize.gptq_case(model, config, names)
    # 56 factorizations of 512 columns and 11 of 2,048, and their rows
    factored = 4 / 3 * (56 * 512**3 + 11 * 2048**3)
    pushed = 512**2 * (22 * 512 + 22 * 256 + 11 * 2048 + 8192) + 11 * 512 * 2048**2
    assert len(names) == 67 and gptq.flops == pytest.approx(factored + pushed)

    # a token through 14 layers and all pairs of 2,048, and half of each symmetric Xᵀ X: three of 512 and one of 2,048 a layer
    layers = 2 * (14 * (3 * 512**2 + 2 * 512 * 2048) + 128 * 256) + 4 * 512 * 14 * 2048 / 2
    moments = 14 * (3 * 512**2 + 2048**2) + 512**2
    assert bench_quantize.calibration_flops(config) == pytest.approx(layers + moments)


@pytest.mark.parametrize("stage", ["calibrate", "generate"])
def test_another_function_has_no_time(stage, monkeypatch):
    # calibration and generation on the layers once only; the truth repeats them
    original = getattr(bench_quantize, {"calibrate": "collect_hessians", "generate": "generate_tokens"}[stage])

    def without_recurrence(model, *arguments, recurrence, **named):
        kept = recurrence and model.compute_dtype == torch.float64
        return original(model, *arguments, recurrence=kept, **named)

    monkeypatch.setattr(bench_quantize, original.__name__, without_recurrence)
    with pytest.raises(common.CheckFailed, match=stage):
        bench_quantize.main([*TINY, "--stages", stage])

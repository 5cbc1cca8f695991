"""The benchmark of the residual mix and its norm runs, checks its results first, and predicts what was computed by hand."""

import re

import pytest
import torch

from benchmarks import bench_mix_rms_norm as bench
from benchmarks import common
from golf_kernels import dispatch

CPU = torch.device("cpu")
KERNELS = "triton" in dispatch.available_backends("mix_rms_norm")


def test_every_variant_is_checked_and_compared(capsys):
    assert bench.main(["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert "mix_rms_norm, 2x67x48, float16, on cpu" in printed and "not kept" in printed
    for name in ("torch", "compile", *(["triton"] if KERNELS else [])):
        assert len(re.findall(rf"^{name} +eager ", printed, re.MULTILINE)) == 1, name
    if KERNELS:
        assert re.search(r"^triton is \d+\.\d+ times as fast as 'compile'", printed, re.MULTILINE)


# by hand: 98,304 x 512 bfloat16 numbers are 100.66 MB, of which 4 and 6 are moved, and 4 and 9
@pytest.mark.parametrize(
    ("name", "forward", "backward", "compiled"), [("H100", 0.120, 0.180, 0.270), ("H200", 0.094, 0.140, 0.211)]
)
def test_predictions(name, forward, backward, compiled):
    (shape,) = bench.SHAPES
    lines = [line for line in bench.predict(shape).split("\n") if name in line]
    assert lines[0].endswith(f"triton: forward {forward:.3f}, backward {backward:.3f}")
    assert lines[1].endswith(f"compile: forward {forward:.3f}, backward {compiled:.3f}")


@pytest.mark.parametrize("index", range(5))
def test_a_wrong_result_has_no_time(index):
    def wrong(inputs):
        results = bench.both_passes(bench.plain, inputs)
        results[index] = 1.02 * results[index]
        return results

    clock, limits = common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0)
    with pytest.raises(common.CheckFailed, match="mix_rms_norm, wrong"):
        common.measure(bench.make_case(bench.TINY, CPU), [common.Variant("wrong", wrong)], clock, limits)


def test_variants_leave_the_environment_alone(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    for variant in bench.variants(CPU):
        variant.run(bench.make_inputs(bench.TINY, CPU, 0))
    assert dispatch.choose("mix_rms_norm", device="cpu").reason == "forced by GOLF_BACKEND"
    assert dispatch.choose("mix_rms_norm", device="cpu").backend == "torch"

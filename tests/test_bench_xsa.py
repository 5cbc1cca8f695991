"""The benchmark of XSA runs, checks its results first, and predicts what was computed by hand."""

import re

import pytest
import torch

from benchmarks import bench_xsa as bench
from benchmarks import common
from golf_kernels import dispatch

CPU = torch.device("cpu")
KERNELS = "triton" in dispatch.available_backends("xsa")


def test_every_variant_is_checked_and_compared(capsys):
    assert bench.main(["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert "xsa, 2x9x4/2x16, float16, on cpu" in printed and "not kept" in printed
    for name in ("torch", "compile", *(["triton"] if KERNELS else [])):
        assert len(re.findall(rf"^{name} +eager ", printed, re.MULTILINE)) == 1, name
    if KERNELS:
        assert re.search(r"^triton is \d+\.\d+ times as fast as 'compile'", printed, re.MULTILINE)


# by hand, U being 98,304 x 512 bfloat16 numbers, 100.66 MB: 2.5 U forward and 4 U backward, with as many values 3 U and 5 U
@pytest.mark.parametrize(
    ("name", "grouped", "single"),
    [("H100", (0.0751, 0.1202), (0.0901, 0.1502)), ("H200", (0.0585, 0.0936), (0.0702, 0.1170))],
)
def test_predictions(name, grouped, single):
    device = next(device for device in bench.DEVICES if device.name == name)
    for shape, wanted in zip(bench.SHAPES, (grouped, single), strict=True):
        found = [size / device.gbps / 1e6 for size in bench.traffic(shape).values()]
        assert found == pytest.approx(wanted, abs=1e-4)
        line = next(line for line in bench.predict(shape).split("\n") if name in line)
        assert f"forward {found[0]:.3f}, backward {found[1]:.3f}" in line


@pytest.mark.parametrize("index", range(3))
def test_a_wrong_result_has_no_time(index):
    def wrong(inputs):
        results = bench.both_passes(bench.remove_value_direction, inputs)
        results[index] = 1.02 * results[index]
        return results

    clock, limits = common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0)
    with pytest.raises(common.CheckFailed, match="xsa, wrong"):
        common.measure(bench.make_case(bench.TINY, CPU), [common.Variant("wrong", wrong)], clock, limits)


def test_variants_leave_the_environment_alone(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    for variant in bench.variants(CPU):
        variant.run(bench.make_inputs(bench.TINY, CPU, 0))
    assert dispatch.choose("xsa", device="cpu") == ("torch", "forced by GOLF_BACKEND")

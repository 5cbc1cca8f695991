"""The benchmark of QK-norm, rotation and gain runs, checks its results first, and predicts what was computed by hand."""

import re

import pytest
import torch

from benchmarks import bench_qk_norm_rope as bench
from benchmarks import common
from golf_kernels import dispatch

CPU = torch.device("cpu")
KERNELS = "triton" in dispatch.available_backends("qk_norm_rope")


def test_every_variant_is_checked_and_compared(capsys):
    assert bench.main(["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert "qk_norm_rope, 2x9x4+2x16, rotary 8, float16, on cpu" in printed and "not kept" in printed
    for name in ("torch", "compile", *(["triton"] if KERNELS else [])):
        assert len(re.findall(rf"^{name} +eager ", printed, re.MULTILINE)) == 1, name
    if KERNELS:
        assert re.search(r"^triton is \d+\.\d+ times as fast as 'compile'", printed, re.MULTILINE)


# by hand, U being 98,304 x 512 bfloat16 numbers, 100.66 MB: 3 U forward, 4.5 U backward, and 4.7 MB of rstd in each
@pytest.mark.parametrize(("name", "forward", "backward"), [("H100", 0.0916, 0.1366), ("H200", 0.0713, 0.1064)])
def test_predictions(name, forward, backward):
    device = next(device for device in bench.DEVICES if device.name == name)
    for shape in bench.SHAPES:
        found = [size / device.gbps / 1e6 for size in bench.traffic(shape).values()]
        assert found == pytest.approx([forward, backward], abs=1e-4)
        line = next(line for line in bench.predict(shape).split("\n") if name in line)
        assert f"forward {found[0]:.3f}, backward {found[1]:.3f}" in line


@pytest.mark.parametrize("index", range(5))
def test_a_wrong_result_has_no_time(index):
    def wrong(inputs):
        results = bench.both_passes(bench.plain, inputs)
        results[index] = 1.02 * results[index]
        return results

    clock, limits = common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0)
    with pytest.raises(common.CheckFailed, match="qk_norm_rope, wrong"):
        common.measure(bench.make_case(bench.TINY, CPU), [common.Variant("wrong", wrong)], clock, limits)


@pytest.mark.skipif(not KERNELS, reason=f"{dispatch.triton_problem()}")
def test_the_operator_keeps_its_results_and_the_plain_chain_its_inputs_too():
    inputs = bench.make_inputs(bench.TINY, CPU, 0)
    vectors = 2 * 9 * (4 + 2)
    results, rstd, small = 2 * 16 * vectors, 4 * vectors, 2 * 2 * 9 * 4 + 4 * 4
    assert bench.kept_bytes(bench.ours, inputs) == results + rstd + small
    assert bench.kept_bytes(bench.plain, inputs) > 2 * results


def test_variants_leave_the_environment_alone(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    for variant in bench.variants(CPU):
        variant.run(bench.make_inputs(bench.TINY, CPU, 0))
    assert dispatch.choose("qk_norm_rope", device="cpu").reason == "forced by GOLF_BACKEND"
    assert dispatch.choose("qk_norm_rope", device="cpu").backend == "torch"

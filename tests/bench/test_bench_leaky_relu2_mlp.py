"""The MLP benchmark runs, checks its results first, and predicts what was computed elsewhere by hand."""

import os
import re

import pytest
import torch

from benchmarks import bench_leaky_relu2_mlp as bench
from benchmarks.measure import common
from golf_kernels import dispatch

CPU = torch.device("cpu")
TINY = bench.Shape(5, 16, 64)


def test_every_variant_is_checked_and_compared(capsys):
    assert bench.main(["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]) == 0
    printed = capsys.readouterr().out
    for slope in (0.5, 0.0):
        assert f"leaky_relu2_mlp, slope {slope}, 160x64x128, float16, on cpu" in printed
    for name in ("products alone", "torch", "compile"):
        assert len(re.findall(rf"^{name} +eager ", printed, re.MULTILINE)) == 2, name
    if "triton" in dispatch.available_backends("leaky_relu2_mlp"):
        for name in bench.TRITON:
            assert len(re.findall(rf"^{name} +eager ", printed, re.MULTILINE)) == 2, name
        assert len(re.findall(r"^triton is \d+\.\d+ times as fast as 'compile", printed, re.MULTILINE)) == 2
    assert "computed, not measured: 160x64x128" in printed and "not stored" in printed


# by hand, U being 98,304 x 512 bfloat16 numbers: on an H100 memory limits dpre (9.25 U, or 7.19 U) and dx (7 U, or 6 U),
# everything else is limited by its 206 (or 155) GFLOP
FLOORS = {
    ("H100", 2048): (0.417, 0.905),
    ("H100", 1536): (0.313, 0.709),
    ("H200", 2048): (0.522, 1.044),
    ("H200", 1536): (0.391, 0.783),
}


@pytest.mark.parametrize(("name", "hidden"), FLOORS)
def test_predictions(name, hidden):
    device = next(device for device in bench.DEVICES if device.name == name)
    groups = bench.kernels(bench.Shape(98_304, 512, hidden))
    found = [sum(kernel.floor_ms(device) for kernel in groups[part]) for part in ("forward", "backward")]
    assert found == pytest.approx(FLOORS[name, hidden], abs=1e-3)
    line = next(line for line in bench.predict(bench.Shape(98_304, 512, hidden)).split("\n") if name in line)
    assert f"forward {1e3 * found[0]:.4g}, backward {1e3 * found[1]:.4g}" in line


def test_traffic_in_activations():
    # with a hidden size of four widths, in tensors of the activations' size
    groups = bench.kernels(bench.Shape(98_304, 512, 2048))
    unit = 98_304 * 512 * 2
    assert sum(kernel.bytes for kernel in groups["forward"]) / unit == 11.25
    assert sum(kernel.bytes for kernel in groups["backward"]) / unit == 26.25
    case = bench.make_case(bench.Shape(98_304, 512, 2048), 0.5, CPU)
    assert case.bytes == 37.5 * unit and case.flops == 12 * 98_304 * 512 * 2048


def test_memory_in_hidden_tensors():
    lines = bench.memory_lines({"triton": 2_000_000, "compile": 5_000_000}, 2_000_000)
    assert lines == [
        "triton: 2 MB at most beyond the inputs",
        "compile: 5 MB at most beyond the inputs",
        "triton takes 1.50 hidden tensors less than 'compile' (goal 1)",
    ]
    assert len(bench.memory_lines({"compile": 5_000_000}, 2_000_000)) == 1


def test_a_wrong_result_has_no_time():
    def wrong(inputs):
        y, *gradients = bench.both_passes(bench.plain, 0.5, inputs)
        return [y, 1.05 * gradients[0], *gradients[1:]]

    for slope, variant in ((0.5, common.Variant("wrong", wrong)), (0.0, bench.variants(0.5, CPU)[-1])):
        with pytest.raises(common.CheckFailed, match="leaky_relu2_mlp, slope"):
            common.measure(
                bench.make_case(TINY, slope, CPU), [variant], common.Clock(CPU, 1.0, 2), common.Ceilings(1.0, 1.0)
            )


def test_what_does_not_run_is_named_and_ours_is_never_left_out(monkeypatch, capsys):
    def broken(*_):
        raise TypeError("expected another number of arguments\nand more")

    monkeypatch.setattr(common, "compiled", lambda *_: broken)
    clock, limits = common.Clock(CPU, 1.0, 2), common.Ceilings(1.0, 1.0)
    _, rows = bench.compare(TINY, 0.5, clock, limits)
    assert {row["impl"] for row in rows} - set(bench.TRITON) <= {"torch", "torch again", "triton again"}
    assert "compile: left out: TypeError: expected another number of arguments\n" in capsys.readouterr().out
    monkeypatch.setattr(bench, "ours", broken)
    if "triton" in dispatch.available_backends("leaky_relu2_mlp"):
        with pytest.raises(TypeError):
            bench.compare(TINY, 0.5, clock, limits)


def test_variants_compile_apart():
    inputs = bench.make_inputs(TINY, CPU, 0)
    counted = torch._dynamo.utils.counters["frames"]
    before = counted["ok"]
    # more than torch would compile one function again
    for _ in range(12):
        bench.both_passes(common.compiled(bench.plain, CPU), 0.5, inputs)
    assert counted["ok"] - before == 12


def test_a_forced_variant_leaves_no_trace(monkeypatch):
    module = pytest.importorskip("golf_kernels.leaky_relu2_mlp_triton")
    monkeypatch.setenv("GOLF_BACKEND", "torch")
    before = module.choose_tile, module.down
    with bench.forced(**bench.TRITON["triton, narrow tiles"]):
        assert os.environ["GOLF_BACKEND"] == "leaky_relu2_mlp=triton"
        assert module.choose_tile("up", 256) == module.TILES["up"]["narrow"]
    with bench.forced(**bench.TRITON["triton, down by cuBLAS"]):
        assert module.down is bench.cublas_down
    assert os.environ["GOLF_BACKEND"] == "torch" and before == (module.choose_tile, module.down)
    assert module.choose_tile("up", 256) == module.TILES["up"]["wide"]

"""The benchmark runs from end to end on a CPU, on small matrices, and keeps nothing."""

import pytest
import torch

from benchmarks import bench_newton_schulz as bench
from benchmarks.measure import common
from benchmarks.measure.devices import newton_schulz_flops


def test_a_small_run_checks_times_and_keeps_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert bench.main(["--device", "cpu", "--tiny", "--rounds", "1", "--warmup-ms", "0"]) == 0
    text = capsys.readouterr().out
    for title in ("newton_schulz, 6 matrices", "newton_schulz, one rank of eight", "muon_step, 6 matrices"):
        assert f"{title}, bfloat16, on cpu" in text
    assert text.count("torch.optim.Muon again") == 4 and text.count("not stored") == 4
    assert text.count("\nbanks ") == 4
    assert list(tmp_path.iterdir()) == []


def test_the_cases_are_those_of_the_model():
    shapes = bench.model_shapes()
    assert len(shapes) == 66 and sum(rows * columns for rows, columns in shapes) == 31_719_424
    # by hand: half of each symmetric product, for the MLP of four times the width
    figure = 22 * (2.68 + 0.59 + 8.72) * 1e9
    assert newton_schulz_flops(shapes, bench.STEPS) == pytest.approx(figure, rel=0.005)
    share = bench.matrices_of_one_rank(shapes)
    assert sum(shape in ((2048, 512), (512, 2048)) for shape in share) <= 3


def test_compiled_banks_compute_the_iteration():
    matrices = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(40, 24)]
    exact = bench.on_exact_copies(bench.orthogonalize("torch", torch.float64))(matrices)
    assert common.relative_error(bench.by_banks(bench.plain_bank)(matrices), exact) < 0.05


def test_the_goals_are_judged_by_the_best_of_each_side():
    times = {"torch.optim.Muon": 6.0, "torch": 3.0, "compiled banks, graph": 1.8, "triton": 1.5, "triton, graph": 1.2}
    rows = [{"op": "muon_step", "impl": impl, "p50": p50, "floor": 0.4} for impl, p50 in times.items()]
    assert bench.verdicts(rows, 0.6) == [
        "triton, graph is 5.00 times as fast as 'torch.optim.Muon' (goal 6)",
        "triton, graph is 1.50 times as fast as 'compiled banks, graph' (goal 1.5)",
    ]
    alone = [row | {"op": "newton_schulz"} for row in rows]
    assert bench.verdicts(alone, 0.6) == ["triton, graph takes 1.200 ms (goal 0.60), 3.00 of the floor"]
    assert bench.verdicts(rows[:3], 0.6) == []

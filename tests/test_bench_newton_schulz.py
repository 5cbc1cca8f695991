"""The benchmark runs from end to end on a CPU, on small matrices, and keeps nothing."""

import pytest
import torch

from benchmarks import bench_newton_schulz as bench
from benchmarks import common


def test_a_small_run_checks_times_and_keeps_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert bench.main(["--device", "cpu", "--tiny", "--rounds", "1", "--warmup-ms", "0"]) == 0
    text = capsys.readouterr().out
    for title in ("newton_schulz, 6 matrices", "newton_schulz, one rank of eight", "muon_step, 6 matrices"):
        assert f"{title}, bfloat16, on cpu" in text
    assert text.count("torch.optim.Muon again") == 4 and text.count("not kept") == 4
    assert list(tmp_path.iterdir()) == []


def test_the_cases_are_those_of_the_model():
    shapes = bench.model_shapes()
    assert len(shapes) == 66 and sum(rows * columns for rows, columns in shapes) == 31_719_424
    # kernels 2.1: half of each symmetric product, for the MLP of four times the width
    figure = 22 * (2.68 + 0.59 + 8.72) * 1e9
    assert bench.symmetric_flops(shapes) == pytest.approx(figure, rel=0.005)
    share = bench.share_of_eight(shapes)
    assert sum(shape in ((2048, 512), (512, 2048)) for shape in share) <= 3


def test_compiled_banks_compute_the_iteration():
    matrices = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(40, 24)]
    exact = bench.on_exact_copies(bench.orthogonalize("torch", torch.float64))(matrices)
    assert common.relative_error(bench.by_banks(bench._bank)(matrices), exact) < 0.05

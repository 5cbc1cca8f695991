"""The benchmark of evaluation losses runs, checks its results first and refuses wrong ones."""

import math

import pytest
import torch

from benchmarks import bench_window_nll, tune
from benchmarks.bench_head import SOFTCAP, Head
from benchmarks.measure import common
from golf_kernels import dispatch

CPU = torch.device("cpu")


def test_each_form_is_measured(capsys):
    assert bench_window_nll.main(["--device", "cpu", "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert "window_nll, 96x16x300, float32, on cpu" in printed
    assert [line.split()[0] for line in printed.splitlines() if " eager " in line] == ["compile", "torch", "compile"]


def test_a_wrong_loss_has_no_time():
    case = bench_window_nll.make_case(40, 8, 30, torch.float32, CPU)
    wrong = common.Variant("wrong", lambda given: [1.001 * bench_window_nll.plain_nll(*given)])
    with pytest.raises(common.CheckFailed, match="window_nll, wrong"):
        common.measure(case, [wrong], common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0))


def test_the_truth_is_the_formula():
    hidden, weight = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [3.0]])
    (losses,) = bench_window_nll.exact(Head(hidden, weight, torch.tensor([1, 0])))
    for row, target in ((0, 1), (1, 0)):
        capped = [SOFTCAP * math.tanh(float(hidden[row]) * float(w) / SOFTCAP) for w in weight]
        loss = math.log(sum(math.exp(z) for z in capped)) - capped[target]
        assert abs(float(losses[row]) - loss) < 1e-12


def test_tuning_measures_it_as_a_call(monkeypatch):
    monkeypatch.setattr(dispatch, "available_backends", lambda op, device: ["triton", "torch"])
    (candidate,) = [one for one in tune.candidates() if one.op == "window_nll"]
    assert candidate == tune.Candidate("window_nll", "triton", in_step=False, has_bench=True)

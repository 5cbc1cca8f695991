"""The head's benchmark runs, checks its results first and refuses wrong ones."""

import re

import pytest
import torch

from benchmarks import bench_head
from benchmarks.measure import common

CPU = torch.device("cpu")


def test_every_vocabulary_is_measured_beside_the_plain_head(capsys):
    arguments = ["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny", "--vocabularies", "300", "1024"]
    assert bench_head.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"softcapped_cross_entropy, (\S+), float32, on cpu", printed) == ["512x64x300", "512x64x1024"]
    assert len(re.findall(r"^torch: \d+\.\d\d x compile$", printed, re.MULTILINE)) == 2
    goals = re.findall(r"^'torch' is \d+\.\d\d times as fast as 'compile'(.*)$", printed, re.MULTILINE)
    assert goals == ["", " (goal 1.0)"]


def test_the_fastest_backend_is_compared_with_the_compiled_chain():
    times = {"compile": 2.6, "torch": 4.0, "triton": 2.5, "triton/32MiB": 2.0}
    peaks = {"compile": 4.5, "torch": 1.0, "triton": 0.5, "triton/32MiB": 0.4}
    assert bench_head.verdict(times, peaks, 8192) == (
        "'triton/32MiB' is 1.30 times as fast as 'compile' (goal 1.3) and takes 4.10 GB less (goal 1.5)"
    )
    assert bench_head.verdict(times, {}, 300) == "'triton/32MiB' is 1.30 times as fast as 'compile'"


def test_a_gradient_that_is_wrong_has_no_time():
    case = bench_head.make_case(40, 8, 30, torch.float32, CPU)

    def wrong(given):
        loss, d_hidden, d_weight = bench_head.with_gradients(bench_head.plain_loss, given)
        return [loss, d_hidden, 1.001 * d_weight]

    with pytest.raises(common.CheckFailed, match="softcapped_cross_entropy, wrong"):
        common.measure(case, [common.Variant("wrong", wrong)], common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0))
    # three products of 40 x 8 x 30
    assert case.flops == 3 * 2 * 40 * 8 * 30

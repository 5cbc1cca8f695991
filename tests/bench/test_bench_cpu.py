"""The benchmark of a CPU measures both steps and Muon, on small shapes, and refuses what it cannot measure."""

import re
import sys

import pytest
import torch

from benchmarks import bench_cpu
from benchmarks.measure.step_variants import step_config

ARGUMENTS = ["--device", "cpu", "--tiny", "--rounds", "1", "--warmup-ms", "0"]


def test_both_steps_and_the_optimizers_are_measured(capsys, monkeypatch):
    # not installed
    monkeypatch.setitem(sys.modules, "heavyball", None)
    assert bench_cpu.main([*ARGUMENTS, "--tokens", "512"]) == 0
    captured = capsys.readouterr()
    assert "heavyball.Muon is left out" in captured.err
    text = captured.out
    assert re.search(r"^golf_kernels\.Muon, 18 matrices: \S+ ms, \S+ times as fast as torch\.optim\.Muon$", text, re.M)
    line = r"^quickstart, 512 tokens, before recurrence: trainer is \d+\.\d\d times as fast as plain$"
    assert re.search(line, text, re.M)


def test_an_optimizer_that_fails_or_moves_elsewhere_is_named(capsys, monkeypatch):
    def fail(weights):
        raise RuntimeError("no compiler\nand more")

    found = bench_cpu.muons()

    def go_uphill(weights):
        return torch.optim.SGD(weights, lr=0.02, maximize=True)

    monkeypatch.setattr(bench_cpu, "muons", lambda: found | {"a": fail, "b": go_uphill})
    clock = bench_cpu.common.Clock(bench_cpu.CPU, rounds=1)
    assert not bench_cpu.measure_muon(clock, [(8, 16), (16, 8)])
    text = capsys.readouterr().out
    assert "a is left out: no compiler\n" in text
    assert re.search(r"^b, 2 matrices: .*, FAILED: cosine of the updates -0\.\d\d$", text, re.M)


def test_the_plain_step_is_the_trainers():
    config = step_config("quickstart", bench_cpu.CPU, tiny=True).replace(train_batch_tokens=8 * 4 * 64)
    plain, trainer = (bench_cpu.step_variant(name, config, 1) for name in ("plain", "trainer"))
    tokens = bench_cpu.np.arange(4 * 65, dtype=bench_cpu.np.uint16).reshape(4, 65) % 512
    for recurrence in (False, True):
        assert float(plain.run(tokens, recurrence)) == pytest.approx(float(trainer.run(tokens, recurrence)), rel=1e-5)


def test_tokens_are_whole_sequences(capsys):
    with pytest.raises(SystemExit):
        bench_cpu.main([*ARGUMENTS, "--tokens", "100"])
    assert "--tokens: expected a multiple of 64, found 100" in capsys.readouterr().err

"""Seconds to the first step, cold and warm, by the trainer itself."""

import os
import sys

import pytest

from benchmarks import bench_start


def test_the_trainer_is_stopped_at_its_first_step_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_start.main(["--tiny", "--device", "cpu", "--recipe", "quickstart"]) == 0
    cold, warm = capsys.readouterr().out.splitlines()
    assert cold.startswith("quickstart, cold cache, on cpu, goal 90 s: first step after ")
    assert warm.startswith("quickstart, warm cache, on cpu, goal 20 s: first step after ")
    assert "compilation and warm-up" in cold


def test_a_trainer_that_dies_is_told_of_with_its_last_words() -> None:
    command = [sys.executable, "-c", "print('well'); raise SystemExit('no memory')"]
    with pytest.raises(bench_start.StartFailed, match="well\nno memory"):
        bench_start.first_step(command, dict(os.environ))

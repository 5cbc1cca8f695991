"""Seconds until the first step: from the start of the process, part by part, and in the log."""

import subprocess
import sys
import time

import pytest
import torch

from train.run import clocks as startup
from train.run.clocks import StartUp, process_seconds


def test_the_time_before_python_read_a_line_counts() -> None:
    code = "import time; time.sleep(0.5); from train.run.clocks import process_seconds; print(process_seconds())"
    before = time.monotonic()
    counted = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    # torch is imported after the sleep; a process's start is known to 10 ms
    assert 0.5 < counted < time.monotonic() - before + 0.02


def test_without_proc_it_counts_from_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(startup.Path, "read_text", missing)
    monkeypatch.setattr(startup, "_IMPORTED", time.monotonic() - 7.0)
    assert process_seconds() == pytest.approx(7.0, abs=0.5)


def test_parts_follow_each_other_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([8.0, 11.5, 60.0])
    monkeypatch.setattr(startup, "process_seconds", lambda: next(times))
    start = StartUp(torch.device("cpu"))
    start.end("data and model")
    start.end("compilation and warm-up")
    assert start.parts == {"start": 8.0, "data and model": 3.5, "compilation and warm-up": 48.5}
    assert str(start) == "first step after 60.0 s (start 8.0, data and model 3.5, compilation and warm-up 48.5)"

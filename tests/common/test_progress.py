"""The first line of each command, and progress by an injected clock: when a line comes, its rate, the time left."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.common.progress import Progress, announce


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_the_first_line_comes_within_seconds_and_the_next_after_20(capsys: pytest.CaptureFixture[str]) -> None:
    clock, lines = Clock(), []
    with Progress(1000, "training", "steps", now=clock) as bar:
        for second in range(1, 61):
            clock.seconds += 1
            bar.advance(2, lambda: f"{bar.rate * 2048:,.0f} tokens/s")
            lines += [(second, line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        (5, "training: 10/1,000 steps (1 %), 2 steps/s, 4,096 tokens/s, 8 min left"),
        (25, "training: 50/1,000 steps (5 %), 2 steps/s, 4,096 tokens/s, 8 min left"),
        (45, "training: 90/1,000 steps (9 %), 2 steps/s, 4,096 tokens/s, 8 min left"),
    ]


def test_the_rate_forgets_what_was_slower() -> None:
    clock = Clock()
    bar = Progress(100, "work", "files", now=clock)
    for seconds in [10.0] * 10 + [1.0] * 50:
        clock.seconds += seconds
        bar.advance()
    assert bar.rate == 1.0 and bar.seconds_left == 40.0


def test_resumed_work_counts_only_what_is_done_now_and_a_limit_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = Progress(1000, "training", "steps", done=500, now=clock, limit=130.0)
    clock.seconds += 10
    bar.advance(5)
    assert bar.rate == 0.5 and bar.seconds_left == 20.0
    assert capsys.readouterr().out == "training: 505/1,000 steps (50 %), 0.5 steps/s, 20 s left\n"


def test_a_terminal_shows_a_bar_with_the_same_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with Progress(8, "training", "steps", now=clock) as bar:
        clock.seconds += 4
        bar.advance(2, "loss 6.9")
        assert bar.bar is not None
        shown = str(bar.bar)
    assert " 25%|" in shown and "| training: 2/8 steps (25 %), 0.5 steps/s, loss 6.9, 12 s left" in shown
    assert capsys.readouterr().out == ""


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(8, "training", "steps", enabled=False, now=clock) as bar:
        clock.seconds += 99
        bar.advance(1, lambda: pytest.fail("no rank but the first needs the text"))
    assert capsys.readouterr() == ("", "")


def test_every_command_says_something_before_it_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    commands = {
        "train --run_id mine": "python -m train: recipe quickstart, run folder runs/mine; loading PyTorch",
        "train --describe": "python -m train: recipe quickstart, figures of the recipe; loading PyTorch",
        "train.artifact inspect x": "python -m train.artifact: loading PyTorch",
        "train.evaluate x": "python -m train.evaluate: loading PyTorch",
        "train.export x --to hf": "python -m train.export: loading PyTorch",
        "train.generate x": "python -m train.generate: loading PyTorch",
        "train.quantize x": "python -m train.quantize: x; loading PyTorch",
        "train.submission code baseline": "python -m train.submission code: loading libraries",
        "benchmarks report": "python -m benchmarks: loading PyTorch",
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    started = {
        command: subprocess.Popen(
            [sys.executable, "-m", *command.split()],
            cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command in commands
    }  # fmt: skip
    for command, process in started.items():
        assert process.communicate()[0] == f"{commands[command]}\ntorch is imported\n", command


def test_reading_runs_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "train.runs", "list", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: no run in it\n"), done.stderr


def test_under_torchrun_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        announce(f"rank {rank}")
    assert capsys.readouterr() == ("", "rank 0\n")

"""The script for the first minutes on a GPU, with made programs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["gpu", "install", "doctor"]


def run(folder: Path, *arguments: str, python: str = "exit 0") -> tuple[int, list[list[str]], list[str]]:
    """The exit code, the rows of the summary and the commands, with a `python` that runs this shell code."""
    programs = folder / "bin"
    programs.mkdir()
    for name, code in (("python", f'echo "$@" >> {folder}/calls; {python}'), ("nvidia-smi", "echo made")):
        (programs / name).write_text(f"#!/bin/bash\n{code}\n")
        (programs / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python")}
    command = ["bash", str(ROOT / "benchmarks/on_gpu.sh"), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    summary = folder / "out" / "summary.md"
    rows = [line.strip("| ").split(" | ") for line in summary.read_text().splitlines()[2:]] if summary.exists() else []
    calls = folder / "calls"
    return done.returncode, rows, calls.read_text().splitlines() if calls.exists() else []


def test_every_stage_runs_and_is_in_the_summary(tmp_path: Path) -> None:
    code, rows, calls = run(tmp_path, "9", str(tmp_path / "out"))
    assert code == 0 and {row[1] for row in rows} == {"ok"}
    names = [row[0] for row in rows]
    assert names[:3] == STAGES and names[-3:] == ["tune", "step", "show"]
    # each file of tests of a Triton kernel has its stage
    files = {path.stem for path in (ROOT / "tests/kernels").glob("test_*_triton.py")}
    assert len(files) > 5 and files <= set(names)
    assert calls[0] == "-m pip install --no-build-isolation --no-deps -e ."
    assert "-m golf_kernels tune --minutes 6" in calls or "-m golf_kernels tune --minutes 7" in calls
    assert all((tmp_path / "out" / f"{name}.txt").is_file() for name in names)


def test_a_stage_that_fails_costs_only_itself(tmp_path: Path) -> None:
    code, rows, _ = run(tmp_path, "9", str(tmp_path / "out"), python='case "$*" in *golf_kernels) exit 3;; esac')
    verdicts = {row[0]: row[1] for row in rows}
    assert code == 1 and verdicts["doctor"] == "exit code 3" and verdicts["tune"] == verdicts["step"] == "ok"


def test_a_stage_that_hangs_is_stopped(tmp_path: Path) -> None:
    code, rows, _ = run(tmp_path, "1", str(tmp_path / "out"), python='case "$*" in *xsa*) sleep 60;; esac')
    verdicts = {row[0]: row[1] for row in rows}
    assert code == 1 and verdicts["test_xsa_triton"] == "stopped after 6 s" and verdicts["step"] == "ok"


@pytest.mark.parametrize("minutes", ["0", "nine", "-1"])
def test_minutes_are_whole(minutes: str, tmp_path: Path) -> None:
    assert run(tmp_path, minutes, str(tmp_path / "out")) == (2, [], [])

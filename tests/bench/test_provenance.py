"""benchmarks.report.provenance: the commit in a row, and a checksum of the sources where there is none."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_rows import row, write

from benchmarks.measure import common
from benchmarks.report import provenance
from benchmarks.report.results import Measurement, newest, read_results

Git = Callable[..., str]
IDENTITY = ("-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false")


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """A repository in place of the project's, with its folders; calls git there and returns what it says."""
    root = tmp_path / "project"
    for name in ("benchmarks/results", "benchmarks/plots", "golf_kernels"):
        (root / name).mkdir(parents=True)
        (root / name / "file.py").write_text("x = 1\n")
    (root / "README.md").write_text("text\n")
    monkeypatch.setattr(provenance, "ROOT", root)
    # nothing around the folder, and none of this machine's settings
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def run(*arguments: str) -> str:
        command = ["git", *IDENTITY, *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    run("init", "-q")
    run("add", "-A")
    run("commit", "-qm", "first")
    return run


def commit(git: Git) -> str:
    git("commit", "-q", "--allow-empty", "-m", "next")
    return git("rev-parse", "--short=12", "HEAD")


def at(minute: int, code: str, impl: str = "golf", ms: float = 2.0, **changes: object) -> dict[str, object]:
    times = {"p50": ms, "p20": 0.99 * ms, "p80": 1.01 * ms}
    return row(date=f"2026-01-01T10:{minute:02d}:00Z", commit=code, impl=impl, **times, **changes)


def rows(folder: Path, *made: dict[str, object]) -> list[Measurement]:
    write(folder / "results" / "Made_GPU.csv", list(made))
    return read_results(folder / "results")


def test_a_call_that_became_short_enough_for_a_graph_has_one_newest_time(tmp_path: Path) -> None:
    made = rows(tmp_path, at(1, "aaaaaaa", "triton", ms=0.2), at(2, "bbbbbbb", "triton", ms=0.05, mode="graph"))
    assert [m.p50 for m in newest(made).values()] == [0.05]
    steps = rows(tmp_path, *(at(1, "aaaaaaa", mode=f"{phase} recurrence") for phase in ("before", "after")))
    assert len(newest(steps)) == 2


def test_results_plots_and_texts_are_no_changes_and_sources_are(git: Git) -> None:
    root = provenance.ROOT
    here = git("rev-parse", "--short=12", "HEAD")
    assert provenance.read_version() == (here, False, "")
    for name in ("README.md", "benchmarks/results/file.py", "benchmarks/results/new.csv", "benchmarks/plots/new.png"):
        (root / name).write_text("changed")
    (root / "session").mkdir()
    (root / "session" / "step.txt").write_text("new")
    assert provenance.read_version() == (here, False, "")
    # a new kernel is imported as a changed one is
    (root / "golf_kernels" / "new_triton.py").write_text("new")
    assert provenance.read_version() == (here, True, "")
    (root / "golf_kernels" / "new_triton.py").unlink()
    (root / "golf_kernels" / "file.py").write_text("changed")
    assert provenance.read_version() == (here, True, "")


@pytest.mark.parametrize("how", ["no repository", "no git", "not in it", "somebody else's"])
def test_without_a_commit_a_checksum_stands_for_it_and_is_said(
    how: str, git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = provenance.ROOT
    said = "to have commits, measure in a clone of the repository"
    if how == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif how == "somebody else's":
        # git's own switch for its tests
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        said = f"to have commits, run: git config --global --add safe.directory {root}"
    else:
        (root / ".git").rename(tmp_path / ("elsewhere" if how == "no repository" else ".git"))
        monkeypatch.delenv("GIT_CEILING_DIRECTORIES")
        if how == "no repository":
            monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    found = provenance.read_version()
    assert found.commit.startswith("src-") and len(found.commit) == 16 and not found.dirty and found.problem
    (root / "README.md").write_text("changed")
    assert provenance.read_version() == found
    (root / "golf_kernels" / "file.py").write_text("changed")
    assert provenance.read_version().commit != found.commit

    monkeypatch.setattr(provenance, "code_version", lambda: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made GPU")
    common.parser("bench_x", "x").parse_args(["--device", "cuda"])
    warned = capsys.readouterr().err
    assert (
        warned
        == f"warning: no commit is known ({found.problem}): rows are marked {found.commit}, a checksum of the sources; {said}\n"
    )
    common.parser("bench_x", "x").parse_args(["--device", "cpu"])
    assert capsys.readouterr().err == ""


def test_the_version_is_that_of_the_beginning(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.code_version.cache_clear()
    begun = common.environment(torch.device("cpu"))
    assert begun["commit"] == git("rev-parse", "--short=12", "HEAD") and begun["dirty"] == 0
    commit(git)
    (provenance.ROOT / "golf_kernels" / "file.py").write_text("changed")
    later = common.environment(torch.device("cpu"))
    provenance.code_version.cache_clear()
    assert (later["commit"], later["dirty"]) == (begun["commit"], 0)

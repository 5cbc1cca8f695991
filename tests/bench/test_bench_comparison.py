"""Before and after: by ancestry where git knows both commits, by the clock elsewhere; dirty rows; names of commits."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_rows import row, write

from benchmarks.measure import common
from benchmarks.report import provenance
from benchmarks.report.comparison import compare
from benchmarks.report.results import Measurement, ResultsError, codes_by_age, newest, read_results

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


def test_the_clock_decides_per_subject_where_git_knows_nothing(tmp_path: Path) -> None:
    # golf was measured at a after it was at b, whatever was done with torch
    made = rows(tmp_path, at(1, "aaaaaaa", "torch"), at(5, "aaaaaaa", ms=70), at(3, "bbbbbbb", ms=90))
    with pytest.raises(ResultsError, match="nothing measured there was measured again"):
        compare(made, "aaaaaaa")
    (change,) = compare(made, "bbbbbbb")
    assert (change.before.commit, change.after.commit, change.ratio) == ("bbbbbbb", "aaaaaaa", 70 / 90)


def test_the_second_turn_of_the_first_way_is_compared_with_nothing(tmp_path: Path) -> None:
    made = [
        at(minute, code, name, ms=minute)
        for minute, code in ((1, "aaaaaaa"), (2, "bbbbbbb"))
        for name in ("torch", "torch again")
    ]
    assert [change.before.subject.impl for change in compare(rows(tmp_path, *made), "aaaaaaa")] == ["torch"]


def test_ancestry_decides_whatever_the_clock_says(git: Git, tmp_path: Path) -> None:
    first, second, third = (commit(git) for _ in range(3))
    # the newest code was measured first, and the oldest last
    made = rows(tmp_path, at(1, third, ms=1), at(2, second, ms=2), at(3, first, ms=4))
    (change,) = compare(made, first)
    assert (change.before.commit, change.after.commit, change.ratio) == (first, third, 0.25)
    (change,) = compare(made, second)
    assert (change.before.commit, change.after.commit) == (second, third)
    with pytest.raises(ResultsError, match="measured again since"):
        compare(made, third)
    # tables and plots go the same way
    assert [m.commit for m in newest(made).values()] == [third] and codes_by_age(made) == [first, second, third]


def test_commits_that_do_not_descend_from_each_other_go_by_the_clock(git: Git, tmp_path: Path) -> None:
    base = commit(git)
    one = commit(git)
    git("checkout", "-q", "-b", "side", base)
    git("commit", "-q", "--allow-empty", "-m", "other")
    other = git("rev-parse", "--short=12", "HEAD")
    made = rows(tmp_path, at(1, other, ms=3), at(2, one, ms=2), at(3, base, ms=1))
    (change,) = compare(made, "side")
    assert (change.before.commit, change.after.commit) == (other, one)
    assert codes_by_age(made) == [base, other, one]


def test_uncommitted_changes_are_no_baseline_and_are_marked(git: Git, tmp_path: Path) -> None:
    first, second = commit(git), commit(git)
    clean, dirty = at(1, first, ms=2), at(2, first, ms=3, dirty=1)
    (change,) = compare(rows(tmp_path, clean, dirty), first)
    assert (change.before.code, change.after.code) == (first, f"{first} + changes") and change.ratio == 1.5
    # a commit after it takes its place, whenever that was measured, and so does the commit itself measured later
    (change,) = compare(rows(tmp_path, clean, dirty, at(1, second)), first)
    assert change.after.code == second
    with pytest.raises(ResultsError, match="measured again since"):
        compare(rows(tmp_path, dirty, at(3, first)), first)
    with pytest.raises(ResultsError, match="measured only with uncommitted changes, which are no baseline"):
        compare(rows(tmp_path, dirty, at(3, second)), first)


def test_whatever_git_takes_for_a_commit_names_one(git: Git, tmp_path: Path) -> None:
    first, second = commit(git), commit(git)
    git("tag", "-a", "v1", "-m", "a tag of its own", first)
    made = rows(tmp_path, at(1, first), at(2, second))
    for name in (first, first[:4], git("rev-parse", first), first.upper(), "HEAD~1", "main~1", "v1", "@~"):
        assert [change.before.commit for change in compare(made, name)] == [first]
    third = commit(git)
    with pytest.raises(ResultsError, match=f"'HEAD', {third}: expected a commit at which something was measured"):
        compare(made, "HEAD")


@pytest.mark.parametrize("revision", ["", " "])
def test_nothing_is_no_name_of_a_commit(revision: str, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=f"'{revision}': expected a commit .*there are: aaaaaaa, bbbbbbb"):
        compare(rows(tmp_path, at(1, "aaaaaaa"), at(2, "bbbbbbb")), revision)


def test_a_name_of_several_commits_is_refused(git: Git, tmp_path: Path) -> None:
    made = rows(tmp_path, at(1, "ab1aaaa"), at(2, "ab2bbbb"))
    with pytest.raises(ResultsError, match="'ab': expected one commit, this fits ab1aaaa, ab2bbbb: type more of it"):
        compare(made, "ab")
    assert len(compare(made, "ab1")) == 1
    # one commit under names of two lengths is one
    first, second = commit(git), commit(git)
    (change,) = compare(rows(tmp_path, at(1, first), at(2, first[:8], ms=3), at(3, second)), first[:5])
    assert change.before.p50 == 3.0
    assert change.after.commit == second


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
    # such a row can be compared with
    made = rows(tmp_path, at(1, found.commit), at(2, "src-0123456789ab"))
    assert len(compare(made, found.commit[:8])) == 1


def test_the_version_is_that_of_the_beginning(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.code_version.cache_clear()
    begun = common.environment(torch.device("cpu"))
    assert begun["commit"] == git("rev-parse", "--short=12", "HEAD") and begun["dirty"] == 0
    commit(git)
    (provenance.ROOT / "golf_kernels" / "file.py").write_text("changed")
    later = common.environment(torch.device("cpu"))
    provenance.code_version.cache_clear()
    assert (later["commit"], later["dirty"]) == (begun["commit"], 0)

"""A session on a GPU: its order, its limits, and what a kill at any moment leaves behind."""

import csv
import glob
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_rows import row, write

from benchmarks import session
from benchmarks.__main__ import main
from benchmarks.report.results import ResultsError
from benchmarks.session import Job, Session, gpu_tests, op_benches, plan, run_session
from train.common.errors import UserError, main_guard

ROOT = Path(__file__).resolve().parents[2]


def script(code: str) -> list[str]:
    return ["-c", code]


def test_every_benchmark_and_every_test_of_a_gpu_has_its_place() -> None:
    jobs = plan()
    modules = {command[1] for job in jobs for command in job.commands.values()}
    written = {f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("bench_*.py")}
    # it wants a finished run
    assert written - modules == {"benchmarks.bench_artifact"}
    assert [job.name for job in jobs][:2] == ["step", "step_without_kernels"]
    assert {"test_loop_gpu", "test_cuda_graph", "test_muon_triton"} <= {path.stem for path in gpu_tests()}
    assert "test_config" not in {path.stem for path in gpu_tests()} and op_benches()[-3:] == [
        "gptq",
        "int6",
        "quantize",
    ]
    labels = [label for job in jobs for label in job.commands]
    assert len(labels) == len(set(labels))


def test_jobs_end_well_fail_or_are_stopped_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def meet(own: str, other: str) -> list[str]:
        paths = f"own, other = Path({str(tmp_path / own)!r}), Path({str(tmp_path / other)!r})"
        return script(f"from pathlib import Path; {paths}\nown.touch()\nwhile not other.exists(): pass")

    jobs = [
        Job("fine", 60, {"fine": script("print('so far')")}),
        Job("broken", 60, {"broken": script("print('why'); raise SystemExit(3)")}),
        Job("plain", 60, {"plain": script("print('instead')")}, instead_of="broken"),
        Job("unneeded", 60, {"unneeded": script("print('never')")}, instead_of="fine"),
        Job("endless", 4.0, {"a": script("print(1)"), "b": script("import time; print('begun'); time.sleep(60)"), "c": script("")}),
        Job("together", 60, {"d": meet("d", "e"), "e": meet("e", "d")}, at_once=2),
        Job("some_left", 60, {"f": script("raise SystemExit(5)"), "g": script("")}),
        Job("none_left", 60, {"h": script("print('no GPU'); raise SystemExit(5)")}),
    ]  # fmt: skip
    assert not Session(tmp_path / "out", 300, tmp_path / "results").run(jobs)
    verdicts = {job.name: job.verdict for job in jobs}
    assert verdicts == {
        "fine": "ok", "broken": "broken failed (3)", "plain": "ok", "unneeded": "not needed, fine ran",
        "endless": "b stopped at the limit; stopped before c", "together": "ok", "some_left": "ok",
        "none_left": "not possible here",
    }  # fmt: skip
    assert (tmp_path / "out" / "b.txt").read_text() == "begun\n" and not (tmp_path / "out" / "c.txt").exists()
    assert "not possible here, 0 s\n          | no GPU\n" in capsys.readouterr().out
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| broken | broken failed (3) |" in summary and "there is no figure here" in summary


def test_a_process_that_hangs_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "a_kernel=triton       10.00 →     9.00   -10.0%  faster"
    commands = {"a": script("import time; time.sleep(60)"), "b": script(f"print('other → line'); print({said!r})")}
    jobs = [Job("several", 60, commands, each_s=3), Job("late", 60, {"c": script("")})]
    assert not Session(tmp_path / "out", 300, tmp_path / "results").run(jobs)
    assert [job.verdict for job in jobs] == ["a stopped at 3 s", "ok"] and jobs[0].seconds < 30
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert f"ms per step of the first variant and of this one:\n\n```\n{said}\n```\n" in summary
    assert "`python -m benchmarks session --minutes 1 --out session_2 --only several`" in summary


def test_kernels_that_fail_are_left_out_of_the_step_that_is_offered(tmp_path: Path) -> None:
    commands = {"kernel_xsa": script("raise SystemExit(1)"), "kernel_muon_step": script("import time; time.sleep(60)")}
    jobs = [Job("kernel", 60, commands | {"kernel_other": script("")}, each_s=3)]
    assert not Session(tmp_path / "out", 300, tmp_path / "results").run(jobs)
    command = "`python -m benchmarks.bench_step --variants published,torch,golf-xsa-muon_step`"
    assert f"To measure the other kernels together: {command}\n" in (tmp_path / "out" / "summary.md").read_text()
    # for want of time no kernel has failed
    jobs[0].verdict = "kernel_xsa stopped at the limit; stopped before kernel_other"
    assert "other kernels" not in session.rest(jobs)


def test_tests_that_never_ran_are_counted_and_the_one_that_ran_last_is_named(tmp_path: Path) -> None:
    tests = tmp_path / "test_made.py"
    tests.write_text(
        "import os, pytest\n@pytest.mark.parametrize('n', ['a b', 'c'])\ndef test_quick(n): pass\n"
        "def test_wrong(): assert 0\ndef test_bad(): os.kill(os.getpid(), 9)\ndef test_never(): pass\ndef test_other(): pass\n"
    )
    flags = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-k", "not other"]
    # as the plan has it
    command = [flag for flag in session._test(ROOT / "tests" / "test_made_triton.py", False) if "made" not in flag]
    job = Job("tests", 60, {"test_made": [*command, *flags, str(tests)]})
    assert not Session(tmp_path / "out", 300, tmp_path / "results").run([job])
    assert job.verdict == "test_made failed (-9) in test_bad, 3 of 5 tests had ended"
    # stopped at a limit before it has collected anything, or no file of tests at all
    (tmp_path / "out" / "early.txt").write_text("imports\n")
    assert Session(tmp_path / "out", 300, tmp_path / "results")._reached("early") == ""


def test_a_file_of_tests_goes_on_behind_a_test_that_fails() -> None:
    (tests,) = (job for job in plan() if job.name == "tests")
    assert tests.commands and not any("-x" in command for command in tests.commands.values())


def test_longer_sessions_have_longer_limits() -> None:
    def limits(seconds: float, *names: str) -> list[tuple[float, float]]:
        jobs = [job for job in plan() if not names or job.name in names]
        session.stretch(jobs, seconds)
        return [(job.limit_s, job.each_s) for job in jobs]

    short = limits(900)
    assert limits(60) == [(60, each) for _, each in short]
    assert limits(7200) == [(4 * limit, 4 * each) for limit, each in short]
    # alone a job has all the time, and so has what is run in its place
    assert limits(540, "step", "step_without_kernels") == [(540, float("inf")), (pytest.approx(270), float("inf"))]


@pytest.mark.parametrize(("gigabytes", "files"), [(9.7, 1), (40, 2), (80, 4), (141, 4)])
def test_test_files_share_a_gpu_as_far_as_its_memory_goes(
    gigabytes: float, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: memory)
    assert session.tests_at_once() == files


def test_jobs_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_session(tmp_path, 9, "step,tests,int6", "tests", tiny=False, listing=True) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "int6"]
    assert run_session(tmp_path, 9, "", "step", tiny=False, listing=True) == 0
    assert capsys.readouterr().out.startswith("kernel ")
    assert run_session(tmp_path, 9, "step_without_kernels", tiny=False, listing=True) == 0
    assert capsys.readouterr().out.startswith("step_without_kernels ")
    with pytest.raises(ValueError, match="--skip: no job nothing: expected some of step,"):
        run_session(tmp_path, 9, "", "nothing", tiny=False, listing=True)
    with pytest.raises(ValueError, match="--skip: no job is left"):
        run_session(tmp_path, 9, "int6", "int6", tiny=False, listing=True)


def test_each_kernel_has_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {job.name: job.commands for job in plan()}
    assert commands["kernel"]["kernel_muon_step"][-2:] == ["--variants", "torch,muon_step=triton"]
    assert len(commands["kernel"]) > 4
    assert commands["graph"]["graph"][-2:] == ["--variants", "torch,torch+optimizer_graph=on"]
    monkeypatch.setattr(session, "step_kernels", list)
    assert "kernel" not in {job.name for job in plan()}


def test_what_cannot_run_here_is_no_failure(tmp_path: Path) -> None:
    assert Session(tmp_path / "out", 300, tmp_path / "results").run(
        [Job("none_left", 60, {"a": script("raise SystemExit(5)"), "b": script("raise SystemExit(5)")})]
    )


def test_the_rows_of_this_session_alone_are_kept(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write(results / "Made_GPU.csv", [row(op="old"), row(op="new", date="2999-01-01T00:00:00Z")])
    assert Session(tmp_path / "out", 300, results).run([Job("nothing", 60, {"nothing": script("")})])
    with (tmp_path / "out" / "Made_GPU.csv").open(newline="") as file:
        assert [kept["op"] for kept in csv.DictReader(file)] == ["new"]
    assert "| new | torch, eager |" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize("damage", [b"2999-01-01T0", b"2999-01-01T00:00:00Z,\xff\0\r\n", b"\xff\xfe,\r\n"])
def test_damage_by_a_job_ends_no_session_and_is_named(damage: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "results" / "Made_GPU.csv", [row(op="new", date="2999-01-01T00:00:00Z")])
    tear = f"open({str(path)!r}, 'ab').write({damage!r})"
    jobs = [Job("tears", 60, {"tears": script(tear)}), Job("after", 60, {"after": script("")})]
    assert Session(tmp_path / "out", 300, tmp_path / "results").run(jobs)
    kept = (tmp_path / "out" / "Made_GPU.csv").read_bytes()
    assert kept == path.read_bytes() if damage.startswith(b"2999") else kept + damage == path.read_bytes()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| after | ok |" in summary
    assert ("Made_GPU.csv, line 3: " in summary) == damage.startswith(b"2999")


def test_a_session_with_a_damaged_file_of_results_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "results" / "Made_GPU.csv", [row(p50="nan")])
    monkeypatch.setattr(session, "RESULTS", tmp_path / "results")
    with pytest.raises(ResultsError, match=r"Made_GPU\.csv, line 2: p50: expected a number"):
        run_session(tmp_path / "out", 1, "int6", tiny=True, listing=False)
    assert not (tmp_path / "out").exists()


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    job = Job("late", 60, {"late": script("print(1)")})
    assert Session(tmp_path / "out", session.SHORTEST_S - 1, tmp_path).run([job])
    assert (
        job.verdict == "not reached"
        and "| late | not reached | 0 | – |" in (tmp_path / "out" / "summary.md").read_text()
    )


def test_a_kill_in_the_middle_leaves_the_output_and_a_summary_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "session",
        "--tiny",
        "--out",
        str(out),
        "--only",
        "step_after_recurrence,int6",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "step_after_recurrence" in process.stdout.readline()
    output = out / "step_after_recurrence.txt"
    for _ in range(600):
        if output.exists() and "attention" in output.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert "attention: " in output.read_text()
    summary = (out / "summary.md").read_text()
    assert "| step_after_recurrence | interrupted |" in summary and "| int6 | not reached |" in summary
    # -lname only reads the link, and of other people's processes it reads none
    found = subprocess.run(
        ["find", *glob.glob("/proc/[0-9]*/fd"), "-name", "1", "-lname", str(output.resolve())],
        capture_output=True, text=True,
    )  # fmt: skip
    writers = found.stdout.split()
    assert writers == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 128 + signal.SIGHUP), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_signal_leaves_a_process_behind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(99)'])"
    begin = (
        # a shell's background jobs ignore interrupts, nohup's hangups, and their children with them
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
        "import benchmarks.session as s; from train.common.errors import main_guard;"
        f"s.plan = lambda tiny: [s.Job('long', 99, {{'long': ['-c', {child!r}]}})];"
        f"main_guard(lambda: s.run_session(s.Path({str(tmp_path / 'out')!r}), 9, '', tiny=True, listing=False))"
    )
    # a terminal's interrupt reaches the foreground alone, and jobs are none of it
    process = subprocess.Popen([sys.executable, "-c", begin], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    output = tmp_path / "out" / "long.txt"
    assert until(lambda: output.exists() and output.read_text().endswith("\n"))
    process.send_signal(number)
    assert process.wait(timeout=30) == code and "Traceback" not in process.stderr.read()
    assert "| long | interrupted |" in (tmp_path / "out" / "summary.md").read_text()
    grandchild = Path("/proc", output.read_text().strip(), "stat")
    # one that nobody has waited for yet runs no more
    assert until(lambda: not grandchild.exists() or " Z " in grandchild.read_text())


def until(holds: Callable[[], bool]) -> bool:
    """Whether it came to hold within a minute."""
    end = time.monotonic() + 60
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), 0.0, -1.0, 0.2])
def test_a_session_without_time_for_a_job_is_refused(minutes: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--minutes: expected at least 0\.25, because no job starts with less"):
        run_session(tmp_path / "out", minutes, "step", tiny=True, listing=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["session", "--tiny", "--out", "file"], "error: file: Not a directory: choose another path"),
        (["--results", "elsewhere", "session", "--list"], "error: --results: a session always appends to"),
    ],
)
def test_a_bad_argument_ends_with_a_sentence(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr("sys.argv", ["benchmarks", *given])
    with pytest.raises(SystemExit) as ended:
        main_guard(main)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_a_session_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no job nothing: expected some of step, step_without_kernels"):
        run_session(tmp_path, 1, "nothing", tiny=True, listing=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="the folder is not empty"):
        run_session(tmp_path, 1, "step", tiny=True, listing=False)
    assert run_session(tmp_path, 1, "", tiny=False, listing=True) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("step ") and "60 s at most  python -m benchmarks.bench_step --rounds 15" in listed[0]
    assert listed[1].endswith("--variants published,torch  (if step failed)")
    assert any("python -m pytest" in line and line.endswith(" more)") for line in listed)


def test_a_tiny_session_gives_each_process_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def note(self: Session, jobs: list[Job]) -> bool:
        threads.append(os.environ.get("OMP_NUM_THREADS"))
        self.keep(jobs)
        return True

    monkeypatch.setattr(Session, "run", note)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    for wanted in ("3", None):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted or "")
        if wanted is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        assert run_session(tmp_path / str(wanted), 1, "int6", tiny=True, listing=False) == 0
    assert threads == ["3", "1"]


def test_backends_that_every_variant_would_refuse_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLF_BACKEND", "xsa=triton")
    with pytest.raises(UserError, match=r"GOLF_BACKEND=xsa=triton is set, .* unset it"):
        run_session(tmp_path / "out", 1, "int6", tiny=True, listing=False)
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU here: --tiny"):
        run_session(tmp_path, 1, "", tiny=False, listing=False)

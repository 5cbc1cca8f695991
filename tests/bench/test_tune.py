"""Tuning with made measurements and a made clock: what is kept, when it ends, and how it goes on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tune
from benchmarks.decide import Candidate, Measurement
from benchmarks.jobs import Job, Outcome, run_job
from golf_kernels import tuned
from train.common.errors import UserError

HERE = {"gpu": "Made GPU", "driver": "1", "torch": "2", "triton": "3", "golf_kernels": "0"}
XSA = Candidate("xsa", "triton", in_step=True, has_bench=True)
INT6 = Candidate("int6", "cuda", in_step=False, has_bench=True)


ATTENTION = ["attention training", "attention evaluation"]


class Machine:
    """Runs made jobs: each takes 10 seconds. `verdicts` has those that do not end well."""

    def __init__(self, **verdicts: str) -> None:
        self.seconds, self.ran, self.verdicts = 0.0, [], verdicts

    def now(self) -> float:
        return self.seconds

    def run(self, job: Job, output: Path) -> Outcome:
        self.seconds += min(10.0, job.limit_s)
        self.ran.append(job.name)
        verdict = self.verdicts.get(
            job.name.replace(" ", "_"), "ok" if job.limit_s >= 10 else f"stopped after {job.limit_s:.0f} s"
        )
        report = {"checks": [{"passed": True, "problem": None, "error": 1e-3, "limit": 5e-2}]}
        return Outcome(verdict, 10.0, f"doctor: running\n{json.dumps(report, indent=2)}")

    def rows(self, since: str) -> list[dict[str, Any]]:
        kind, op = (self.ran or ATTENTION)[-1].split()[:2]
        if kind == "attention":
            return [row(kind, form, ms, op) for form, ms in (("sdpa", 2), ("cudnn", 1), ("sdpa again", 1))]
        if kind == "step":
            return [row("step sp8192_sdclip", "torch", 100), row("step sp8192_sdclip", f"{op}=triton", 80)]
        backend = "triton" if op == "xsa" else "cuda"
        return [
            row(op, form, ms, shape)
            for form, ms in ((backend, 1), ("torch", 3), (f"{backend} again", 9))
            for shape in ("a", "b")
        ]


def row(op: str, impl: str, ms: float, shape: str = "a") -> dict[str, Any]:
    return {"op": op, "impl": impl, "shape": shape, "dtype": "bf16", "p20": 0.9 * ms, "p50": ms, "p80": 1.1 * ms}


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GOLF_CACHE", str(tmp_path))
    return tuned.path_of(HERE)


def tuner(
    path: Path, machine: Machine, *, limit_s: float = 540, recipe: str = "sp8192_sdclip", only: Any = ()
) -> tune.Tuner:
    return tune.Tuner(
        path, HERE, [XSA, INT6], recipe=recipe, limit_s=limit_s, only=only, run=machine.run, rows=machine.rows, now=machine.now
    )  # fmt: skip


def test_everything_is_measured_and_remembered(path: Path) -> None:
    machine = Machine()
    assert tuner(path, machine).run()
    assert sorted(machine.ran[:2]) == ["check int6 cuda", "check xsa triton"]
    assert machine.ran[2:] == ["call xsa", "call int6", *ATTENTION, "step xsa"]
    data = tuned.read(path)
    assert data["decisions"]["xsa"] == {
        "call": {"backend": "triton", "reason": "3.00 x torch"},
        "step": {"backend": "triton", "reason": "1.25 x in the step"},
    }
    # the sum of two shapes, with its spread
    assert data["findings"]["call xsa"]["times"] == {"torch": [5.4, 6.0, 6.6], "triton": [1.8, 2.0, 2.2]}
    assert data["findings"]["check xsa triton"] == {"verdict": "ok", "seconds": 10.0, "error": 1e-3, "limit": 5e-2}
    assert "xsa                         step  triton  1.25 x in the step" in tune.table(data)
    assert data["attention"]["training bf16"]["backend"] == "cudnn"
    assert "attention training bf16: cudnn, fastest, ms forward + backward: cudnn 1.000, sdpa 2.000" in tune.table(data)
    again = Machine()
    assert tuner(path, again).run() and again.ran == []


def test_a_crash_costs_only_its_own_kernel(path: Path) -> None:
    assert tuner(path, Machine(check_xsa_triton="killed by SIGSEGV: illegal memory access")).run()
    data = tuned.read(path)
    assert data["failed"] == ["xsa=triton"] and data["decisions"]["int6"]["call"]["backend"] == "cuda"
    assert (
        data["decisions"]["xsa"]["step"]["reason"] == "triton's check failed: killed by SIGSEGV: illegal memory access"
    )


def test_each_finding_is_kept_at_once_and_the_next_start_goes_on(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # both checks and the first call fit into the time
    machine = Machine()
    assert not tuner(path, machine, limit_s=44).run()
    assert set(tuned.read(path)["findings"]) == {"check xsa triton", "check int6 cuda", "call xsa"}
    assert "the time is up before call int6: type python -m golf_kernels tune again" in capsys.readouterr().out
    rest = Machine()
    assert tuner(path, rest).run() and rest.ran == ["call int6", *ATTENTION, "step xsa"]


def test_what_the_end_of_the_time_has_stopped_is_no_finding(path: Path) -> None:
    machine = Machine()
    machine.run = lambda job, output: Outcome(f"stopped after {job.limit_s:.0f} s", job.limit_s, "")  # type: ignore[method-assign]
    assert not tuner(path, machine, limit_s=60).run()
    assert tuned.read(path)["findings"] == {}
    # with its whole time it hangs
    assert tuner(path, machine).run()
    assert tuned.read(path)["findings"]["check xsa triton"]["verdict"] == "stopped after 120 s"


def test_a_measurement_is_repeated_by_name_and_steps_belong_to_a_recipe(path: Path) -> None:
    tuner(path, Machine()).run()
    again = Machine()
    assert tuner(path, again, only=["call xsa"]).run() and again.ran == ["call xsa"]
    other = Machine()
    todo = tuner(path, other, recipe="sp4096_recurrence")
    assert [one.name for one in todo.todo()] == ATTENTION
    # but what was decided for the first recipe's batches stays
    todo.save()
    assert set(tuned.read(path)["attention"]) == {"training bf16", "evaluation bf16"}


def test_a_damaged_file_is_told_and_written_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text("{")
    tuner(path, Machine()).run()
    assert "is damaged" in capsys.readouterr().out and tuned.read(path)["decisions"]["xsa"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path.parent))

    monkeypatch.setattr(tuned, "write", refuse)
    machine = Machine()
    with pytest.raises(PermissionError):
        tuner(path, machine).run()
    assert machine.ran == []


def test_rows_that_are_missing_and_reports_without_a_check_are_no_success() -> None:
    call, fine = Measurement("call xsa", "call", XSA), Outcome("ok", 1.0, "")
    assert tune.finding_of(call, fine, [row("xsa", "torch", 1)])["verdict"] == "it ended without rows"
    assert tune.finding_of(Measurement("step xsa", "step", XSA), fine, [])["verdict"] == "it ended without rows"
    # the kernel's variants are measured with it, repetitions are not
    rows = [row("xsa", form, 1) for form in ("torch", "triton", "triton/big", "triton/big again")]
    assert set(tune.finding_of(call, fine, rows)["times"]) == {"torch", "triton", "triton/big"}
    check = Measurement("check xsa triton", "check", XSA)
    assert tune.finding_of(check, fine, ())["verdict"] == "no check in the doctor's report"
    report = {"checks": [{"passed": False, "problem": None, "error": 0.3, "limit": 0.05}]}
    failed = tune.finding_of(check, Outcome("exit code 1: }", 1.0, json.dumps(report, indent=2)), ())
    assert failed["verdict"] == "error 3.0e-01, at most 5e-02"


def test_the_commands_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "kernel_problems", lambda: dict.fromkeys(("muon_step", "xsa", "mix_rms_norm"), ""))
    together = Measurement("step all", "step", None, ("muon_step", "xsa"))
    assert tune.job_of(together, "baseline", 9).command[-1] == "torch,golf-mix_rms_norm"
    without = Measurement("step all without xsa", "step", None, ("muon_step", "xsa"), "xsa")
    assert tune.job_of(without, "baseline", 9).command[-1] == "golf-mix_rms_norm,golf-mix_rms_norm-xsa"
    alone = tune.job_of(Measurement("step xsa", "step", XSA, ("xsa",)), "baseline", 9).command
    assert alone == ["-m", "benchmarks.bench_step", "--recipe", "baseline", "--phase", "before", "--rounds", "15", "--variants", "torch,xsa=triton"]  # fmt: skip
    attention = tune.job_of(Measurement("attention training", "attention"), "baseline", 9).command
    assert attention == [
        "-m",
        "benchmarks.bench_attention",
        "--recipe",
        "baseline",
        "--batches",
        "training",
        "--rounds",
        "15",
    ]
    big = XSA._replace(backend="triton/big")
    assert tune.job_of(Measurement("step xsa", "step", big), "baseline", 9).command[-1] == "torch,xsa=triton/big"
    folder = Path(tune.__file__).parent
    assert all((folder / f"{tune.bench_of(op)}.py").is_file() for op in (*tune.BENCHES, "xsa", "int6", "newton_schulz"))


def script(code: str) -> list[str]:
    return ["-c", code]


def test_jobs_end_well_fail_hang_or_crash(tmp_path: Path) -> None:
    for code, verdict in (
        ("print('fine')", "ok"),
        ("print('why'); raise SystemExit(3)", "exit code 3: why"),
        ("import time; print('begun'); time.sleep(60)", "stopped after 3 s"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV: no output"),
    ):
        outcome = run_job(Job("one", script(code), 3.0 if "sleep" in code else 60.0), tmp_path / "out" / "one.txt")
        assert outcome.verdict == verdict and outcome.seconds < 30
    assert outcome.output == (tmp_path / "out" / "one.txt").read_text()


def test_a_kill_leaves_no_process(tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
    code = (
        "from pathlib import Path\nfrom benchmarks.jobs import Job, run_job\n"
        f"run_job(Job('long', ['-c', {inner!r}], 99), Path({str(output)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert until(lambda: output.exists() and output.read_text().endswith("\n"))
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    status = Path("/proc", output.read_text().strip(), "stat")
    # a process that nobody has waited for yet runs no more
    assert until(lambda: not status.exists() or " Z " in status.read_text())


def until(holds: Callable[[], bool]) -> bool:
    """Whether it came to hold within a minute."""
    end = time.monotonic() + 60
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "nan"], "--minutes: expected at least 0.25"),
        (["--minutes", "0.2"], "--minutes: expected at least 0.25"),
        (["--show"], "no CUDA GPU here"),
        ([], "no CUDA GPU here"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "machine", lambda: None)
    with pytest.raises(UserError, match=message):
        tune.main(arguments)


def test_a_machine_without_a_tuned_file_is_told_what_to_type(path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(tuned, "machine", lambda: dict(HERE))
    tuned.forget()
    with pytest.raises(UserError, match="no tuned file: type python -m golf_kernels tune"):
        tune.main(["--show"])
    tuner(path, Machine()).run()
    tuned.forget()
    assert tune.main(["--show"]) == 0
    assert str(path) in capsys.readouterr().out
    monkeypatch.setattr(tune, "candidates", lambda: [XSA, INT6])
    assert tune.main(["--list"]) == 0 and "nothing is left to measure" in capsys.readouterr().out
    with pytest.raises(UserError, match="--only: nothing cannot be measured now"):
        tune.main(["--only", "nothing"])
    tuned.forget()

"""Sweeps of a training command that scores by a formula, and one sweep of real runs."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import ROOT, Finished, flags, small

optuna = pytest.importorskip("optuna")

from train.common.errors import UserError  # noqa: E402
from train.common.files import read_json  # noqa: E402
from train.sweep import report  # noqa: E402
from train.sweep.__main__ import main, read_arguments  # noqa: E402

HELPERS = ROOT / "tests/helpers"
# the data must exist, and are not read
GRID = ["--data_path=.", "--set=matrix_lr=0.02,0.04", "--set=mlp_mult=3,4", "--seeds=2", "--seed=1"]


def score(matrix_lr: float, mlp_mult: float, seed: int) -> float:
    """What the command of helpers/fake_training scores."""
    return 1 + (matrix_lr - 0.03) ** 2 * 100 + mlp_mult / 100 + seed / 1000


@pytest.fixture(autouse=True)
def fake_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HELPERS / "fake_training", HELPERS, ROOT))))


def sweep(runs: Path, *arguments: str) -> dict[str, Any]:
    name = "s"
    assert main([f"--runs_dir={runs}", f"--run_id={name}", *arguments]) == 0
    return read_json(runs / name / "sweep.json", "")


def starts(runs: Path) -> dict[str, list[str]]:
    """Run → the GPUs of each of its starts."""
    return {path.parent.name: path.read_text().splitlines() for path in runs.glob("*/*/starts.txt")}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished grid of four points with two seeds, of two jobs with a GPU each; copy what you change."""
    runs = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HELPERS / "fake_training", HELPERS, ROOT))))
        return runs, sweep(runs, *GRID, "--gpus=1,3")


def test_a_grid_trains_each_seed_of_each_point_once(grid: tuple[Path, dict[str, Any]]) -> None:
    runs, found = grid
    expected = {
        (lr, width): [score(float(lr), float(width), seed) for seed in (1, 2)]
        for lr in ("0.02", "0.04")
        for width in "34"
    }
    points = {(p["settings"]["matrix_lr"], p["settings"]["mlp_mult"]): p for p in found["points"]}
    assert points.keys() == expected.keys()
    for key, scores in expected.items():
        point = points[key]
        assert list(point["val_bpb"].values()) == pytest.approx(scores) and list(point["val_bpb"]) == ["1", "2"]
        assert point["mean"] == pytest.approx(statistics.fmean(scores)) and point["state"] == "finished"
        assert point["std"] == pytest.approx(statistics.stdev(scores))
    means = [point["mean"] for point in found["points"]]
    assert means == sorted(means) and found["varied"] == {"matrix_lr": ["0.02", "0.04"], "mlp_mult": ["3", "4"]}
    assert starts(runs).keys() == {f"s-00{number}-seed{seed}" for number in range(4) for seed in (1, 2)}
    assert all(len(gpus) == 1 for gpus in starts(runs).values())
    assert {gpus[0] for gpus in starts(runs).values()} == {"1", "3"}


def test_the_same_command_trains_nothing_again_and_prints_the_table(
    grid: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs, found = grid
    assert sweep(runs, *GRID) == found
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["matrix_lr", "mlp_mult", "val_bpb", "std", "seeds", "state"]
    assert lines[2].split()[:2] in (["0.02", "3"], ["0.04", "3"]) and len(lines) == 6
    assert (runs / "s/sweep.txt").read_text().splitlines() == lines
    assert all(len(gpus) == 1 for gpus in starts(runs).values())
    assert main([f"--runs_dir={runs}", "--run_id=s", *GRID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_another_sweep_is_refused_in_its_folder(grid: tuple[Path, dict[str, Any]]) -> None:
    for changed, what in (
        ("--seeds=3", "seeds"), ("--set=mlp_mult=6", "varied"), ("--train_seq_len=64", r"settings \(train_seq_len\)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"holds a sweep with other {what}: type the same command"):
            sweep(grid[0], *GRID, changed)


def test_a_cut_write_to_the_journal_is_forgotten_and_a_damaged_journal_refused(
    grid: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    runs, found = grid
    shutil.copytree(runs / "s", tmp_path / "s")
    journal = tmp_path / "s/sweep.journal"
    whole = journal.read_bytes()
    # as a full disk leaves it: Optuna appended to the cut line, and never read the journal again
    journal.write_bytes(whole[:-9])
    again = sweep(tmp_path, *GRID)
    assert all(point["state"] == "finished" for point in again["points"]) and sweep(tmp_path, *GRID) == again == found
    assert starts(tmp_path) == starts(runs)
    for damaged in (
        whole + b"null\n",
        whole + b"[1]\n",
        whole + b'{"op_code": 99}\n',
        b"\xff\n",
    ):
        journal.write_bytes(damaged)
        with pytest.raises(UserError, match=r"sweep\.journal: not readable \(.*\): delete it and start again"):
            sweep(tmp_path, *GRID)


def test_a_sweep_takes_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/config.json").write_text("{}")
    with pytest.raises(UserError, match="s: is the folder of a run: choose another --run_id"):
        sweep(tmp_path, *GRID)
    assert len(list((tmp_path / "s").iterdir())) == 1


def test_equal_values_are_one_point_and_no_job_is_without_a_run(tmp_path: Path) -> None:
    _, plan, groups = read_arguments(["--set=matrix_lr=0.1,0.10,0.2", "--set=matrix_lr=0.20", "--jobs=99999"])
    assert plan.varied == {"matrix_lr": ["0.1", "0.2"]} and len(groups) == plan.total == 2


def test_the_plot_has_a_panel_for_each_setting_with_all_points(grid: tuple[Path, dict[str, Any]]) -> None:
    runs, found = grid
    assert (runs / "s/sweep.png").read_bytes()[:4] == b"\x89PNG"
    plan = make_plan(GRID)
    figure = report.plot(plan, found["points"])
    assert [axis.get_xlabel() for axis in figure.axes] == ["matrix_lr", "mlp_mult"]
    for axis in figure.axes:
        name = axis.get_xlabel()
        marks = {
            (axis.get_xticklabels()[round(x)].get_text(), round(y, 9))
            for container in axis.containers for x, y in container.lines[0].get_xydata()
        }  # fmt: skip
        assert marks == {(p["settings"][name], round(p["mean"], 9)) for p in found["points"]}


def make_plan(arguments: list[str]) -> Any:
    from train.sweep.plan import make_plan

    sets = [argument.removeprefix("--set=") for argument in arguments if argument.startswith("--set=")]
    return make_plan([], sets, 2, "grid", 0, {})


def test_a_failed_point_is_recorded_and_the_others_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep(tmp_path, "--data_path=.", "--set=mlp_mult=5,4", "--seeds=2", "--seed=1")
    assert [(p["settings"], p["state"]) for p in found["points"]] == [
        ({"mlp_mult": "4"}, "finished"), ({"mlp_mult": "5"}, "failed"),
    ]  # fmt: skip
    assert found["points"][1]["error"] == "s-000-seed1: mlp_mult: 5 does not fit"
    assert "s-000-seed2" not in starts(tmp_path)
    # a run takes minutes, so its file is named at its start
    begun = capsys.readouterr().err.splitlines()[1]
    assert begun.endswith(f"training begins; its output is in {tmp_path}/s/s-000-seed1.txt")
    assert main([f"--runs_dir={tmp_path}", "--run_id=bad", "--data_path=.", "--set=mlp_mult=5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["points"][0]["mean"] is None


def test_a_killed_sweep_continues_with_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.sweep", f"--runs_dir={tmp_path}", "--run_id=s", *GRID]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "FAKE_WAIT": "1"}, stderr=subprocess.DEVNULL)
    wait_for(lambda: "s-000-seed2" in starts(tmp_path))
    process.kill()
    process.wait()
    assert (tmp_path / "s/s-000-seed1/summary.json").exists()
    found = sweep(tmp_path, *GRID)
    assert [point["state"] for point in found["points"]] == ["finished"] * 4
    again = {run: len(gpus) for run, gpus in starts(tmp_path).items()}
    assert again == {f"s-00{n}-seed{seed}": 1 + ((n, seed) == (0, 2)) for n in range(4) for seed in (1, 2)}


def wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened for a minute")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--set: nothing is varied"),
        (["--set=matrix_lr"], "--set matrix_lr: expected NAME=VALUES"),
        (["--set=matrx_lr=1"], "--set matrx_lr: no such setting; did you mean matrix_lr?"),
        (["--set=matrix_lr=0.1,x"], "--set matrix_lr: expected a number, got 'x'"),
        (["--set=seed=1,2"], "--set seed: expected a setting that changes the model"),
        (["--set=mlp_mult=4,0.3"], "--set mlp_mult=0.3: mlp_mult 0.3 times model_dim 128 is not a whole number"),
        (["--set=matrix_lr=0.1..0.2"], "--set matrix_lr: a range has no grid"),
        (["--set=matrix_lr=0.2..0.1", "--sampler=tpe"], "--set matrix_lr: expected LOW..HIGH"),
        (["--set=matrix_lr=0..1:log", "--sampler=tpe"], "--set matrix_lr: expected LOW..HIGH"),
        (["--set=matrix_lr=-1..1", "--sampler=tpe", "--trials=3"], "--set matrix_lr=-1.0: matrix_lr: must be at least 0"),
        (["--set=matrix_lr=0.1", "--set=matrix_lr=0.1..1", "--sampler=tpe"], "--set matrix_lr: given twice"),
        (["--set=matrix_lr=0.1..0.2", "--sampler=tpe"], "--trials: expected a number of points"),
        (["--set=matrix_lr=0.1", "--trials=3"], "--trials: expected a number of points"),
        (["--set=matrix_lr=0.1", "--seeds=0"], "--seeds: expected 1 to 1000"),
        (["--set=matrix_lr=0.1", f"--seeds={10**15}"], "--seeds: expected 1 to 1000"),
        (["--set=matrix_lr=0.1", f"--seed={2**63 - 2}", "--seeds=3"], "seed: must be at most"),
        (["--set=matrix_lr=0.1", "--run_id=.."], "run_id: expected the name of a folder"),
        (["--set=matrix_lr=0.1", "--gpus=3-1"], "--gpus: expected numbers such as 0-7 or 0,2"),
        (["--set=matrix_lr=0.1", "--gpus=,"], "--gpus: expected numbers such as 0-7 or 0,2"),
        (["--set=matrix_lr=0.1", f"--gpus=0-{10**12}"], "--gpus: expected numbers such as 0-7 or 0,2"),
        (["--set=matrix_lr=0.1", "--gpus=0-x"], "--gpus: expected numbers such as 0-7 or 0,2"),
        (["--set=matrix_lr=0.1", "--gpus=0-2", "--jobs=2", "--processes=2"], "--gpus: 2 × 2 processes need 4 different GPUs"),
        (["--set=matrix_lr=0.1", "--data_path=none", "--corpus="], "data_path: none does not exist"),
        (["--set=matrix_lr=0.1", "--iteratons=3"], "--iteratons: no such setting; did you mean iterations?"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_a_run_starts(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        main([f"--runs_dir={tmp_path}", *arguments])
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_runs_at_the_same_time_need_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.common.hardware.auto_device", lambda: "cuda")
    with pytest.raises(UserError, match="--jobs: 2 runs would share GPU 0"):
        main([f"--runs_dir={tmp_path}", "--device=auto", "--set=matrix_lr=0.1,0.2", "--jobs=2"])


def test_points_are_the_same_after_a_pause_and_within_their_ranges(tmp_path: Path) -> None:
    drawn = [
        "--data_path=.",
        "--set=matrix_lr=0.001..0.1:log",
        "--set=num_layers=4..6",
        "--set=codec=raw,zstd",
        "--sampler=random",
    ]
    sweep(tmp_path, *drawn, "--trials=1")
    found = {p["number"]: p["settings"] for p in sweep(tmp_path, *drawn, "--trials=3", "--jobs=2")["points"]}
    ranges = {
        "matrix_lr": optuna.distributions.FloatDistribution(0.001, 0.1, log=True),
        "num_layers": optuna.distributions.IntDistribution(4, 6),
        "codec": optuna.distributions.CategoricalDistribution(["raw", "zstd"]),
    }
    samplers = [optuna.samplers.RandomSampler(seed=1337 + number) for number in range(3)]
    assert found == {n: optuna.create_study(sampler=sampler).ask(ranges).params for n, sampler in enumerate(samplers)}
    for point in found.values():
        assert (
            0.001 <= point["matrix_lr"] <= 0.1
            and point["num_layers"] in (4, 5, 6)
            and point["codec"] in ("raw", "zstd")
        )
    for number, point in found.items():
        config = read_json(tmp_path / f"s/s-00{number}-seed1337/config.json", "")
        assert {name: config[name] for name in point} == point


def test_tpe_draws_near_the_best_points() -> None:
    from optuna.trial import TrialState

    from train.sweep.plan import make_plan
    from train.sweep.work import _next_trial

    distance = {}
    for sampler in ("random", "tpe"):
        plan = make_plan([], ["matrix_lr=0.001..1:log"], 1, sampler, 40, {})
        trials: list[Any] = []
        for number in range(40):
            trial = _next_trial(plan, trials)
            trial.number, trial.state, trial.datetime_complete = number, TrialState.COMPLETE, trial.datetime_start
            trial.values = [math.log(trial.params["matrix_lr"] / 0.03) ** 2]
            trials.append(trial)
        distance[sampler] = statistics.fmean(math.sqrt(trial.values[0]) for trial in trials[20:])
    assert distance["tpe"] < distance["random"] / 2


def test_workers_of_submitit_divide_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    jobs = ["--launcher=slurm", "--jobs=2", "--slurm=timeout_min=5"]
    found = sweep(tmp_path, "--data_path=.", "--set=matrix_lr=0.02,0.04", "--seeds=2", *jobs)
    assert [point["state"] for point in found["points"]] == ["finished"] * 2
    assert len(starts(tmp_path)) == 4 and all(gpus == [""] for gpus in starts(tmp_path).values())
    outputs = [path.read_text() for path in (tmp_path / "s/jobs").glob("*.err")]
    assert len(outputs) == 2 and sum(text.count(": val_bpb ") for text in outputs) == 4
    for wrong, said in (("nothing=1", "nothing"), ("x", "expected NAME=VALUE")):
        with pytest.raises(UserError, match=f"^--slurm: .*{said}.*$") as refused:
            main([f"--runs_dir={tmp_path}", "--run_id=t", *GRID, "--launcher=slurm", f"--slurm={wrong}"])
        assert "\n" not in str(refused.value)


def test_a_real_run_of_two_processes_scores_as_one_outside_a_sweep(
    finished: Finished, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = [flag for flag in flags(small(dataset, tmp_path)) if not flag.startswith(("--run_id", "--runs_dir"))]
    # the recipe's own value
    found = sweep(tmp_path, *settings, "--set=matrix_lr=0.04", "--processes=2")
    expected = read_json(finished.folder.summary, "")["val_bpb"]
    assert found["points"][0]["mean"] == pytest.approx(expected, abs=1e-4)
    assert (tmp_path / "s/s-000-seed1337/bpb.png").exists()

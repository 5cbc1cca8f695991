"""train/run/resume.py: a resumed run has its stored settings; changed ones are refused by name, except a few."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import small

from train import loop, pipeline
from train.common.errors import UserError, main_guard
from train.common.values import ConfigError
from train.config import BOOKKEEPING, CHANGEABLE, Config
from train.loop import TrainResult
from train.pipeline import run_pipeline
from train.recipes import load_recipe
from train.run.folder import RunFolder, create_run_folder, open_run_folder
from train.run.logger import read_metrics
from train.run.resume import resolve_run


def stored(runs: Path, **changes: object) -> Config:
    """The settings of a run of another recipe than the default's, with a folder."""
    config = load_recipe("baseline").config(run_id="mine", runs_dir=str(runs), iterations=100, seed=7, **changes)
    create_run_folder(config)
    return config


def resumed(runs: Path, *flags: str, **environ: str) -> tuple[Config, list[str]]:
    config, overrides = resolve_run(
        ["--run_id", "mine", "--resume", "auto", *flags], {"RUNS_DIR": str(runs), **environ}
    )
    return config, [f"{override.name} {override.value} {override.source}" for override in overrides]


def test_no_flag_is_needed(tmp_path: Path) -> None:
    config = stored(tmp_path, checkpoint_every=50, loggers="tensorboard", matrix_lr=0.5)
    assert resumed(tmp_path) == (config.replace(resume="auto"), [])
    # what is given again, in any notation, is no change
    again = resumed(tmp_path, "--recipe=baseline", "--matrix-lr", "5e-1", SEED="7", CHECKPOINT_EVERY="50")
    assert again == (config.replace(resume="auto"), [])


def test_a_run_that_is_new_has_its_recipe(tmp_path: Path) -> None:
    for flags in (["--run_id", "other", "--resume", "auto"], ["--run_id", "mine"]):
        config, _ = resolve_run([*flags, "--runs_dir", str(tmp_path), "--recipe", "baseline"], {})
        assert config.replace(run_id="", runs_dir="runs", resume="never") == load_recipe("baseline").config()


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        (["--matrix_lr", "0.5"], {}, r"matrix_lr was 0\.04, is 0\.5 from command line: leave it out"),
        ([], {"MATRIX_LR": "0.5"}, r"matrix_lr was 0\.04, is 0\.5 from environment MATRIX_LR: leave it out"),
        # the recipe's own values are changes, too
        (["--recipe", "quickstart"], {}, r"recipe was baseline, is quickstart from command line: leave"),
        (
            ["--seed", "1337"],
            {"VE_LAYERS": "3,4"},
            "ve_layers was empty, is 3,4 from environment VE_LAYERS, seed was 7, is 1337 from command line: leave them out",
        ),
        # settings that would contradict the stored ones
        (["--num_heads", "3"], {}, r"num_heads was 8, is 3 from command line: leave it out"),
        (["--iterations", "99"], {}, r"iterations was 100, is 99 from command line \(expected more\)"),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(
    flags: list[str], environ: dict[str, str], said: str, tmp_path: Path
) -> None:
    stored(tmp_path)
    with pytest.raises(UserError, match=rf"mine: cannot resume with different settings: {said}"):
        resumed(tmp_path, *flags, **environ)
    with pytest.raises(ConfigError, match="did you mean matrix_lr"):
        resumed(tmp_path, "--matrix_l", "1")


def test_what_may_change_is_told_and_stored(tmp_path: Path) -> None:
    config = stored(tmp_path)
    flags = ["--iterations", "200", "--max_wallclock_seconds=0", "--train_log_every", "3", "--val_loss_every", "9"]
    changed, told = resumed(tmp_path, *flags, GOLF_BACKEND="torch")
    assert changed == config.replace(
        resume="auto", iterations=200, max_wallclock_seconds=0.0, train_log_every=3, val_loss_every=9,
        golf_backend="torch",
    )  # fmt: skip
    assert told == [
        "golf_backend torch environment GOLF_BACKEND, was empty",
        "iterations 200 command line, was 100",
        "max_wallclock_seconds 0.0 command line, was 600.0",
        "train_log_every 3 command line, was 200",
        "val_loss_every 9 command line, was 1000",
    ]
    with open_run_folder(changed) as folder:
        assert folder.read_config() == changed.replace(resume="never")
    # the next one has them without a flag
    assert resumed(tmp_path) == (changed, [])


def test_training_that_has_finished_is_not_prolonged(tmp_path: Path) -> None:
    folder = RunFolder(Path(stored(tmp_path).runs_dir) / "mine")
    for path in (folder.weights, folder.training):
        path.touch()
    for setting, value in (("iterations", "200"), ("max_wallclock_seconds", "0.0"), ("val_loss_every", "9")):
        with pytest.raises(
            UserError, match=rf"{setting} was \S+, is {value} from command line \(training has finished\)"
        ):
            resumed(tmp_path, f"--{setting}", value)
    assert resumed(tmp_path, "--golf_backend", "torch", "--loggers", "wandb")[0].golf_backend == "torch"


def test_the_settings_that_may_change_are_settings() -> None:
    assert set(vars(Config())) >= CHANGEABLE and not CHANGEABLE & BOOKKEEPING


SHALLOW = {"num_layers": 2, "recur_layers": (), "ve_layers": (1,), "xsa_last_n": 1, "parallel_start_layer": 1}


@pytest.mark.parametrize(("every", "again"), [(2, "resume"), (0, "without a checkpoint (CHECKPOINT_EVERY) it begins")])
def test_ctrl_c_says_how_to_resume(
    every: int,
    again: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small(dataset, tmp_path, iterations=9, warmup_steps=0, checkpoint_every=every, run_id="my run", **SHALLOW)
    steps = iter(range(4))
    real = loop.training_step

    def training_step(*arguments: Any, **options: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "training_step", training_step)
    with pytest.raises(SystemExit) as ended:
        main_guard(lambda: bool(run_pipeline(config)))
    said, _, command = capsys.readouterr().err.splitlines()[-1].partition(": ")
    assert ended.value.code == 130 and said.startswith(f"interrupted at step 3; {again}")
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "train"]
    assert resolve_run(words[3:], {})[0] == config.replace(resume="auto")


def test_a_run_goes_on_for_more_steps(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(dataset, tmp_path, iterations=2, checkpoint_every=2, run_id="mine", **SHALLOW)
    steps: list[int] = []

    class Killed(BaseException):
        pass

    def kill(_: RunFolder, result: TrainResult, __: object) -> None:
        steps.append(result.steps)
        raise Killed

    monkeypatch.setattr(pipeline, "write_training", kill)
    again = ["--run_id", "mine", "--runs_dir", str(tmp_path), "--resume", "auto", "--iterations", "4"]
    with pytest.raises(Killed):
        run_pipeline(config)
    with pytest.raises(Killed):
        run_pipeline(*resolve_run(again, {}))
    folder = RunFolder(tmp_path / "mine")
    assert steps == [2, 4] and folder.read_config().iterations == 4
    log = (folder.path / f"train_seed{config.seed}.log").read_text()
    assert "\nsetting:iterations=4 from:command line, was 2\n" in log
    assert [record["step"] for record in read_metrics(folder.metrics) if record["kind"] == "resume"] == [2]

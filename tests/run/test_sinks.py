"""TensorBoard and Weights & Biases behind one call: what arrives there, and that nobody imports them unasked."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.common.errors import UserError
from train.run.logger import RunLogger
from train.run.sinks import check_sinks, open_sinks, sink_names


def log_a_run(folder: Path, loggers: str) -> None:
    folder.mkdir(exist_ok=True)
    with RunLogger(folder, 7, echo=False, sinks=open_sinks(loggers, folder, {"seed": 7, "matrix_lr": 0.02})) as log:
        log.val_step(0, 20, 6.9, 4.1, 0.0)
        log.train_step(5, 20, 5.5, 500.0, lr_scale=0.5)
        log.train_step(10, 20, float("nan"), 1000.0)
        log.final("int6_sliding_window", 1.9, 1.1, 80.0, stride=64)


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path) -> None:
    log_a_run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["val/val_bpb"] == [(0, pytest.approx(4.1))]
    assert (
        found["train/train_loss"][0] == (5, 5.5) and found["train/train_loss"][1][1] != found["train/train_loss"][1][1]
    )
    assert found["train/lr_scale"] == [(5, 0.5)] and found["train/seconds"] == [(5, 0.5), (10, 1.0)]
    # behind the last step, at it
    assert found["final/int6_sliding_window/val_bpb"] == [(10, pytest.approx(1.1))]
    assert "train/step" not in found


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The part of the package that is used, without its service."""
    module = types.ModuleType("wandb")
    module.run, module.calls = FakeRun(), []
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(**options: Any) -> FakeRun:
        module.calls.append(options)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_settings_and_every_number(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    log_a_run(tmp_path / "mine", "wandb")
    assert wandb.calls == [
        {
            "project": "golf_kernels", "id": "mine", "name": "mine", "dir": str(tmp_path / "mine"), "resume": "allow",
            "config": {"seed": 7, "matrix_lr": 0.02},
        }
    ]  # fmt: skip
    assert wandb.run.logged[1] == (5, {"train/train_loss": 5.5, "train/seconds": 0.5, "train/lr_scale": 0.5})
    assert [step for step, _ in wandb.run.logged] == [0, 5, 10, 10] and wandb.run.finished == 1


def test_a_service_that_does_not_start_is_named(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise wandb.errors.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        UserError, match=r"wandb does not start \(no API key\): run wandb login, set WANDB_MODE=offline"
    ):
        open_sinks("wandb", tmp_path, {})


def test_names_are_checked_and_missing_packages_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sink_names(" tensorboard, wandb ,") == ["tensorboard", "wandb"] and sink_names("") == []
    with pytest.raises(UserError, match="loggers: expected tensorboard or wandb, separated by commas, got 'mlflow'"):
        check_sinks("tensorboard,mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    for ask in (check_sinks, lambda text: open_sinks(text, tmp_path, {})):
        with pytest.raises(
            UserError, match=r"loggers: wandb cannot be imported .*: pip install wandb, or drop it from LOGGERS"
        ):
            ask("wandb")


def test_nobody_imports_them_unasked(tmp_path: Path) -> None:
    program = (
        "import sys; from train.pipeline import preflight; from train.config import Config; from train.run.sinks import open_sinks\n"
        "from train.run.logger import RunLogger\nfrom pathlib import Path\n"
        f"preflight(Config()); RunLogger(Path({str(tmp_path)!r}), 1, sinks=open_sinks('', Path('.'), {{}})).metric('train', step=1)\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('tensorboard', 'wandb')])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Which settings two runs may differ in, and what becomes of a name that a run has already."""

import os
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.config import Config
from train.run.folder import changed_settings, create_run_folder
from train.run.logger import RunLogger


def test_settings_that_compute_nothing_may_change_and_others_are_named() -> None:
    old = Config(run_id="a", seed=1)
    same = old.replace(run_id="b", runs_dir="elsewhere", resume="auto", checkpoint_every=7, train_log_every=3)
    assert changed_settings(old, same.replace(loggers="tensorboard", profile_steps="30:33")) == []
    new = same.replace(seed=2, matrix_lr=0.5)
    assert changed_settings(old, new) == [("seed", 1, 2), ("matrix_lr", old.matrix_lr, 0.5)]
    assert changed_settings(old, new, free=("seed",)) == [("matrix_lr", old.matrix_lr, 0.5)]


@pytest.mark.parametrize(
    ("again", "said"), [({}, "this run folder exists"), ({"resume": "auto", "seed": 2}, "seed was 1, is 2")]
)
def test_a_folder_in_which_nothing_was_trained_may_be_deleted(
    again: dict[str, object], said: str, tmp_path: Path
) -> None:
    config = Config(run_id="a", runs_dir=str(tmp_path), seed=1)
    folder = create_run_folder(config)

    def refusal() -> str:
        with pytest.raises(UserError, match=said) as caught:
            create_run_folder(config.replace(**again))
        return str(caught.value)

    with RunLogger(folder.path, 1, echo=False) as log:
        log.metric("val", step=0, val_bpb=8.0)
        way_out = "; no step was trained, so you can delete the folder and use its RUN_ID again"
        assert refusal().endswith(way_out)
        with folder.held(), pytest.raises(UserError, match="another process is at work on this run"):
            create_run_folder(config.replace(**again))
        log.train_step(1, 2, 6.0, 10.0)
    assert "delete" not in refusal()
    folder.metrics.unlink()
    assert refusal().endswith(way_out)
    for left in (folder.checkpoint, folder.weights):
        left.touch()
        assert "delete" not in refusal()
        left.unlink()
    folder.config.unlink()
    if not again:
        assert "delete" not in refusal()


@pytest.mark.parametrize("name", [".lock", ".writing.lock"])
def test_a_pipe_for_a_lock_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = create_run_folder(Config(run_id="a", runs_dir=str(tmp_path)))
    os.mkfifo(folder.path / name)
    with pytest.raises(UserError, match=f"{name}: is a device or a pipe"), folder.held(shared=True), folder.writing():
        pass
    assert not folder.is_busy

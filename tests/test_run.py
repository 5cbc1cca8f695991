"""Which settings two runs may differ in."""

from train.config import Config
from train.run import changed_settings


def test_settings_that_compute_nothing_may_change_and_others_are_named() -> None:
    old = Config(run_id="a", seed=1)
    same = old.replace(run_id="b", runs_dir="elsewhere", resume="auto", checkpoint_every=7, train_log_every=3)
    assert changed_settings(old, same.replace(loggers="tensorboard", profile_steps="30:33")) == []
    new = same.replace(seed=2, matrix_lr=0.5)
    assert changed_settings(old, new) == [("seed", 1, 2), ("matrix_lr", old.matrix_lr, 0.5)]
    assert changed_settings(old, new, free=("seed",)) == [("matrix_lr", old.matrix_lr, 0.5)]

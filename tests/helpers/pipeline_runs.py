"""Runs `python -m train` with a narrow quickstart recipe, for the tests of the pipeline."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submission_runs import narrow

from train.config import Config
from train.recipes import load_recipe
from train.run.folder import RunFolder
from train.submission.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def small(dataset: Path, runs: Path, **changes: object) -> Config:
    """The settings of a narrow quickstart. All stages run, in a few seconds."""
    values: dict[str, object] = dict(  # noqa: C408
        run_id="run", iterations=STEPS, recur_start_step=6, gptq_calib_batches=4, val_loss_every=6,
        code_form="plain",
    )  # fmt: skip
    return narrow(dataset, runs, 1337, **{**values, **changes})


def command(module: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environ}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def command_on_two_ranks(module: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    return command(*launcher, module, *arguments, **environ)


def record(arguments: list[str]) -> int:
    """Run `python -m train.submission record` in this process."""
    return main(["record", *arguments])


def flags(config: Config) -> list[str]:
    """Command-line options that turn the recipe's settings into `config`."""
    base = load_recipe(config.recipe).config().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != base[name]}
    return [
        f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in changed.items()
    ]


@dataclass(frozen=True)
class Finished:
    folder: RunFolder
    config: Config


def finish(dataset: Path, runs: Path) -> Finished:
    """Run `python -m train` with `small`, and return the finished run."""
    config = small(dataset, runs, samples="validations")
    result = command("train", *flags(config))
    assert result.returncode == 0, result.stderr
    return Finished(RunFolder(Path(config.runs_dir) / "run"), config)

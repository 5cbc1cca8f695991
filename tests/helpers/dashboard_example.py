"""A folder of made-up runs for the tests of the dashboard.

It has two settings with three seeds each, a run whose artifact is too large, and an unfinished run.
"""

import json
import math
from pathlib import Path

from submission_example import CONFIG, make_summary

from train.config import Config
from train.run.folder import RunFolder
from train.run.logger import RunLogger

STEPS = 400
STEP_MS = 120.0


def loss_at(step: int, offset: float) -> float:
    return 2.9 + offset + 6 * math.exp(-step / 60)


def add_run(
    folder: Path, config: Config, offset: float, *, finished: bool = True, extra_bytes: int = 0, label: str = ""
) -> None:
    run = RunFolder(folder / config.run_id)
    run.path.mkdir(parents=True)
    run.config.write_text(json.dumps(config.to_dict()))
    last = STEPS if finished else STEPS // 2
    with RunLogger(run.path, config.seed, echo=False) as log:
        for step in range(0, last + 1, 10):
            clock = STEP_MS * step * (1 + offset)
            if step % 100 == 0:
                log.val_step(step, STEPS, loss_at(step, offset), loss_at(step, offset) / 2.58, clock)
            if step:
                log.train_step(step, STEPS, loss_at(step, offset) + 0.02 * math.sin(step), clock)
    if finished:
        model = make_summary().bytes_model + extra_bytes
        groups = {"embeddings": 4_000_000, "attention": 4_898_181, "MLP": 7_000_000 + extra_bytes}
        make_summary(
            run_id=config.run_id, seed=config.seed, recipe=config.recipe, val_bpb=loss_at(STEPS, offset) / 2.58,
            val_loss=loss_at(STEPS, offset), step_avg_ms=STEP_MS * (1 + offset), steps=STEPS, bytes_model=model,
            bytes_total=model + 83_119, model_groups=groups, label=label,
        ).write(run.summary)  # fmt: skip


def make_runs_folder(folder: Path) -> Path:
    for index, seed in enumerate((42, 314, 999)):
        add_run(folder, CONFIG.replace(run_id=f"base_{seed}", seed=seed), 0.01 * index)
        add_run(folder, CONFIG.replace(run_id=f"wide_{seed}", seed=seed, mlp_mult=3.0), 0.005 * index - 0.06)
    add_run(folder, CONFIG.replace(run_id="large", mlp_mult=4.0), -0.1, extra_bytes=300_000, label="NOT COMPLIANT: why")
    add_run(folder, CONFIG.replace(run_id="still_going", muon_wd=0.5), 0.08, finished=False)
    return folder

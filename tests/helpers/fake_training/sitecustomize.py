"""With this folder on PYTHONPATH, `python -m train` trains nothing: it writes a run folder with a score by formula.

A run counts its starts in `starts.txt`, which also names its GPUs. With FAKE_WAIT set, its first start never ends. A width
of 5 fails.
"""

import os
import sys
import time
from pathlib import Path


def score(matrix_lr: float, mlp_mult: float, seed: int) -> float:
    return 1 + (matrix_lr - 0.03) ** 2 * 100 + mlp_mult / 100 + seed / 1000


def train() -> int:
    from train.config import field_names, parse_value
    from train.recipes import load_recipe
    from train.run.folder import RunFolder
    from train.submission.summary import Summary

    flags = {name: os.environ[name.upper()] for name in field_names() if name.upper() in os.environ}
    flags |= dict(argument.removeprefix("--").split("=", 1) for argument in sys.orig_argv[3:])
    recipe = load_recipe(flags.pop("recipe", "quickstart"))
    config = recipe.config(**{name: parse_value(name, text, name) for name, text in flags.items()})
    folder = RunFolder(Path(config.runs_dir, config.run_id))
    folder.path.mkdir(exist_ok=True)
    folder.write_config(config)
    with open(folder.path / "starts.txt", "a") as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}\n")
    if config.mlp_mult == 5:
        print("Traceback:\nerror: mlp_mult: 5 does not fit\nlast words", flush=True)
        return 2
    if os.environ.get("FAKE_WAIT") and config.seed == 2:
        time.sleep(60)
    found = score(config.matrix_lr, config.mlp_mult, config.seed)
    Summary(
        run_id=config.run_id, seed=config.seed, recipe=config.recipe, val_bpb=found, date="2026-11-30", steps=1, step_avg_ms=1.0,
        train_seconds=1.0, stage_seconds={}, val_loss=1.0, eval_seconds=1.0, tokens=1, bytes=1, bytes_code=1, bytes_model=1,
        bytes_total=2, max_bytes=2, parameters=1, hardware="none", torch="", python="",
    ).write(folder.summary)  # fmt: skip
    return 0


if sys.orig_argv[1:3] == ["-m", "train"]:
    os._exit(train())

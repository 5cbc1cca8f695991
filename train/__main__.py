"""`python -m train` trains a model, quantizes it, writes and scores the artifact, and writes a record."""

from __future__ import annotations

import json
import os
import sys

from train.command_line import help_text
from train.common.errors import main_guard
from train.common.progress import announce
from train.common.values import ConfigError
from train.config import Config
from train.recipes import load_recipe
from train.run.resume import resolve_run

USAGE = f"""usage: python -m train [--recipe NAME] [--SETTING VALUE ...] [--describe [--json]]

Train a model, quantize it, pack it into an artifact, score the artifact, and write a record, all in runs/RUN_ID/.
The default recipe, {Config.recipe}, trains on the text of Python's standard library.

examples:
  python -m train
  python -m train --recipe quickstart --iterations 100 --seed 42
  python -m train --recipe quickstart --data_path data/mine --run_id mine
  SEED=42 torchrun --standalone --nproc_per_node=2 -m train --recipe quickstart
  python -m train --recipe sp8192_sdclip --describe    only print parameters, bytes, layers and schedule
  python -m train --run_id mine --resume auto          resume with the stored settings; see checkpoint_every

A flag overrides an environment variable, which overrides the recipe, which overrides the default. When a run resumes, you may
change iterations (upward), the time limit, val_loss_every, the kernels, and how to log, save and profile; nothing else.
To run one stage: python -m train.data, train.quantize, train.artifact, train.evaluate or train.submission; each has --help.
To let a model write text: python -m train.generate. To export it for other programs: python -m train.export.
To vary settings: python -m train.sweep.
"""


def main() -> int:
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{USAGE}\n{help_text()}")
        return 0
    wants = {flag for flag in ("--describe", "--json") if flag in arguments}
    config, overrides = resolve_run([argument for argument in arguments if argument not in wants], os.environ)
    if wants == {"--json"}:
        raise ConfigError("--json: expected only together with --describe")
    run_id = config.run_id or f"{config.recipe}_DATE-TIME"
    what = "figures of the recipe" if wants else f"run folder {config.runs_dir}/{run_id}"
    announce(f"python -m train: recipe {config.recipe}, {what}; loading PyTorch")
    if wants:
        return print_description(config, as_json="--json" in wants)
    # imported here, because importing torch takes seconds and errors in the settings should appear before
    from train.pipeline import run_pipeline

    run_pipeline(config, overrides)
    return 0


def print_description(config: Config, *, as_json: bool) -> int:
    from train.describe import describe, describe_text

    recipe = load_recipe(config.recipe)
    facts = describe(config, recipe.published)
    print(json.dumps(facts, indent=1) if as_json else f"{recipe.about}\n\n{describe_text(facts)}".lstrip())
    return 0


if __name__ == "__main__":
    main_guard(main)

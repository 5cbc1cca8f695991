"""`python -m train`: a run from text to record, alone or under torchrun."""

from __future__ import annotations

import json
import os
import sys

from train.command_line import help_text, resolve
from train.common.errors import main_guard
from train.common.values import ConfigError
from train.config import Config
from train.recipes import load_recipe

USAGE = f"""usage: python -m train [--recipe NAME] [--SETTING VALUE ...] [--describe [--json]]

Train a model, quantize it, pack it into an artifact, score the artifact from its bytes, and write the record, all in
runs/<run_id>/. The default recipe is {Config.recipe}; it trains on the standard library's own text.

examples:
  python -m train
  python -m train --recipe quickstart --max_wallclock_seconds 30 --seed 42
  python -m train --recipe quickstart --data_path data/mine --run_id mine
  SEED=42 torchrun --standalone --nproc_per_node=2 -m train --recipe quickstart
  python -m train --recipe sp8192_sdclip --describe          (parameters, bytes, layers, schedule; --json for data)
  python -m train --recipe quickstart --run_id mine --resume auto     (go on after a kill; see checkpoint_every)

Each stage alone: python -m train.data, train.quantize, train.artifact, train.evaluate, train.submission (each has --help).
Precedence: flag > environment variable > recipe > default.
"""


def main() -> int:
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{USAGE}\n{help_text()}")
        return 0
    wants = {flag for flag in ("--describe", "--json") if flag in arguments}
    config, overrides = resolve([argument for argument in arguments if argument not in wants], os.environ)
    if "--describe" in wants:
        return print_description(config, as_json="--json" in wants)
    if wants:
        raise ConfigError("--json: belongs to --describe")
    # imported after the settings are checked: torch takes seconds, a misspelt flag should not
    from train.pipeline import run_pipeline

    run_pipeline(config, overrides)
    return 0


def print_description(config: Config, *, as_json: bool) -> int:
    from train.describe import describe, describe_text

    facts = describe(config, load_recipe(config.recipe).published)
    print(json.dumps(facts, indent=1) if as_json else describe_text(facts))
    return 0


if __name__ == "__main__":
    main_guard(main)

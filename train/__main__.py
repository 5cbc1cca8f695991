"""`python -m train`: the walk from text to record, alone or under torchrun."""

from __future__ import annotations

import os
import sys

from train.config import Config
from train.errors import main_guard
from train.settings import help_text, resolve

USAGE = f"""usage: python -m train [--recipe NAME] [--SETTING VALUE ...]

Train a model, quantize it, pack it into an artifact, score the artifact from its bytes, and write the record, all in
runs/<run_id>/. The default recipe is {Config.recipe}; it trains on the standard library's own text.

examples:
  python -m train
  python -m train --recipe quickstart --max_wallclock_seconds 30 --seed 42
  python -m train --recipe quickstart --data_path data/mine --run_id mine
  SEED=42 torchrun --standalone --nproc_per_node=2 -m train --recipe quickstart
  python -m train --recipe quickstart --run_id mine --resume auto     (go on after a kill; see checkpoint_every)

Each stage alone: python -m train.data, train.quantize, train.artifact, train.evaluate, train.submission (each has --help).
Precedence: flag > environment variable > recipe > default.
"""


def main() -> int:
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{USAGE}\n{help_text()}")
        return 0
    config, overrides = resolve(arguments, os.environ)
    # imported after the settings are checked: torch takes seconds, a misspelt flag should not
    from train.walk import walk

    walk(config, overrides)
    return 0


if __name__ == "__main__":
    main_guard(main)

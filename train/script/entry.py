"""What a packed train_gpt.py does: train, quantize, pack and score under its settings, or score an artifact again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from train.settings import help_text, resolve

USAGE = """usage: train_gpt.py [--SETTING VALUE ...]        train, quantize, pack, score; leaves runs/<run_id>/
       train_gpt.py evaluate RUN [...]     score RUN/model.golf again (evaluate --help)

One process per GPU with torchrun --standalone --nproc_per_node=8 train_gpt.py. Precedence: flag > environment variable > the
settings in this file > default.
"""


def main(settings: Mapping[str, str]) -> int:
    """Run the packed script.

    Args:
        settings: name of a field in upper case → its value as text, as in the environment.
    """
    arguments = sys.argv[1:]
    if arguments[:1] == ["evaluate"]:
        from train.evaluate.__main__ import main as evaluate

        return evaluate(arguments[1:])
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{USAGE}\n{help_text()}")
        return 0
    config, overrides = resolve(arguments, {**settings, **os.environ})
    from train.walk import walk

    walk(config, overrides)
    return 0

"""The main program of a packed train_gpt.py: trains, quantizes and scores a model, or scores an artifact again."""

from __future__ import annotations

import importlib
import importlib.abc
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from train.command_line import field_of, help_text, resolve
from train.common.errors import UserError
from train.common.progress import announce

USAGE = """usage: train_gpt.py [--SETTING VALUE ...]        train, quantize, pack, score; leaves runs/<run_id>/
       train_gpt.py evaluate RUN [...]     score RUN/model.golf again (evaluate --help)

On 8 GPUs: torchrun --standalone --nproc_per_node=8 train_gpt.py. A flag overrides an environment variable, which overrides the
settings in this file, which override the defaults.
"""


class LeftOut(importlib.abc.MetaPathFinder):
    """Raises a UserError if a module is imported that is not in the packed script.

    `conditions`: name of such a module → condition on the settings under which the module is needed.
    """

    def __init__(self, conditions: Mapping[str, str]) -> None:
        self.conditions = conditions

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname in self.conditions:
            settings = dict.fromkeys(re.findall(r"config\.(\w+)", self.conditions[fullname]))
            raise UserError(
                f"{fullname}: not part of this train_gpt.py, because its settings do not need it: leave {', '.join(settings).upper()} "
                "as it was packed, or run the package itself: python -m train"
            )


def main(settings: Mapping[str, str], left_out: Mapping[str, str]) -> int:
    """Run the packed script.

    Args:
        settings: the packed settings, with names and values as in environment variables.
        left_out: name of a module that was not packed → condition on the settings under which it is imported.

    Raises:
        UserError: the settings need a module that was not packed.
    """
    sys.meta_path.insert(0, LeftOut(left_out))
    arguments = sys.argv[1:]
    if arguments[:1] == ["evaluate"]:
        announce("train_gpt.py evaluate: loading PyTorch")
        from train.evaluate.__main__ import main as evaluate

        return evaluate(arguments[1:])
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{USAGE}\n{help_text()}")
        return 0
    named = {field_of(name) for name in os.environ}
    carried = {name: text for name, text in settings.items() if field_of(name) not in named}
    config, given = resolve(arguments, {**carried, **os.environ})
    packed = {f"environment {name}" for name in carried}
    overrides = [replace(item, source="the script") if item.source in packed else item for item in given]
    announce(f"train_gpt.py: recipe {config.recipe}; loading PyTorch")
    from train.single_file.conditions import holds

    # if the settings need a module that was left out, import it now, so that the error is raised before training
    for module, condition in left_out.items():
        if holds(condition, config):
            importlib.import_module(module)
    from train.pipeline import run_pipeline

    run_pipeline(config, overrides)
    return 0

"""Finds the settings of a run that is started or resumed. A resumed run takes its stored settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from train.command_line import Override, given_settings, resolve
from train.common.values import format_value
from train.config import Config
from train.run.folder import WHICH_RUN, RunFolder, refuse_changes


def resolve_run(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[Config, list[Override]]:
    """Return the settings of a run, and the settings that flags and variables change.

    A new run's settings are compared with the recipe, a resumed run's with its stored settings.

    Raises:
        UserError: a flag or variable changes a setting that a resumed run must keep, or `resolve` refuses the settings.
    """
    given = given_settings(arguments, environ)
    run_id, runs_dir, resume = (given[name].value if name in given else getattr(Config, name) for name in WHICH_RUN)
    folder = RunFolder(Path(runs_dir) / run_id)
    if resume == "never" or not run_id or not folder.path.exists():
        return resolve(arguments, environ)
    stored = folder.read_config()
    values = {name: override.value for name, override in given.items()}
    refuse_changes(folder, stored, values, {name: override.source for name, override in given.items()})
    changed = [
        replace(override, source=f"{override.source}, was {format_value(getattr(stored, name)) or 'empty'}")
        for name, override in given.items()
        if name not in WHICH_RUN and override.value != getattr(stored, name)
    ]
    return stored.replace(**{**values, "run_id": run_id, "runs_dir": runs_dir, "resume": resume}), changed

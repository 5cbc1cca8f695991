"""The plan of a sweep: varied settings, points, seeds and folder.

A point is one combination of values of the varied settings. Each point is trained once per seed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.command_line import read_flags, resolve
from train.common.values import ConfigError, format_value
from train.config import BOOKKEEPING, Config, field_names, field_type, nearest, parse_value
from train.run.folder import RunFolder, check_run_id

Point = Mapping[str, Any]
"""Varied setting → its value, as written in a flag."""


@dataclass(frozen=True)
class Range:
    """A range of numbers from which values are drawn, uniformly or (`log`) uniformly on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low}..{self.high}{':log' if self.log else ''}"


Values = list[str] | Range

_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        config: the settings that all runs share. The sweep's folder is `runs_dir/run_id`.
        flags: the command-line flags of these settings, as typed.
        varied: varied setting → its values, or the range of its values.
        seeds: the seeds with which each point is trained.
        sampler: "grid", "random" or "tpe" (Optuna's TPE).
        total: number of points.
    """

    config: Config
    flags: tuple[str, ...]
    varied: dict[str, Values]
    seeds: tuple[int, ...]
    sampler: str
    total: int

    @property
    def folder(self) -> Path:
        return Path(self.config.runs_dir, self.config.run_id)

    @property
    def identity(self) -> dict[str, Any]:
        """The parts of the plan that must stay the same when the sweep is started again."""
        settings = {name: value for name, value in self.config.to_dict().items() if name not in BOOKKEEPING}
        varied = {name: str(values) for name, values in self.varied.items()}
        return {"settings": settings, "varied": varied, "seeds": list(self.seeds), "sampler": self.sampler}

    def grid(self) -> list[dict[str, str]]:
        """All combinations of the listed values."""
        return _combinations({name: values for name, values in self.varied.items() if isinstance(values, list)})

    def run(self, number: int, seed: int) -> RunFolder:
        return RunFolder(self.folder / f"{self.config.run_id}-{number:03}-seed{seed}")

    def run_flags(self, number: int, seed: int, point: Point) -> list[str]:
        """Return the flags of `python -m train` for one run: point `number` with one seed."""
        # without checkpoints, an interrupted run would start again at step 0
        every = self.config.checkpoint_every or max(1, self.config.iterations // 20)
        own = [
            *point_flags(point), f"--seed={seed}", f"--runs_dir={self.folder}",
            f"--run_id={self.run(number, seed).path.name}", "--resume=auto", f"--checkpoint_every={every}",
        ]  # fmt: skip
        named = {name for name, _ in read_flags(own)}
        return [*(f"--{name}={text}" for name, text in read_flags(self.flags) if name not in named), *own]


def make_plan(
    flags: Sequence[str], sets: Sequence[str], seeds: int, sampler: str, trials: int, environ: Mapping[str, str]
) -> Plan:
    """Read and check a sweep's settings.

    Args:
        flags: flags of `python -m train` for the settings that all runs share.
        sets: texts `NAME=VALUES`.
        seeds: number of seeds.
        sampler: "grid", "random" or "tpe".
        trials: number of points that random and tpe draw; 0: not given.
        environ: environment variables, which may hold settings too.

    Raises:
        ConfigError: a setting or a combination of values is wrong.
    """
    config, _ = resolve(flags, environ)
    varied: dict[str, Values] = {}
    for text in sets:
        name, values = _parse_set(text)
        known = varied.get(name)
        if known is not None and not (isinstance(known, list) and isinstance(values, list)):
            raise ConfigError(f"--set {name}: given twice: give one range, or lists of values")
        varied[name] = _distinct(name, [*(known or []), *values]) if isinstance(values, list) else values
    if not varied:
        raise ConfigError("--set: nothing is varied: give a setting and its values, such as --set matrix_lr=0.02,0.04")
    if not 1 <= seeds <= _MOST_SEEDS:
        raise ConfigError(f"--seeds: expected 1 to {_MOST_SEEDS}, got {seeds}")
    config.replace(seed=config.seed + seeds - 1)
    ranges = [name for name, values in varied.items() if isinstance(values, Range)]
    if sampler == "grid" and ranges:
        raise ConfigError(f"--set {ranges[0]}: a range has no grid: list the values, or give --sampler random or tpe")
    if (sampler == "grid") == bool(trials) or trials < 0:
        raise ConfigError("--trials: expected a number of points with --sampler random or tpe, and none with grid")
    if not config.run_id:
        config = config.replace(run_id="_".join([config.recipe, *varied]))
    check_run_id(config.run_id)
    # of a range check both ends, in all combinations with the other settings' values
    ends = {name: [str(v.low), str(v.high)] if isinstance(v, Range) else v for name, v in varied.items()}
    combinations = _combinations(ends)
    for point in combinations:
        try:
            resolve([*flags, *point_flags(point)], environ)
        except ConfigError as error:
            raise ConfigError(f"--set {point_text(point)}: {error}") from error
    plan_seeds = tuple(range(config.seed, config.seed + seeds))
    return Plan(config, tuple(flags), varied, plan_seeds, sampler, trials or len(combinations))


def point_flags(point: Point) -> list[str]:
    return [f"--{name}={format_value(value)}" for name, value in point.items()]


def point_text(point: Point) -> str:
    return " ".join(f"{name}={value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """Format a value for people: numbers that a sampler drew get six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _combinations(values: Mapping[str, list[str]]) -> list[dict[str, str]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _distinct(name: str, texts: Sequence[str]) -> list[str]:
    """Remove texts that state a value again: of 0.1 and 0.10, keep the first."""
    found: dict[Any, str] = {}
    for text in texts:
        found.setdefault(parse_value(name, text, name), text)
    return list(found.values())


def _parse_set(text: str) -> tuple[str, Values]:
    name, _, values = text.partition("=")
    name = name.replace("-", "_").lower()
    if not values:
        raise ConfigError(f"--set {text}: expected NAME=VALUES, such as matrix_lr=0.02,0.04 or matrix_lr=0.01..0.1:log")
    if name not in field_names():
        raise ConfigError(f"--set {name}: no such setting{nearest(name)}")
    if name in BOOKKEEPING or name == "seed":
        raise ConfigError(f"--set {name}: expected a setting that changes the model; --seeds repeats each point")
    kind, source = field_type(name), f"--set {name}"
    found = re.fullmatch(r"(.+?)\.\.(.+?)(:log)?", values)
    if found and kind in ("int", "float"):
        low, high = (parse_value(name, end, source) for end in (found[1], found[2]))
        if not low < high or (found[3] and low <= 0):
            raise ConfigError(f"{source}: expected LOW..HIGH with LOW < HIGH, and LOW > 0 for :log, got {values!r}")
        return name, Range(low, high, bool(found[3]))
    # if the setting is a list, the whole text is one value: --set recur_layers=3,4 --set recur_layers=4,5
    listed = [values] if kind == "int,…" else values.split(",")
    for value in listed:
        parse_value(name, value, source)
    return name, listed

"""Where a run's settings come from: command line > environment > recipe > default.

The environment variable of a field is its name in upper case, as in Parameter Golf's run commands. A variable or flag
that looks like a setting and is none is an error that names the nearest one, so that no typo trains for ten minutes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from golf_kernels import dispatch
from train.common.errors import UserError
from train.common.values import ConfigError, format_value
from train.config import BOOKKEEPING, Config, field_help, field_names, nearest, parse_value, refuse_retired
from train.recipes import load_recipe, recipe_names

# first words that only a setting of this field begins with; a variable such as MUON_MOMENTM is then no stranger
_FAMILIES = frozenset(
    "ADAM BIGRAM COMPRESSOR EMA EMBED EVAL GPTQ LOGIT MATRIX MLP MUON NORMUON PAID PARALLEL QAT QK RECUR ROPE SCALAR SKIP SMEAR "
    "SWA TIED TIE TRAIN TRIGRAM TTT UNET VAL VE VOCAB WARMDOWN WARMUP WEIGHT XSA".split()
)

# what other published scripts call the same thing
_ALIASES = {"weight_quantization_bits": "matrix_bits", "embed_quantization_bits": "embed_bits"}


@dataclass(frozen=True)
class Override:
    """A setting that differs from the recipe: its name, its value, and where it was given."""

    name: str
    value: Any
    source: str


def resolve(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[Config, list[Override]]:
    """Turn flags and environment into a `Config`.

    Args:
        arguments: `--field value` or `--field=value` pairs; `-` and `_` in a field's name mean the same.
        environ: the environment variables.

    Returns:
        The configuration and the values in it that differ from the recipe's.

    Raises:
        ConfigError: an unknown name, a value of the wrong type or range, or a contradiction.
    """
    given: dict[str, Override] = {}
    for name, text in environ.items():
        if not name.isupper():
            continue
        field = _ALIASES.get(name.lower(), name.lower())
        refuse_retired(field, f"environment variable {name}")
        if field in field_names():
            given[field] = Override(field, parse_value(field, text, name), f"environment {name}")
        elif _looks_like_setting(name):
            raise ConfigError(
                f"{name}: this environment variable looks like a setting, but there is none of that name{nearest(name)} "
                "(unset it, or see python -m train --help)"
            )
    for name, text in _flags(arguments):
        given[name] = Override(name, parse_value(name, text, f"--{name}"), "command line")
    recipe = load_recipe(given.pop("recipe").value if "recipe" in given else Config.recipe)
    config = recipe.config(**{name: override.value for name, override in given.items()})
    base = recipe.config()
    return config, [override for name, override in given.items() if getattr(base, name) != override.value]


def note_unread(config: Config, environ: Mapping[str, str], note: Callable[[str], object]) -> None:
    """Say in one line which variables differ from what a stage of its own has, which reads the run and its flags alone.

    Args:
        config: the settings that the stage has.
        environ: the environment variables.
        note: takes the line.
    """
    unread = []
    for name, text in environ.items():
        field = _ALIASES.get(name.lower(), name.lower())
        # kernels are the machine's: a run trained with them is quantized and scored elsewhere
        if (
            not name.isupper()
            or field not in field_names()
            or field in BOOKKEEPING
            or name == dispatch.ENVIRONMENT_VARIABLE
        ):
            continue
        has = getattr(config, field)
        try:
            differs = parse_value(field, text, name) != has
        except ConfigError:
            differs = True
        if differs:
            unread.append(f"{name}={text} (here {format_value(has)})")
    if unread:
        note(f"environment: not read, as the run's settings and flags count: {', '.join(sorted(unread))}")


def check_back_ends() -> None:
    """Find out at the start whether what `GOLF_BACKEND` forces can run.

    Raises:
        UserError: it cannot, or the variable cannot be read.
    """
    try:
        dispatch.validate()
    except dispatch.BackendError as error:
        raise UserError(str(error)) from error


def help_text() -> str:
    """Every setting with its meaning, choices and default."""
    lines = ["Settings (flag --NAME VALUE or environment variable in upper case) [default]:"]
    lines += [f"  {name:<28} {field_help(name)}" for name in field_names()]
    lines += ["", "Recipes (--recipe NAME):"]
    lines += [f"  {name:<28} {next(iter(load_recipe(name).about.splitlines()), '')}" for name in recipe_names()]
    return "\n".join(lines)


def override_line(override: Override) -> str:
    return f"setting:{override.name}={format_value(override.value)} from:{override.source}"


def _flags(arguments: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r}: expected --field value; see python -m train --help")
        name, equals, text = flag[2:].partition("=")
        name = name.replace("-", "_").lower()
        name = _ALIASES.get(name, name)
        refuse_retired(name, f"--{name}")
        if name not in field_names():
            raise ConfigError(f"{flag.partition('=')[0]}: no such setting{nearest(name)}")
        if not equals:
            if not remaining:
                raise ConfigError(f"{flag}: a value is missing")
            text = remaining.pop(0)
        pairs.append((name, text))
    return pairs


def _looks_like_setting(name: str) -> bool:
    if name.split("_")[0] in _FAMILIES:
        return True
    return bool(difflib.get_close_matches(name.lower(), [n for n in field_names() if len(n) >= 8], n=1, cutoff=0.88))

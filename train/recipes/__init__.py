"""Recipes: named settings, one file each.

A recipe's module has a docstring that says what it reproduces, `SETTINGS`, which maps settings to values other than the
defaults, and, for a published result, `PUBLISHED` with its figures. To add a recipe, add a file here: `--recipe`,
`--help`, `--describe` and the tests find it by its name.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from train.common.values import ConfigError
from train.config import Config


@dataclass(frozen=True)
class Recipe:
    """A named set of settings.

    Attributes:
        name: the module's name.
        about: the module's docstring.
        settings: name → value of each setting that differs from the default.
        published: figures of the published run, such as `step_ms`; empty if there is none.
    """

    name: str
    about: str
    settings: dict[str, Any]
    published: dict[str, float]

    def config(self, **changes: Any) -> Config:
        """The recipe as a `Config`, with `changes` on top."""
        return Config(**{**self.settings, "recipe": self.name, **changes})


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_recipe(name: str) -> Recipe:
    """Find a recipe by name.

    Raises:
        ConfigError: there is no such recipe; the message names the most similar one and all others.
    """
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"recipe: no recipe {name!r}{hint} (there are: {', '.join(names)})")
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, (module.__doc__ or "").strip(), dict(module.SETTINGS), dict(getattr(module, "PUBLISHED", {})))

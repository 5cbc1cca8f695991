"""Recipes: named settings, one file each.

The docstring of a recipe's module says which result the recipe reproduces. `SETTINGS` maps names of settings to values
that differ from the defaults. `PUBLISHED` has the numbers of a published result, if there is one. To add a recipe, add
a file here: `--recipe`, `--help`, `--describe` and the tests find it.
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
    """The contents of a recipe's module."""

    name: str
    about: str  # the module's docstring
    settings: dict[str, Any]
    published: dict[str, float]  # numbers such as `step_ms`; empty if there is no published run

    def config(self, **changes: Any) -> Config:
        """Return the recipe's settings, overridden by `changes`."""
        return Config(**{**self.settings, "recipe": self.name, **changes})


def recipe_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_recipe(name: str) -> Recipe:
    """Load the recipe with this name.

    Raises:
        ConfigError: the recipe does not exist. The message lists all recipes.
    """
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"recipe: no recipe {name!r}{hint} (there are: {', '.join(names)})")
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, (module.__doc__ or "").strip(), dict(module.SETTINGS), dict(getattr(module, "PUBLISHED", {})))

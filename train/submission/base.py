"""What a record is compared with: a recipe, another run or record, or a published score."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json
from train.config import Config
from train.recipes import load_recipe, recipe_names
from train.submission.record_scores import Standing, find_standing


@dataclass(frozen=True)
class Base:
    """The base of a record.

    Attributes:
        name: what to call it.
        settings: field → value; None: not known, as for published scores.
        standing: its scores; None: a recipe has none.
    """

    name: str
    settings: dict[str, Any] | None = field(default=None)
    standing: Standing | None = None

    @classmethod
    def of_recipe(cls, config: Config) -> Base:
        return cls(f"recipe {config.recipe}", load_recipe(config.recipe).config().to_dict())


def find_base(name: str) -> Base:
    """What `--base` names: a recipe, a folder with config.json, or whatever `compare` takes.

    Raises:
        UserError: none of them.
    """
    if name in recipe_names():
        return Base(f"recipe {name}", load_recipe(name).config().to_dict())
    path = Path(name)
    settings = None
    if (path / "config.json").is_file():
        values = read_json(path / "config.json", "give another --base")
        recipe = load_recipe(str(values.get("recipe", "")))
        # a record's file holds what differs from the defaults, a run's all
        settings = Config.from_dict({"recipe": recipe.name, **values}).to_dict()
    try:
        standing = find_standing(name)
    except UserError as error:
        if settings is None:
            raise UserError(f"base: {error}; nor a recipe ({', '.join(recipe_names())})") from error
        standing = None
    # one seed has no deviation to test with
    scored = standing if standing and len(standing.val_bpb) > 1 else None
    return Base(standing.name if standing else name, settings, scored)

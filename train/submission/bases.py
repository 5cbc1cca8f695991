"""Finds the scores that a name on the command line refers to, and the base that a new record is compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json
from train.config import Config
from train.recipes import load_recipe, recipe_names
from train.submission.record_folder import RecordFolder, read_record_folder
from train.submission.record_scores import PUBLISHED, RecordScores, ScoredText, is_score, scored_text
from train.submission.rules.scoring import ratios


def find_scores(name: str) -> RecordScores:
    """Find the scores that `name` refers to.

    Args:
        name: a record folder, a submission.json, the number of a published record, or a val_bpb such as 1.2193657.

    Returns:
        One score per seed. A record without scores per seed has one score, the val_bpb in submission.json.

    Raises:
        UserError: the record does not exist, or has no score.
    """
    number = name.removeprefix("#")
    if re.fullmatch(r"\d{1,3}\.\d{1,18}", name) and float(name) > 0 and not Path(name).exists():
        return RecordScores(name, (), (float(name),))
    if number in PUBLISHED and not Path(name).exists():
        return RecordScores(f"#{number}", *PUBLISHED[number], text=ScoredText(challenge=True))
    path = Path(name)
    if not path.exists():
        published = ", ".join(f"#{known}" for known in PUBLISHED)
        raise UserError(
            f"{name}: no such record folder, submission.json or published record ({published}), and no val_bpb"
        )
    return scores_of(read_record_folder(path), name)


def scores_of(record: RecordFolder, name: str) -> RecordScores:
    """Return one score per seed. If the record has no scores per seed, return the val_bpb in submission.json.

    Raises:
        UserError: the record has no score.
    """
    text = scored_text(record.claims.values) or _known_text(record)
    seeds = [result for result in record.results if "val_bpb" in result.numbers]
    if seeds:
        losses = [result.numbers["val_loss"] for result in seeds if "val_loss" in result.numbers]
        scores = tuple(result.numbers["val_bpb"] for result in seeds)
        known = tuple(losses) if len(losses) == len(seeds) else ()
        return RecordScores(name, tuple(result.seed for result in seeds), scores, known, text)
    bpb = record.claims.val_bpb
    if bpb is None:
        unseen = f", and a log in an unknown form: {', '.join(record.unread)}" if record.unread else ""
        raise UserError(f"{name}: no scores in submission.json (seed_results or val_bpb), and none in a log{unseen}")
    values = record.claims.values
    return RecordScores(name, (), (bpb,), (values["val_loss"],) if is_score(values) else (), text)


def _known_text(record: RecordFolder) -> ScoredText | None:
    """Return the challenge's text if the record's bytes per token equal those of a published tokenizer, else None."""
    found = ratios(record)
    return ScoredText(challenge=True) if found and all(one.names(1e-4) for one in found) else None


@dataclass(frozen=True)
class Base:
    """The recipe, run or record that a new record is compared with.

    Attributes:
        name: name of the base, as the new record's README shows it.
        settings: setting → value; None: not known, as for published records.
        scores: scores of the base; None for a recipe or a folder without scores.
    """

    name: str
    settings: dict[str, Any] | None = None
    scores: RecordScores | None = None

    @classmethod
    def of_recipe(cls, name: str) -> Base:
        return cls(f"recipe {name}", load_recipe(name).config().to_dict())


def find_base(name: str) -> Base:
    """Find the base that `--base` names: a recipe, a folder with config.json, or a record that `compare` accepts.

    Raises:
        UserError: `name` is none of these.
    """
    if name in recipe_names():
        return Base.of_recipe(name)
    path = Path(name)
    settings = None
    if (path / "config.json").is_file():
        values = read_json(path / "config.json", "give another --base")
        recipe = load_recipe(str(values.get("recipe", "")))
        # the config.json of a record has only the settings that differ from the defaults
        settings = Config.from_dict({"recipe": recipe.name, **values}).to_dict()
    try:
        scores = find_scores(name)
    except UserError as error:
        if settings is None:
            raise UserError(f"--base: {error} or recipe ({', '.join(recipe_names())})") from error
        return Base(name, settings)
    return Base(scores.name, settings, scores)

"""Finds the scores of a record, one per seed, and the base that a new record is compared with."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from train.common.errors import UserError
from train.common.files import read_json
from train.config import Config
from train.recipes import load_recipe, recipe_names
from train.run.log_grammar import Log, Numbers, parse_log

# published tokenizer → scored tokens and bytes of the challenge's validation text, from the published logs
TEXTS = {
    "sp1024": (62_021_632, 151_080_362),
    "sp1024, older export": (63_779_840, 155_769_746),
    "sp2048": (50_905_088, 150_746_272),
    "sp4096": (45_508_608, 151_074_052),
    "sp4096 of #1285": (45_514_752, 151_074_924),
    "sp8192": (40_540_160, 151_078_222),
    "CaseOps sp8192": (47_851_520, 151_084_309),
}
# published record → seeds, val_bpb per seed, val_loss per seed (empty: not given); from its files or logs
_PUBLISHED: dict[str, tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = {
    "122": (
        ("41", "102", "1337"),
        (1.16192049, 1.15974176, 1.15915537),
        (2.38498992, 2.38051780, 2.37931417),
    ),
    "549": ((), (1.11922988, 1.12002032, 1.11888882), ()),
    "1019": (("314", "42", "999"), (1.11508120, 1.11437394, 1.11475014), (1.88276292, 1.88156874, 1.88220393)),
    "1392": (("42", "314", "999"), (1.10327377, 1.10181145, 1.10101898), ()),
    "1471": (("42", "1337", "2024"), (1.08725556, 1.08655776, 1.08585085), ()),
}


@dataclass(frozen=True)
class ScoredText:
    """The text that a record was scored on.

    Attributes:
        challenge: whether the text is the challenge's whole validation text.
        tokens: number of scored tokens; 0: not known.
        window: window length of the evaluation, which may leave the tokens after the last full window unscored.
        tokenizer: SHA-256 of the tokenizer; empty: not known.
    """

    challenge: bool
    tokens: int = 0
    window: int = 1
    tokenizer: str = ""

    def __str__(self) -> str:
        return "the challenge's validation text" if self.challenge else f"another text of {self.tokens:,} tokens"


def same_text(a: ScoredText | None, b: ScoredText | None) -> bool | None:
    """Whether two scored texts are the same text; None if that is not known."""
    if a is None or b is None:
        return None
    if a.tokens and b.tokens and a.tokenizer and a.tokenizer == b.tokenizer:
        return abs(a.tokens - b.tokens) < max(a.window, b.window)
    if a.challenge and b.challenge:
        return True
    return False if a.challenge or b.challenge else None


@dataclass(frozen=True)
class RecordScores:
    """The scores of a record.

    Attributes:
        name: the record's name in messages.
        seeds: the seeds; empty: not known.
        val_bpb: bits per byte: one score per seed, or a single number.
        val_loss: nats per token: one score per seed, or a single number; empty: not known.
        text: the scored text; None: not known.
    """

    name: str
    seeds: tuple[str, ...]
    val_bpb: tuple[float, ...]
    val_loss: tuple[float, ...] = ()
    text: ScoredText | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token = val_loss / (val_bpb · ln 2); None without val_loss."""
        if not self.val_loss:
            return None
        return statistics.fmean(self.val_loss) / (statistics.fmean(self.val_bpb) * math.log(2))


def find_scores(name: str) -> RecordScores:
    """Find the scores of a record.

    Args:
        name: a record folder, a submission.json, the number of a published record, or a val_bpb such as 1.2193657. If
            submission.json has no scores per seed and the folder has no log, the only score is the val_bpb in
            submission.json.

    Raises:
        UserError: the record does not exist, or has no score.
    """
    number = name.removeprefix("#")
    if re.fullmatch(r"\d+\.\d+", name) and float(name) > 0 and not Path(name).exists():
        return RecordScores(name, (), (float(name),))
    if number in _PUBLISHED and not Path(name).exists():
        return RecordScores(f"#{number}", *_PUBLISHED[number], text=ScoredText(challenge=True))
    path = Path(name)
    if not path.exists():
        published = ", ".join(f"#{known}" for known in _PUBLISHED)
        raise UserError(
            f"{name}: no such record folder, submission.json or published record ({published}), and no val_bpb"
        )
    source = path / "submission.json" if path.is_dir() else path
    values = read_json(source, "give a record's submission.json") if source.exists() else {}
    if values.get("seed_results"):
        return _from_json(name, source, values)
    logs = sorted(path.glob("*.log")) if path.is_dir() else []
    if logs:
        return _from_logs(name, logs)
    if not is_number(bpb := values.get("val_bpb")) or bpb <= 0:
        raise UserError(f"{source}: no scores in it (seed_results or val_bpb), and no logs beside it")
    loss = (values["val_loss"],) if is_score(values) else ()
    return RecordScores(name, (), (bpb,), loss, scored_text(values))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a JSON file or log is a number of magnitude below 10¹⁸. NaN and booleans do not count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def is_score(values: Mapping[str, Any]) -> bool:
    """Whether `values` has a positive val_loss and a positive val_bpb."""
    return all(is_number(values.get(name)) and values[name] > 0 for name in ("val_loss", "val_bpb"))


def exact_score(log: Log) -> Numbers | None:
    """Return a log's last final score with 8 decimals, or else its last final score; None if there is no valid one."""
    finals = [values for name, values in log["finals"].items() if name.endswith("_exact")]
    finals = finals or list(log["finals"].values())
    return finals[-1] if finals and is_score(finals[-1]) else None


def scored_text(submission: Mapping[str, Any]) -> ScoredText | None:
    """Return the text that a submission.json says was scored; None if the file does not say."""
    evaluation, tokenizer = submission.get("evaluation"), submission.get("tokenizer")
    if not isinstance(evaluation, dict) or not is_number(whole := evaluation.get("validation_tokens")):
        return None
    scored, length = evaluation.get("tokens"), evaluation.get("window")
    # rule `overlap_tail` scores the last tokens several times, so it may score more tokens than the text has
    tokens = int(min(scored, whole) if is_number(scored) else whole)
    window = int(length) if is_number(length) and length >= 1 else 1
    digest = tokenizer.get("sha256") if isinstance(tokenizer, dict) else None
    return ScoredText(challenge_text(tokens, window), tokens, window, digest if isinstance(digest, str) else "")


def challenge_text(tokens: int, window: int) -> bool:
    """Whether a text of so many scored tokens is the challenge's; the tokens after the last full window may be missing."""
    return any(abs(tokens - known) < window for known, _ in TEXTS.values())


def _from_json(name: str, source: Path, submission: Mapping[str, Any]) -> RecordScores:
    results = submission["seed_results"]
    if not isinstance(results, dict):
        raise UserError(f"{source}: seed_results: expected an object, seed to scores, got {type(results).__name__}")
    for seed, scores in results.items():
        if not isinstance(scores, dict) or not is_number(scores.get("val_bpb")):
            raise UserError(f"{source}: seed_results: seed {seed}: expected a val_bpb")
    losses = [scores.get("val_loss") for scores in results.values()]
    known = all(is_number(loss) for loss in losses)
    scores = tuple(float(scores["val_bpb"]) for scores in results.values())
    return RecordScores(name, tuple(results), scores, tuple(losses) if known else (), scored_text(submission))


def _from_logs(name: str, logs: list[Path]) -> RecordScores:
    seeds, scores = [], []
    for path in logs:
        log = parse_log(path)
        score = exact_score(log)
        if score is None:
            raise UserError(f"{path}: no final score: the log is truncated, or not in Parameter Golf's grammar")
        seeds.append(str(log["facts"].get("seed", path.stem)))
        scores.append(score)
    val_bpb, val_loss = (tuple(score[key] for score in scores) for key in ("val_bpb", "val_loss"))
    return RecordScores(name, tuple(seeds), val_bpb, val_loss)


@dataclass(frozen=True)
class Base:
    """The recipe, run or record that a new record is compared with.

    Attributes:
        name: its name in the README.
        settings: setting → value; None: not known, as for published records.
        scores: its scores; None for a recipe, and for a folder without scores.
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

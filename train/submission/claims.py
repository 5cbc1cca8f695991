"""Reads the numbers of a record and of its seeds from submission.json, in the layouts of many submissions."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from train.submission.digits import agree, is_number

# (name of a number in this project, pattern of its field names in submissions). The first row whose pattern matches a
# field gives the name. "other" marks numbers that do not measure this record. To read another field, extend a pattern.
_NUMBERS = (
    ("other", r"std|stddev|delta|gain|improve|baseline|previous|prior|sota|limit|cap$|budget|max_|min_|target|p_value|count"),
    ("prequant_bpb", r"(pre_?q|pre_?ema|post_?ema|float).*bpb|bpb.*(pre_?q|post_?ema|float)"),
    ("bpb", r"bpb|^score$"),
    ("loss", r"val.*loss|^loss$"),
    ("bytes_code", r"code.*(bytes|size)|(bytes|size).*code"),
    ("bytes_paid_prefix", r"bytes.*prefix|prefix.*bytes"),
    ("bytes_model", r"(model|weights|quantized|compressed).*(bytes|size)|(bytes|size).*(model|weights|quantized)"),
    ("artifact_bytes", r"(artifact|total|submission).*(bytes|size)|bytes_total|^bytes$"),
    ("step_avg_ms", r"(ms|time).*per_step|step.*_ms$|step_avg"),
    ("calibration_s", r"(calibration|hessian).*(_s|sec|time)"),
    ("eval_time_s", r"(eval|ttt|sliding).*(_s$|_ms$|sec|time)|^time.*eval"),
    ("train_time_s", r"(train|wallclock).*(_s$|_ms$|sec|time|clock)"),
    ("steps", r"^(train_|training_|total_|final_|num_)?steps?(_completed|_reached|_run)?$"),
)  # fmt: skip
_ROWS = tuple((name, re.compile(form)) for name, form in _NUMBERS)
_SEED = re.compile(r"(?:seed|s|run)?[_ -]?(\d{1,12})")
_DEEPEST = 3
_MOST_SEEDS = 50


def number_name(field_name: str) -> str:
    """Return the name in `_NUMBERS` for a field of submission.json; "" if the table has no such field."""
    lowered = field_name.lower()
    return next((name for name, form in _ROWS if form.search(lowered)), "")


@dataclass(frozen=True)
class Claims:
    """The contents of submission.json.

    Attributes:
        values: the JSON object; empty if the file is missing or invalid.
        problem: the reason why the file is invalid; "" if the file is valid or missing.
        text: the file's text.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    text: str = ""

    def string(self, *names: str) -> str:
        """Return, as text, the first of the fields `names` that holds a text or a number; "" if none does."""
        found = (self.values.get(name) for name in names)
        return next((str(value) for value in found if isinstance(value, (str, int, float)) and value != ""), "")

    @cached_property
    def val_bpb(self) -> float | None:
        """The score of the whole record, which other modules call the headline; None: not stated."""
        for name in ("val_bpb", "mean_val_bpb", "val_bpb_mean", "final_val_bpb", "bpb", "score"):
            value = self.values.get(name)
            value = value.get("mean") if isinstance(value, dict) else value
            if is_number(value) and value > 0:
                return value
        return None

    def number(self, name: str) -> float | None:
        """Return a number of the whole record. `name` is a field of the file, or a name in `_NUMBERS`."""
        if is_number(value := self.values.get(name)):
            return value
        numbers = {str(key): value for key, value in self.values.items() if is_number(value)}
        return next((_in_seconds(key, value) for key, value in numbers.items() if number_name(key) == name), None)

    @cached_property
    def seed_names(self) -> tuple[str, ...]:
        """The seeds that the file lists in `seeds` or `seed`, in the file's order."""
        for name in ("seeds", "seed"):
            value = self.values.get(name)
            listed = value if isinstance(value, list) else [value]
            found = [str(item) for item in listed if isinstance(item, (int, str)) and _SEED.fullmatch(str(item))]
            if found and len(found) == len(listed):
                return tuple(_digits(item) for item in found[:_MOST_SEEDS])
        return ()

    @cached_property
    def fields(self) -> dict[str, dict[str, float]]:
        """Seed → field of the file → number.

        The file may have objects with seeds as keys, lists of objects with a `seed`, or lists of one number per seed.
        """
        found: dict[str, dict[str, float]] = {}
        for name, by_seed in self._tables(self.values, 0):
            for seed, entry in by_seed.items():
                entries = entry if isinstance(entry, dict) else {name if number_name(name) else "val_bpb": entry}
                numbers = {str(key): value for key, value in _flat(entries) if is_number(value)}
                if numbers:
                    found[seed] = numbers | found.get(seed, {})
        return dict(list(found.items())[:_MOST_SEEDS])

    @cached_property
    def seeds(self) -> dict[str, dict[str, float]]:
        """Seed → name in `_NUMBERS` → number. The claimed score of a seed has the names `val_bpb` and `val_loss`."""
        return {seed: self._named(numbers) for seed, numbers in self.fields.items()}

    @cached_property
    def score_field(self) -> str:
        """Name of the bpb field whose mean over the seeds is the headline.

        If no field has this mean: `val_bpb`, or else the first bpb field of all seeds; "" if there is none.
        """
        rows = list(self.fields.values())
        common = [key for key in (rows[0] if rows else {}) if all(key in row for row in rows)]
        names = [key for key in common if number_name(key) == "bpb"]
        names.sort(key=lambda key: key != "val_bpb")
        for name in names:
            if self.val_bpb is not None and agree(self.val_bpb, statistics.fmean(row[name] for row in rows)):
                return name
        return names[0] if names else ""

    def _named(self, numbers: dict[str, float]) -> dict[str, float]:
        named: dict[str, float] = {}
        for key, value in numbers.items():
            name = number_name(key)
            if name in ("train_time_s", "eval_time_s"):
                value = _in_seconds(key, value)
                # take the longest of several evaluations: test-time training gives the score and takes longest
                value = max(value, named.get(name, 0.0)) if name == "eval_time_s" else value
                named[name] = value
            elif name and name not in ("other", "bpb", "loss"):
                named.setdefault(name, value)
        column = self.score_field
        if column in numbers:
            named["val_bpb"] = numbers[column]
            pair = next(
                (n for n in (column.replace("bpb", "loss"), column.replace("bpb", "val_loss")) if n in numbers), ""
            )
            if pair:
                named["val_loss"] = numbers[pair]
        return named

    def _tables(self, values: Mapping[str, Any], level: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                if all(_SEED.fullmatch(str(key)) for key in value):
                    yield name, {_digits(str(key)): entry for key, entry in value.items()}
                elif level < _DEEPEST:
                    yield from self._tables(value, level + 1)
            elif isinstance(value, list) and value:
                named = [_seed_of(item) for item in value]
                if all(named):
                    yield name, dict(zip(named, value, strict=True))
                elif len(value) == len(self.seed_names) and number_name(name):
                    yield name, dict(zip(self.seed_names, value, strict=True))


def _in_seconds(key: str, value: float) -> float:
    if number_name(key) not in ("train_time_s", "eval_time_s", "calibration_s"):
        return value
    return value / 1000 if key.endswith("_ms") else value * 60 if "min" in key else value


def _seed_of(item: Any) -> str:
    seed = str(item.get("seed", "")) if isinstance(item, dict) else ""
    return _digits(seed) if _SEED.fullmatch(seed) else ""


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for a seed's fields. The field `bpb` of an object `ttt` gets the name `ttt_bpb`."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}_{name}", inner) for name, inner in value.items())
        else:
            yield key, value

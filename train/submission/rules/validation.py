"""Rules: no validation tokens in the artifact or in training, judged by what README, submission.json and logs say."""

from __future__ import annotations

import re

from train.data.paid_prefix import NOT_COMPLIANT
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, fails, note, passes, unknown

# the label that this package gives its runs with a paid prefix
_LABEL = NOT_COMPLIANT.partition(":")[0]
# patterns are in lower case
_PREFIX = r"paid[ _-]?prefix|val(?:idation)? tokens? (?:are |is |stored )?in the artifact"
_ON_VALIDATION = r"on (?:the )?val(?:idation)?\b|\bval[ _-]only\b"
_TRAINED = r"\b(?:train|fine-?tun|adapt)\w*\b(?:(?!scor|evaluat|[.,;|]).){0,40}$"
_SCORED_FIRST = (
    r"already[ -](?:been[ -])?scored|score[ds]?[ -](?:first|before)|after (?:scoring|being scored)|legal[ _-]ttt"
)
_SCORED_FIRST += r"|before (?:any |the )?(?:training|adapt|updat|ttt)"
_DENIED = r"\b(?:no|not|never|without|neither|nor|forbid\w*|forbidden|illegal|disallow\w*|violat\w*|zero)\b|n't\b"
_ARTIFACT_LIMIT = "no validation tokens in the artifact"
_TRAINING_LIMIT = "training at test time only on tokens that are already scored"


def artifact(record: RecordFolder) -> Finding:
    rule = "no validation tokens in the artifact"
    label = [(name, line) for name, line in record.find(_LABEL.lower()) if _LABEL in line]
    for name, line in [*label, *_affirmed(record, _PREFIX)]:
        return fails(rule, f"{name}: {_excerpt(line, f'{_LABEL.lower()}|{_PREFIX}')}", _ARTIFACT_LIMIT)
    return _nothing_found(record, rule)


def training(record: RecordFolder) -> Finding:
    """Check that the record does not train on validation tokens. Training on tokens after scoring them is allowed."""
    rule = "no training on validation tokens"
    adapted = sorted({one.name for log in record.logs for one in log.evaluations if one.kind == "ttt"})
    first = record.find(_SCORED_FIRST, logs=False)
    found = [(name, line) for name, line in _affirmed(record, _ON_VALIDATION) if _trains(line)]
    if adapted or found or record.find(r"test[ -]time[ -]training|\bttt\b", logs=False):
        shown = (
            f"{found[0][0]}: {_excerpt(found[0][1], _ON_VALIDATION)}" if found else ", ".join(adapted) or "README.md"
        )
        if first:
            return note(rule, f"trains on tokens it has scored ({shown})", _TRAINING_LIMIT)
        if found:
            return fails(rule, shown, _TRAINING_LIMIT)
        if adapted:
            return unknown(
                rule, f"{shown}: nothing says whether tokens are scored before it trains on them", _TRAINING_LIMIT
            )
    return _nothing_found(record, rule)


def _trains(line: str) -> bool:
    lowered = line.lower()
    matches = re.finditer(_ON_VALIDATION, lowered)
    return any("only" in match[0] or re.search(_TRAINED, lowered[: match.start()]) for match in matches)


def _nothing_found(record: RecordFolder, rule: str) -> Finding:
    if not record.logs and not record.readme:
        return unknown(rule, "no README.md and no log")
    return passes(rule, "README, submission.json and logs mention none")


def _affirmed(record: RecordFolder, pattern: str) -> list[tuple[str, str]]:
    """Return (file name, line) for each line that matches `pattern`, unless a word such as "no" is near the match."""
    found = []
    for name, line in record.find(pattern):
        lowered = line.lower()
        match = re.search(pattern, lowered)
        around = lowered[max(match.start() - 60, 0) : match.end() + 20] if match else ""
        if not re.search(_DENIED, around):
            found.append((name, line))
    return found


def _excerpt(line: str, pattern: str) -> str:
    match = re.search(pattern, line.lower())
    start = max((match.start() if match else 0) - 50, 0)
    return repr(line[start : start + 110].strip())

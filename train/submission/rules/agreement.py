"""Rules: the numbers in logs, submission.json and README must agree in all digits that they state."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from decimal import Decimal

from train.common.wording import counted
from train.submission.digits import agree, is_number, rounds_to
from train.submission.record_folder import RecordFolder
from train.submission.record_logs import LOG_DIGITS, logged_numbers
from train.submission.rules.finding import Finding, fails, note, note_unless, passes, unknown
from train.submission.summary import mean_and_deviation

_COMPARED = "val_loss artifact_bytes bytes_model steps step_avg_ms train_time_s eval_time_s".split()
# allowed differences: submission.json may round a time from more digits than the log shows
_CLOCKS = {"step_avg_ms": 0.01, "train_time_s": 0.001, "eval_time_s": 0.001}
# a larger difference is no rounding error: the leaderboard prints four decimals
_SLIP = 0.000151
# largest distance between a seed's score and the mean of a record's seeds; the published deviations are below 0.0015
_ONE_SEED = 0.003
_LOG_LIMIT = "a record's log shows its score"
_README_LIMIT = "README and submission.json state one score"
_BPB = r"(?<![\w.,])(\d\.\d{3,}|\d\.\d{2,3}(?= *(?:bpb|bits)))(?!\w|\.\d|\s*(?:MB|GB|M\b|ms|s\b|%|nats))"
_MARKED = re.compile(
    rf"(?:bpb|bits per byte|score)[^\d\n]{{0,24}}{_BPB}|{_BPB}\W{{0,4}}(?:val_)?(?:bpb|bits per byte)", re.IGNORECASE
)


def score(record: RecordFolder) -> Finding:
    """Check that the claimed scores are in the logs. A score of a seed must be in that seed's log.

    Without scores per seed, the headline must be in one of the logs, or be the mean of one evaluation over all logs.
    """
    rule = "the score is in a log"
    scored = [log for log in record.logs if log.evaluations]
    if not scored:
        why = f"a log in an unknown form: {', '.join(record.unread)}" if record.unread else "no log with a score"
        return unknown(rule, why, _LOG_LIMIT)
    wrong: list[str] = []
    found: list[str] = []
    absent: list[str] = []
    for result in record.results:
        claim = result.claimed.get("val_bpb")
        if result.evaluation and result.log:
            found.append(f"{result.evaluation.name} in {result.log.name}, line {result.evaluation.line}")
        elif claim is not None and result.log and result.log.evaluations:
            near = min(result.log.evaluations, key=lambda one: abs(one.val_bpb - claim))
            text = f"seed {result.seed}: {claim} is in no log; the nearest is {near.val_bpb} ({near.name} in {result.log.name})"
            (wrong if abs(near.val_bpb - claim) > _SLIP else absent).append(text)
        else:
            absent.append(f"seed {result.seed}: no log with its score")
    headline = record.claims.val_bpb
    if headline is not None and not record.claims.seeds:
        logged = [one.val_bpb for log in scored for one in log.evaluations]
        near_bpb = min(logged, key=lambda bpb: abs(bpb - headline))
        if abs(near_bpb - headline) > _ONE_SEED:
            wrong.append(f"{headline} is in no log; the nearest score is {near_bpb}")
        elif not record.score_name and not any(agree(headline, bpb, digits=LOG_DIGITS) for bpb in logged):
            absent.append(f"{headline} is in no log; the nearest score is {near_bpb}, which may be another seed's")
    if wrong:
        return fails(rule, "; ".join(wrong), _LOG_LIMIT)
    return note(rule, "; ".join(absent), _LOG_LIMIT) if absent else passes(rule, "; ".join(found), _LOG_LIMIT)


def json_and_logs(record: RecordFolder) -> Finding:
    """Compare the other numbers, such as steps and bytes, in submission.json with the logs."""
    rule = "submission.json agrees with the logs"
    compared, wrong = 0, []
    for result in record.results:
        if not result.log:
            continue
        measured = logged_numbers(result.log, result.evaluation)
        if measured.get("bytes_code") != record.claims.number("bytes_code"):
            # the code that ran differs in size from the shipped script, so the totals differ; `size.parts` checks them
            measured.pop("artifact_bytes", None)
        for name in _COMPARED:
            if name in result.claimed and name in measured:
                compared += 1
                if not agree(result.claimed[name], measured[name], _CLOCKS.get(name, 0.0)):
                    wrong.append(f"{name} is {result.claimed[name]}, but {measured[name]} in {result.log.name}")
    if not compared:
        return unknown(rule, "no number besides the score is in both")
    return note_unless(not wrong, rule, "; ".join(wrong) or counted(compared, "number"))


def means(record: RecordFolder) -> Finding:
    """Check that submission.json states the mean and deviation of the seeds' scores.

    The deviation may be the sample's or the population's.
    """
    rule = "the headline is the mean of the seeds"
    wrong: list[str] = []
    slips: list[str] = []
    compared = 0
    if not record.claims.seeds:
        # the rule `score` compares a headline without scores per seed with the logs
        return unknown(rule, "no scores per seed in submission.json")
    for name in ("val_bpb", "val_loss"):
        values = [result.numbers[name] for result in record.results if name in result.numbers]
        stated = record.claims.val_bpb if name == "val_bpb" else record.claims.number("val_loss")
        if len(values) != len(record.results) or not values or stated is None:
            continue
        mean, deviation = mean_and_deviation(values)
        compared += 1
        if not agree(stated, mean):
            text = f"{name} is {stated}, the seeds give {mean:.8f}"
            one = next((f"{text}; it is a seed's alone" for value in values if agree(stated, value)), "")
            # break the rule only for a field named val_bpb: a field of another name may belong to another evaluation
            far = record.claims.score_field == name == "val_bpb" and abs(stated - mean) > _SLIP and not one
            (wrong if far else slips).append(one or text)
        stated = record.claims.values.get(f"{name}_std")
        if deviation is not None and is_number(stated):
            compared += 1
            population = deviation * ((len(values) - 1) / len(values)) ** 0.5
            if not (agree(stated, deviation) or agree(stated, population)):
                slips.append(f"{name}_std is {stated}, the seeds give {deviation:.8f}")
    if wrong:
        return fails(rule, "; ".join([*wrong, *slips]))
    if slips:
        return note(rule, "; ".join(slips))
    return passes(rule, counted(compared, "number")) if compared else unknown(rule, "no scores per seed")


def readme(record: RecordFolder) -> Finding:
    """Check that the first score in README.md is the score in submission.json."""
    rule = "README states the score of submission.json"
    stated = record.claims.val_bpb
    if not record.readme or stated is None:
        return unknown(rule, "no val_bpb in submission.json" if record.readme else "no README.md")
    # README may also state the score of one seed, or the mean of the seeds
    scores = [stated, *record.scores.values()]
    if record.scores:
        scores.append(statistics.fmean(record.scores.values()))
    headline = _headline(record.readme)
    numbers = re.findall(_BPB, record.readme, re.IGNORECASE)
    found = next((text for text in [*headline, *numbers] if any(_stated(score, text) for score in scores)), "")
    if headline and found not in headline:
        # the first score may belong to an earlier record; if the right score comes later, give only a note
        elsewhere = any(_stated(stated, text) for text in numbers)
        return (note if elsewhere else _judge(headline[0], stated))(rule, _said(headline[0], stated), _README_LIMIT)
    if found:
        return passes(rule, f"val_bpb {found}")
    marked = [found[1] or found[2] for found in _MARKED.finditer(record.readme)]
    if not marked:
        return unknown(rule, f"no val_bpb {stated} in README.md")
    nearest = min(marked, key=lambda text: abs(float(text) - stated))
    return _judge(nearest, stated)(rule, _said(nearest, stated), _README_LIMIT)


def _judge(text: str, stated: float) -> Callable[[str, str, str], Finding]:
    return note if abs(float(text) - stated) <= _SLIP else fails


def _said(text: str, stated: float) -> str:
    return f"README.md says {text}, submission.json {stated}"


def _headline(text: str) -> list[str]:
    """Return the scores in the first line of README.md that begins like a result, such as `val_bpb: 1.23`."""
    form = rf"^[ \t#*>|_-]*(?:final |mean |our |average |\d-seed mean )*(?:val[_ ]?bpb|score|bpb|result)\b[^\d\n]{{0,24}}{_BPB}"
    found = re.search(form, text, re.IGNORECASE | re.MULTILINE)
    line = text[found.start(1) : found.start(1) + 200].partition("\n")[0] if found else ""
    return re.findall(_BPB, line, re.IGNORECASE)


def _stated(score: float, text: str) -> bool:
    """Whether `text` is the score, rounded, truncated or with more digits."""
    return rounds_to(Decimal(str(score)), text) or agree(score, float(text))

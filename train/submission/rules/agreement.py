"""Rules: the numbers in logs, submission.json and README must agree to the last stated digit."""

from __future__ import annotations

import re
from decimal import MAX_PREC, ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal

from train.common.wording import counted
from train.submission.record_folder import RecordFolder, logged_numbers
from train.submission.rules.finding import Finding, fails, pass_if, passes, unknown
from train.submission.summary import mean_and_deviation

_COMPARED = "val_loss val_bpb artifact_bytes bytes_model steps step_avg_ms train_time_s eval_time_s".split()
# tolerances, because submission.json may round a clock that had more digits than the log shows
_CLOCKS = {"step_avg_ms": Decimal("0.01"), "train_time_s": Decimal("0.001"), "eval_time_s": Decimal("0.001")}
_SCORE_DECIMALS = 8
# the default context keeps 28 digits, and a number may have more
_ANY_LENGTH = Context(prec=MAX_PREC)


def logs(record: RecordFolder) -> Finding:
    rule = "logs are complete"
    if not record.logs:
        return unknown(rule, "no log")
    cut = [log.path.name for log in record.logs if log.score is None]
    return pass_if(not cut, rule, f"no final score in {', '.join(cut)}" if cut else counted(len(record.logs), "log"))


def json_and_logs(record: RecordFolder) -> Finding:
    rule = "submission.json agrees with the logs"
    if not record.submission or not record.logs:
        return unknown(rule, "no log" if record.submission else "no submission.json")
    compared, wrong = 0, []
    for log in record.logs:
        stated = record.seed_results.get(log.seed, {})
        if not stated and len(record.logs) == 1:
            scores = {name: record.number(name) for name in ("val_loss", "val_bpb")}
            stated = {name: score for name, score in scores.items() if score is not None}
        measured = logged_numbers(log)
        if "bytes_code" in measured and measured["bytes_code"] != record.number("bytes_code"):
            # the shipped script and the code that ran differ in size, and so do the totals; `size.parts` checks the sum
            measured.pop("artifact_bytes", None)
        for name in _COMPARED:
            if name in stated and name in measured:
                compared += 1
                if not _agree(stated[name], measured[name], _CLOCKS.get(name)):
                    wrong.append(f"{name} is {stated[name]}, but {measured[name]} in {log.path.name}")
    if not compared:
        return unknown(rule, "no log of a seed in submission.json")
    return pass_if(not wrong, rule, "; ".join(wrong) or counted(compared, "number"))


def means(record: RecordFolder) -> Finding:
    """Compare mean and deviation with the seeds' scores. The deviation may be the sample's or the population's."""
    rule = "mean and standard deviation match the seeds"
    wrong, compared = [], 0
    for name in ("val_bpb", "val_loss"):
        values = [record.result(seed).get(name) for seed in record.seeds]
        known = [value for value in values if value is not None]
        stated = record.number(name)
        if len(known) != len(values) or not known or stated is None:
            continue
        mean, deviation = mean_and_deviation(known)
        compared += 1
        if not _agree(stated, mean):
            wrong.append(f"{name} is {stated}, the seeds give {mean:.8f}")
        stated = record.number(f"{name}_std")
        if deviation is not None and stated is not None:
            compared += 1
            population = deviation * ((len(known) - 1) / len(known)) ** 0.5
            if not (_agree(stated, deviation) or _agree(stated, population)):
                wrong.append(f"{name}_std is {stated}, the seeds give {deviation:.8f}")
    if wrong:
        return fails(rule, "; ".join(wrong))
    return passes(rule, counted(compared, "number")) if compared else unknown(rule, "no scores per seed")


def readme(record: RecordFolder) -> Finding:
    rule = "README states the score of submission.json"
    stated = record.number("val_bpb")
    if not record.readme or stated is None:
        return unknown(rule, "no val_bpb in submission.json" if record.readme else "no README.md")
    numbers = re.findall(r"(?<![\w.,])\d\.\d{4,}(?!\w|\.\d)", record.readme)
    found = next((text for text in numbers if _rounds_to(Decimal(str(stated)), text)), None)
    return passes(rule, f"val_bpb {found}") if found else unknown(rule, f"no val_bpb {stated} in README.md")


def _agree(stated: float, measured: float, tolerance: Decimal | None = None) -> bool:
    a, b = Decimal(str(stated)), Decimal(str(measured))
    if tolerance is not None and abs(a - b) <= tolerance:
        return True
    fewer, more = sorted((a, b), key=lambda value: -int(value.as_tuple().exponent))
    # JSON drops the last zero of a score with 8 decimals
    zero = "0" if fewer.as_tuple().exponent == 1 - _SCORE_DECIMALS else ""
    return _rounds_to(more, format(fewer, "f") + zero)


def _rounds_to(value: Decimal, text: str) -> bool:
    """Whether `text` is `value`, rounded or truncated to the number of decimals in `text`."""
    unit, wanted = Decimal(1).scaleb(-len(text.partition(".")[2])), Decimal(text)
    return any(
        value.quantize(unit, mode, _ANY_LENGTH) == wanted for mode in (ROUND_HALF_EVEN, ROUND_HALF_UP, ROUND_DOWN)
    )

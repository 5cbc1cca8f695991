"""Logs, submission.json and README must say the same, to the last digit that they give."""

from __future__ import annotations

import re
from decimal import MAX_PREC, ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal

from train.common.wording import counted
from train.run.log_grammar import Log
from train.submission.record_folder import RecordFolder, logged_numbers, mean_and_deviation
from train.submission.record_scores import is_number
from train.submission.rules.finding import Finding, fails, pass_if, passes, unknown

_COMPARED = (
    "val_loss",
    "val_bpb",
    "artifact_bytes",
    "bytes_model",
    "steps",
    "step_avg_ms",
    "train_time_s",
    "eval_time_s",
)
# a clock in a json may be rounded from more digits than the log has
_CLOCKS = {"step_avg_ms": Decimal("0.01"), "train_time_s": Decimal("0.001"), "eval_time_s": Decimal("0.001")}
_SCORE_DECIMALS = 8
# numbers of so many digits are not alike by chance
_LONG = 6
# for numbers of a README, which may have more digits than the 28 of the usual context
_ANY_LENGTH = Context(prec=MAX_PREC)


def logs(record: RecordFolder) -> Finding:
    rule = "logs run to their final score"
    if not record.logs:
        return unknown(rule, "no log")
    cut = [log.path.name for log in record.logs if log.score is None]
    return pass_if(rule, not cut, f"none in {', '.join(cut)}" if cut else f"all {len(record.logs)}")


def json_and_logs(record: RecordFolder) -> Finding:
    rule = "submission.json agrees with the logs"
    if not record.submission or not record.logs:
        return unknown(rule, "no log" if record.submission else "no submission.json")
    compared, wrong = 0, []
    for log in record.logs:
        found = record.seed_results.get(log.seed, {})
        if not found and len(record.logs) == 1:
            scores = {name: record.number(name) for name in ("val_loss", "val_bpb")}
            found = {name: score for name, score in scores.items() if score is not None}
        measured = logged_numbers(log)
        if "bytes_code" in measured and measured["bytes_code"] != record.number("bytes_code"):
            # the shipped script is another form of what ran: its total is the sum that the rule on size checks
            measured.pop("artifact_bytes", None)
        for name in _COMPARED:
            if name in found and name in measured:
                compared += 1
                if not _agree(found[name], measured[name], _CLOCKS.get(name)):
                    wrong.append(f"{log.path.name}: {name} is {measured[name]}, json says {found[name]}")
    if wrong:
        return fails(rule, "; ".join(wrong))
    if not compared:
        return unknown(rule, "no seed of the json has a log")
    return passes(rule, counted(compared, "number"))


def means(record: RecordFolder) -> Finding:
    """Mean and deviation of the json must be those of its seeds; either deviation is taken."""
    rule = "mean and deviation are those of the seeds"
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
            wrong.append(f"{name} {stated}, of the seeds {mean:.8f}")
        stated = record.number(f"{name}_std")
        if deviation is not None and stated is not None:
            compared += 1
            population = deviation * ((len(known) - 1) / len(known)) ** 0.5
            if not (_agree(stated, deviation) or _agree(stated, population)):
                wrong.append(f"{name}_std {stated}, of the seeds {deviation:.8f}")
    if wrong:
        return fails(rule, "; ".join(wrong))
    return passes(rule, counted(compared, "number")) if compared else unknown(rule, "no scores per seed")


def readme(record: RecordFolder) -> Finding:
    """A number in the README that is one digit from a measured one, and no rounding of any, is a slip."""
    rule = "README agrees with json and logs"
    if not record.readme:
        return unknown(rule, "no README.md")
    known = _known_numbers(record)
    if not known:
        return unknown(rule, "no measured number to compare with")
    precise = {value for value in known if len(value.as_tuple().digits) >= _LONG}
    wrong: list[str] = []
    matched = 0
    for text in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w]|\.\d)", record.readme):
        plain = text.replace(",", "").rstrip(".")
        decimals = len(plain.partition(".")[2])
        if decimals < 4 and len(plain.partition(".")[0]) < 6:
            continue
        if any(_rounds_to(value, plain) for value in known):
            matched += 1
            continue
        if decimals >= _LONG or (decimals == 0 and len(plain) >= 6):
            near = next((value for value in precise if _one_digit_apart(plain, _written(value, decimals))), None)
            if near is not None:
                wrong.append(f"{text} in README.md, {_written(near, decimals)} measured")
    for seed in record.seeds:
        wrong += _row_slips(record, seed)
    if wrong:
        return fails(rule, "; ".join(dict.fromkeys(wrong)))
    stated = record.number("val_bpb")
    if stated is not None and not matched:
        return unknown(rule, f"the score {stated} is not in README.md")
    return passes(rule, f"{counted(matched, 'measured number')} in README.md")


def _row_slips(record: RecordFolder, seed: str) -> list[str]:
    """Cells in the seed's rows of tables that are up to two units of their last digit from a score of the seed."""
    result = record.result(seed)
    scores = [Decimal(str(result[name])) for name in ("val_bpb", "val_loss") if name in result]
    values = [*scores, *(value for log in record.logs if log.seed == seed for value in _log_numbers(log.log))]
    slips = []
    for row in re.findall(rf"^\|\s*\**{re.escape(seed)}\**\s*\|(.*)\|\s*$", record.readme, re.MULTILINE):
        for cell in re.findall(r"(?<![\w.])\d\.\d{4,5}(?!\d)", row):
            unit = Decimal(1).scaleb(-len(cell.partition(".")[2]))
            if any(_rounds_to(value, cell) for value in values):
                continue
            near = next((value for value in scores if abs(value - Decimal(cell)) <= 2 * unit), None)
            if near is not None:
                slips.append(f"{cell} in README.md's row of seed {seed}, {near} measured")
    return slips


def _known_numbers(record: RecordFolder) -> set[Decimal]:
    found = {Decimal(str(value)) for value in record.submission.values() if is_number(value)}
    for seed in record.seeds:
        found |= {Decimal(str(value)) for value in record.result(seed).values()}
        found |= {Decimal(str(value)) for value in record.seed_results.get(seed, {}).values()}
    for log in record.logs:
        found |= _log_numbers(log.log)
    for name in ("val_bpb", "val_loss", "artifact_bytes"):
        values = [record.result(seed)[name] for seed in record.seeds if name in record.result(seed)]
        if values:
            mean, deviation = mean_and_deviation(values)
            found |= {Decimal(str(value)) for value in (mean, deviation) if value is not None}
    return found


def _log_numbers(log: Log) -> set[Decimal]:
    parts = [log["sizes"], log["facts"], log["peak_memory"] or {}, *log["finals"].values(), *log["vals"].values()]
    return {Decimal(str(value)) for part in parts for value in part.values() if is_number(value)}


def _agree(stated: float, measured: float, slack: Decimal | None = None) -> bool:
    a, b = Decimal(str(stated)), Decimal(str(measured))
    if slack is not None and abs(a - b) <= slack:
        return True
    fewer, more = sorted((a, b), key=lambda value: -int(value.as_tuple().exponent))
    if fewer.as_tuple().exponent == 1 - _SCORE_DECIMALS:
        # a number of 8 decimals whose last one is 0 has lost it
        return _rounds_to(more, format(fewer, "f") + "0")
    return _rounds_to(more, format(fewer, "f"))


def _rounds_to(value: Decimal, text: str) -> bool:
    """Whether `text` is `value` rounded or cut to the digits that it gives."""
    unit = Decimal(1).scaleb(-len(text.partition(".")[2]))
    wanted = Decimal(text)
    return any(
        value.quantize(unit, mode, _ANY_LENGTH) == wanted for mode in (ROUND_HALF_EVEN, ROUND_HALF_UP, ROUND_DOWN)
    )


def _written(value: Decimal, decimals: int) -> str:
    return format(value.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN, _ANY_LENGTH), "f")


def _one_digit_apart(a: str, b: str) -> bool:
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1

"""Rules: at most 600 s of training, including calibration on training data, and at most 600 s of evaluation."""

from __future__ import annotations

from train.submission.record_folder import RecordFolder, SeedResult
from train.submission.record_logs import Clock
from train.submission.rules.finding import Finding, fails, note, note_unless, pass_if, passes, unknown

LIMIT_SECONDS = 600.0
# the longest time for training and calibration that the organisers accepted, in #2135
_ADMITTED_SECONDS = 606.5
_TRAINING_LIMIT = "at most 600 s of training; a step that began in time may finish"
_CALIBRATION_LIMIT = "calibration on training data counts as training"
_EVALUATION_LIMIT = "at most 600 s of evaluation, besides training"
_NO_LIMIT = "not limited in the non-record track"


def training(record: RecordFolder) -> Finding:
    """Check that training takes at most 600 s, plus two average steps.

    The step that reaches the limit may finish. The published loop reads the clock before the device has finished a
    step, so it may begin one more step after the limit.
    """
    rule = "training time"
    clocks = _clocks(record)
    if not clocks:
        return unknown(rule, "no training time in a log or in submission.json", _TRAINING_LIMIT)
    seed, worst = max(clocks, key=lambda item: _excess(item[1]))
    value = f"{worst.seconds:.3f} s (seed {seed}), {1000 * worst.step_s:.1f} ms per step"
    if worst.error_s:
        value += f", ± {worst.error_s:.1f} s, as the clock is rounded"
    if record.non_record:
        return passes(rule, f"{value}; {_NO_LIMIT}")
    return pass_if(_excess(worst) <= 0, rule, value, _TRAINING_LIMIT)


def calibration(record: RecordFolder) -> Finding:
    rule = "training and calibration time"
    generated = record.find(r"gptq[^\n]{0,60}(?:generat|self-?gen|autoregress)")
    if any(name != "README.md" and name != "submission.json" for name, _ in generated):
        return passes(rule, f"calibrated on generated text (according to {generated[-1][0]})", _CALIBRATION_LIMIT)
    timed = [
        (result.seed, clock, result.numbers["calibration_s"])
        for result in record.results
        if (clock := result.clock) and "calibration_s" in result.numbers
    ]
    if not timed:
        if generated := record.find(r"self-?gen", logs=False):
            return passes(rule, f"calibrated on generated text (according to {generated[0][0]})", _CALIBRATION_LIMIT)
        if record.claims.values.get("calibration") == "none":
            return passes(rule, "no calibration", _CALIBRATION_LIMIT)
        return unknown(rule, "no log gives the calibration time", _CALIBRATION_LIMIT)
    seed, worst, extra = max(timed, key=lambda item: item[1].seconds + item[2])
    total = worst.seconds + extra
    value = f"{worst.seconds:.3f} + {extra:.1f} = {total:.1f} s (seed {seed})"
    if record.non_record:
        return passes(rule, f"{value}; {_NO_LIMIT}")
    if _excess(worst, extra) <= 0 and total <= LIMIT_SECONDS:
        return passes(rule, value, _CALIBRATION_LIMIT)
    if total - worst.error_s <= _ADMITTED_SECONDS:
        return note(rule, f"{value}; up to {_ADMITTED_SECONDS} s was admitted", _CALIBRATION_LIMIT)
    return fails(rule, value, _CALIBRATION_LIMIT)


def evaluation(record: RecordFolder) -> Finding:
    """Check the duration of the evaluation that gave the score, with test-time training."""
    rule = "evaluation time"
    known = [(_where(result), result.numbers["eval_time_s"]) for result in record.results if _timed(result)]
    stated = record.claims.number("eval_time_s")
    if not known and stated is not None:
        known = [("submission.json", stated)]
    if not known:
        return unknown(rule, "no time of the evaluation that made the score", _EVALUATION_LIMIT)
    source, longest = max(known, key=lambda item: item[1])
    value = f"{longest:.1f} s ({source})"
    if record.non_record:
        return passes(rule, f"{value}; {_NO_LIMIT}")
    return pass_if(longest <= LIMIT_SECONDS, rule, value, _EVALUATION_LIMIT)


def own_limits(record: RecordFolder) -> Finding:
    """Note the limits that the record's script prints into its log and exceeds."""
    rule = "limits that the log states"
    found = [(log.name, name, *pair) for log in record.logs for name, pair in log.log["limits"].items()]
    over = [f"{name} {value} in {log}, must be < {limit}" for log, name, value, limit in found if value >= limit]
    return note_unless(not over, rule, "; ".join(over) or "none is exceeded")


def _excess(clock: Clock, extra_s: float = 0.0) -> float:
    """Return the seconds between the limit and the start of the last step but one; positive: it began too late.

    `extra_s` is added to the training time. The rounding error of the clock is subtracted.
    """
    return clock.seconds + extra_s - 2 * clock.step_s - clock.error_s - LIMIT_SECONDS - 1e-9


def _clocks(record: RecordFolder) -> list[tuple[str, Clock]]:
    return [(result.seed, clock) for result in record.results if (clock := result.clock) and clock.seconds > 0]


def _timed(result: SeedResult) -> bool:
    return "eval_time_s" in result.numbers


def _where(result: SeedResult) -> str:
    name = result.evaluation.name if result.evaluation and result.evaluation.seconds is not None else "submission.json"
    return f"{name}, seed {result.seed}"

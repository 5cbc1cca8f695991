"""Rules: at most 600 s of training, including calibration on training data, and at most 600 s of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from train.submission.record_folder import RecordFolder
from train.submission.record_scores import is_number
from train.submission.rules.finding import Finding, pass_if, passes, unknown

LIMIT_SECONDS = 600.0
_TRAINING_LIMIT = f"{LIMIT_SECONDS:.0f} s; a step started in time may finish"


@dataclass(frozen=True)
class _Clock:
    """A seed's training time.

    Attributes:
        seed: the seed.
        seconds: training clock after the last step.
        step_s: average seconds per step.
        error_s: largest error of `seconds`: 0, unless `seconds` is computed as steps × a rounded average.
        calibration_s: seconds of the calibration after the last step; None: not known.
    """

    seed: str
    seconds: float
    step_s: float
    error_s: float
    calibration_s: float | None

    def excess(self, extra_s: float = 0.0) -> float:
        """Return how many seconds past the limit the last step began, if `extra_s` is added to the training time."""
        return self.seconds + extra_s - self.step_s - self.error_s - LIMIT_SECONDS


def training(record: RecordFolder) -> Finding:
    """A step that begins before the limit may end after it, because a script reads the clock after each step."""
    rule = "training time"
    clocks = _clocks(record)
    if not clocks:
        return unknown(rule, "no training time in a log or in submission.json", _TRAINING_LIMIT)
    worst = max(clocks, key=_Clock.excess)
    value = f"{worst.seconds:.3f} s (seed {worst.seed}), {1000 * worst.step_s:.1f} ms per step"
    if worst.error_s:
        value += f", computed from the average step, ± {worst.error_s:.1f} s"
    return pass_if(worst.excess() <= 0, rule, value, _TRAINING_LIMIT)


def calibration(record: RecordFolder) -> Finding:
    """Calibration on training data counts as training time."""
    rule = "training and calibration time"
    timed = [(clock, clock.calibration_s) for clock in _clocks(record) if clock.calibration_s is not None]
    if not timed:
        generated = record.find(r"gptq:generat|self-?gen")
        if generated:
            return passes(rule, f"calibrated on generated text (according to {generated[0][0]})", _TRAINING_LIMIT)
        if record.submission.get("calibration") == "none":
            return passes(rule, "no calibration", _TRAINING_LIMIT)
        return unknown(rule, "no log gives the calibration time", _TRAINING_LIMIT)
    worst, extra = max(timed, key=lambda item: item[0].excess(item[1]))
    value = f"{worst.seconds:.3f} + {extra:.1f} = {worst.seconds + extra:.1f} s (seed {worst.seed})"
    return pass_if(worst.excess(extra) <= 0, rule, value, _TRAINING_LIMIT)


def evaluation(record: RecordFolder) -> Finding:
    rule, limit = "evaluation time", f"{LIMIT_SECONDS:.0f} s"
    times = {f"seed {seed}": record.result(seed).get("eval_time_s") for seed in record.seeds}
    known = {source: seconds for source, seconds in times.items() if seconds is not None}
    if not known:
        stated = record.number("eval_time_seconds")
        if stated is None:
            return unknown(rule, "no evaluation time in a log or in submission.json", limit)
        known = {"submission.json": stated}
    source, longest = max(known.items(), key=lambda item: item[1])
    return pass_if(longest <= LIMIT_SECONDS, rule, f"{longest:.1f} s ({source})", limit)


def _clocks(record: RecordFolder) -> list[_Clock]:
    found = []
    for seed in record.seeds:
        result = record.result(seed)
        steps, average = result.get("steps", 0), result.get("step_avg_ms", 0.0)
        if "train_time_s" not in result and not (steps and average):
            continue
        seconds, error = result.get("train_time_s"), 0.0
        if seconds is None:
            decimals = -int(Decimal(str(average)).as_tuple().exponent)
            seconds, error = steps * average / 1000, steps * 0.5 * 10.0**-decimals / 1000
        logged = [log.log["facts"].get("calibration_s") for log in record.logs if log.seed == seed]
        extra = next((value for value in logged if is_number(value)), result.get("calibration_s"))
        found.append(_Clock(seed, float(seconds), average / 1000, error, extra))
    return found

"""600 s of training, calibration on training data among them, and 600 s of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

from train.submission.record_folder import RecordFolder
from train.submission.record_scores import is_number
from train.submission.rules.finding import Finding, pass_if, passes, unknown

LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class _Clock:
    """A seed's training clock.

    Attributes:
        seed: the seed.
        seconds: the clock behind the last step.
        step_s: one step.
        slack_s: by how much `seconds` may be too large: it is steps times a rounded average where no clock is given.
        calibration_s: calibration behind the clock; None: not known.
    """

    seed: str
    seconds: float
    step_s: float
    slack_s: float
    calibration_s: float | None

    @property
    def excess(self) -> float:
        """Seconds beyond the limit at which the last step began, calibration included."""
        return self.seconds + (self.calibration_s or 0.0) - self.step_s - self.slack_s - LIMIT_SECONDS


def training(record: RecordFolder) -> Finding:
    """The clock is read behind a step, so that the last step may end after the limit if it began before."""
    rule, limit = "training", f"{LIMIT_SECONDS:.0f} s, a step begun may end"
    clocks = [replace(clock, calibration_s=0.0) for clock in _clocks(record)]
    if not clocks:
        return unknown(rule, "no clock in a log or in submission.json", limit)
    worst = max(clocks, key=lambda clock: clock.excess)
    value = f"{worst.seconds:.3f} s (seed {worst.seed}), steps of {1000 * worst.step_s:.1f} ms"
    if worst.slack_s:
        value += f", computed to {worst.slack_s:.1f} s"
    return pass_if(rule, worst.excess <= 0, value, limit)


def calibration(record: RecordFolder) -> Finding:
    """Whatever reads training data is training."""
    rule, limit = "training and calibration on training data", f"{LIMIT_SECONDS:.0f} s, a step begun may end"
    clocks = [clock for clock in _clocks(record) if clock.calibration_s is not None]
    if not clocks:
        generated = record.find(r"gptq:generat|self-?gen")
        if generated:
            return passes(rule, f"calibrated on generated text, {generated[0][0]} says", limit)
        if record.submission.get("calibration") == "none":
            return passes(rule, "nothing was calibrated", limit)
        return unknown(rule, "no log says how long a calibration took, nor that there was none", limit)
    worst = max(clocks, key=lambda clock: clock.excess)
    extra = worst.calibration_s or 0.0
    value = f"{worst.seconds:.3f} + {extra:.1f} = {worst.seconds + extra:.1f} s (seed {worst.seed})"
    return pass_if(rule, worst.excess <= 0, value, limit)


def evaluation(record: RecordFolder) -> Finding:
    rule, limit = "evaluation", f"{LIMIT_SECONDS:.0f} s"
    times = {seed: record.result(seed).get("eval_time_s") for seed in record.seeds}
    known = {f"seed {seed}": seconds for seed, seconds in times.items() if seconds is not None}
    if not known:
        stated = record.number("eval_time_seconds")
        if stated is None:
            return unknown(rule, "no evaluation time in a log or in submission.json", limit)
        known = {"submission.json": stated}
    source, longest = max(known.items(), key=lambda item: item[1])
    return pass_if(rule, longest <= LIMIT_SECONDS, f"{longest:.1f} s ({source})", limit)


def _clocks(record: RecordFolder) -> list[_Clock]:
    found = []
    for seed in record.seeds:
        result = record.result(seed)
        steps, average = result.get("steps", 0), result.get("step_avg_ms", 0.0)
        if "train_time_s" not in result and not (steps and average):
            continue
        seconds, slack = result.get("train_time_s"), 0.0
        if seconds is None:
            decimals = -int(Decimal(str(average)).as_tuple().exponent)
            seconds, slack = steps * average / 1000, steps * 0.5 * 10.0**-decimals / 1000
        logged = [log.log["facts"].get("calibration_s") for log in record.logs if log.seed == seed]
        extra = next((value for value in logged if is_number(value)), result.get("calibration_s"))
        found.append(_Clock(seed, float(seconds), average / 1000, slack, extra))
    return found

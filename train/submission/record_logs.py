"""Reads one log of a record: seed, evaluations, training time and curves."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from train.run.log_grammar import Log, Numbers
from train.submission.digits import agree, is_number

_EXACT = "_exact"
# logs print scores with at least this many decimals
LOG_DIGITS = 4
_MOST_EVALUATIONS = 100
_BEFORE = re.compile(r"pre.?quant|post.?ema", re.IGNORECASE)
# a file's name may contain the seed, after one of these words
_NAMED_SEED = re.compile(r"(?:seed|_s|_log)[_-]?(\d{1,12})")


@dataclass(frozen=True)
class Evaluation:
    """A score in a log.

    Attributes:
        name: name such as `int6_sliding_window`, without the ending `_exact`.
        val_bpb: bits per byte, with all digits of the log.
        val_loss: nats per token; None: not stated.
        seconds: duration of this evaluation; None: not stated.
        line: number of the line in the file.
    """

    name: str
    val_bpb: float
    val_loss: float | None
    seconds: float | None
    line: int

    @property
    def kind(self) -> str:
        """Stage of the score: "before" quantization, "after" quantization, or "ttt" (with test-time training)."""
        return "ttt" if "ttt" in self.name.lower() else "before" if _BEFORE.search(self.name) else "after"


@dataclass(frozen=True)
class Clock:
    """The training time of a run.

    Attributes:
        seconds: training time after the last step, in seconds.
        step_s: average seconds per step.
        steps: number of steps.
        error_s: largest rounding error of `seconds`: a log may state minutes, or only a rounded average per step.
    """

    seconds: float
    step_s: float
    steps: int
    error_s: float = 0.0


@dataclass(frozen=True)
class LogFile:
    """A log in Parameter Golf's grammar.

    Attributes:
        name: path in the record folder.
        log: the parsed log.
    """

    name: str
    log: Log

    @cached_property
    def seed(self) -> str:
        """The seed that the log states; "" if it states none."""
        return str(self.log["facts"].get("seed", ""))

    @property
    def named_seed(self) -> str:
        """The seed in the file's name; "" if there is none."""
        found = _NAMED_SEED.search(self.name)
        return found[1] if found else ""

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The scores, in the log's order. A score that is logged with 4 and with 8 decimals is one evaluation."""
        finals = self.log["finals"]
        found = {}
        for name, values in finals.items():
            base = name.removesuffix(_EXACT)
            exact = finals.get(base + _EXACT, values)
            # skip a score that is not a positive number
            if not (is_number(exact["val_bpb"]) and exact["val_bpb"] > 0):
                continue
            other = finals.get(base, values)
            milliseconds = exact.get("eval_time_ms", other.get("eval_time_ms"))
            loss = exact.get("val_loss", other.get("val_loss"))
            found[base] = Evaluation(
                base,
                exact["val_bpb"],
                loss if is_number(loss) and loss > 0 else None,
                None if milliseconds is None else milliseconds / 1000,
                self.log["final_lines"][name],
            )
        return tuple(found.values())[-_MOST_EVALUATIONS:]

    def find(self, claim: float | None, name: str = "") -> Evaluation | None:
        """Return the last evaluation with the score `claim`; without a claim, the evaluation `name`.

        Without claim and name, return the last evaluation after quantization, or else the last evaluation. None if
        there is none.
        """
        if claim is not None:
            return next(
                (one for one in reversed(self.evaluations) if agree(claim, one.val_bpb, digits=LOG_DIGITS)), None
            )
        if name:
            return next((one for one in self.evaluations if one.name == name), None)
        scored = [one for one in self.evaluations if one.kind != "before" and "diagnostic" not in one.name]
        return scored[-1] if scored else self.evaluations[-1] if self.evaluations else None

    def stage_bpb(self, kind: str) -> float | None:
        """Return the bits per byte of the last evaluation whose `Evaluation.kind` is `kind`, or None.

        For "after", an evaluation with non-overlapping windows takes precedence over a sliding window.
        """
        scores = [one for one in self.evaluations if one.kind == kind]
        if kind == "after":
            scores.sort(key=lambda one: "sliding" not in one.name)
        if scores:
            return scores[-1].val_bpb
        # if no evaluation was before quantization, take the last validation during training
        last = self.log["vals"][max(self.log["vals"])] if kind == "before" and self.log["vals"] else None
        return last["val_bpb"] if last and self.evaluations and is_number(last["val_bpb"]) else None

    @cached_property
    def clock(self) -> Clock | None:
        """The training time, from the log line of the last step that has a time."""
        stopped = self.log["stopping_early"]
        # the order matters: of lines with the same step and precision, `max` takes the first
        lines = [*([stopped] if stopped else []), *self.log["vals"].values(), *self.log["steps"].values()]
        timed = [line for line in lines if is_number(line.get("train_time_ms"))]
        if not timed:
            return None
        last = max(timed, key=lambda line: (line["step"], -line.get("train_time_error_ms", 0.0)))
        average = [line["step_avg_ms"] for line in timed if line["step"] == last["step"] and "step_avg_ms" in line]
        step_ms = average[0] if average else last["train_time_ms"] / max(last["step"], 1)
        seconds, error = last["train_time_ms"] / 1000, last.get("train_time_error_ms", 0.0) / 1000
        return Clock(seconds, step_ms / 1000, int(last["step"]), error)

    def curve(self, field: str) -> list[tuple[int, float, float]]:
        """Return the points (step, seconds, value) of `train_loss` or `val_bpb`."""
        lines = self.log["steps"] if field == "train_loss" else self.log["vals"]
        points = [(step, lines[step][field]) for step in sorted(lines) if is_number(lines[step].get(field))]
        times = sorted(
            (step, line["train_time_ms"] / 1000)
            for found in (self.log["steps"], self.log["vals"])
            for step, line in found.items()
            if is_number(line.get("train_time_ms"))
        )
        return [(step, _interpolated(times, step), value) for step, value in points]


def _interpolated(times: Sequence[tuple[int, float]], step: int) -> float:
    """Return the training time at a step, interpolated between the nearest steps with a time."""
    place = bisect.bisect_left(times, (step, -1.0))
    if place < len(times) and times[place][0] == step:
        return times[place][1]
    if len(times) < 2:
        return times[0][1] if times else 0.0
    (a, s), (b, t) = times[max(0, min(place, len(times) - 1) - 1)], times[max(1, min(place, len(times) - 1))]
    return s + (t - s) * (step - a) / max(b - a, 1)


def logged_numbers(log: LogFile, evaluation: Evaluation | None) -> Numbers:
    """Return a log's numbers, with the names of `train.submission.claims`. The score is the score of `evaluation`."""
    values: dict[str, float | None] = {}
    facts, sizes = log.log["facts"], log.log["sizes"]
    if evaluation:
        seconds = evaluation.seconds
        total = facts.get("total_eval_time_ms")
        # the total includes earlier passes of test-time training; `seconds` covers only the last pass
        if evaluation.kind == "ttt" and total is not None:
            seconds = max(seconds or 0.0, total / 1000)
        values |= {"val_loss": evaluation.val_loss, "val_bpb": evaluation.val_bpb, "eval_time_s": seconds}
    if log.clock:
        values |= {"steps": log.clock.steps, "step_avg_ms": 1000 * log.clock.step_s, "train_time_s": log.clock.seconds}
    values |= {f"{kind}_bpb": log.stage_bpb(kind) for kind in ("before", "after", "ttt")}
    values |= {"calibration_s": facts.get("calibration_s"), "artifact_bytes": sizes.get("total")}
    values |= {"bytes_model": sizes.get("model"), "bytes_code": sizes.get("code_compressed", sizes.get("code"))}
    return {name: value for name, value in values.items() if is_number(value)}

"""Measures variants of a training step: compares losses and weight updates after a warm-up, then times them in turns."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.measure import common
from benchmarks.measure.step_variants import StepVariant
from benchmarks.measure.tokens import Tokens, rank_sequences, token_source
from train.config import Config
from train.describe import describe

# largest relative difference of a variant's mean warm-up loss from the first one's: bfloat16 sums in another order
MAX_LOSS_ERROR = 0.02
# largest difference from 1 of a variant's weight update projected on the first one's, for each kind of weights: 0.98 to 1.00
# in bfloat16 on a CPU, at most 0.5 without momentum or at half the rate; the losses of so few steps do not show this
MAX_UPDATE_ERROR = 0.25
# steps per measurement: the host may run ahead of the GPU, as in training
STEPS_PER_TURN = 4


@dataclass
class Bench:
    """The conditions of all measurements of a call.

    Attributes:
        config: the recipe.
        clock: device and number of measurements.
        limits: the device's ceilings, measured in this run.
        surroundings: device and versions, for the rows.
        warmup_steps: steps before timing, whose losses and weight updates are compared.
        data: folder of shards; None for random tokens.
        keep: whether rows are stored.
    """

    config: Config
    clock: common.Clock
    limits: common.Ceilings
    surroundings: common.Row
    warmup_steps: int
    data: Path | None
    keep: bool

    @property
    def rank_tokens(self) -> int:
        return rank_sequences(self.config) * self.config.train_seq_len

    def tokens(self) -> Tokens:
        """The batches, from the first one on."""
        return token_source(self.config, self.data, self.clock.device)

    def step_flops(self, recurrence: bool) -> float:
        mflop: float = describe(self.config, {})["mflop_per_token"][phase_name(recurrence)]
        return 1e6 * mflop * self.rank_tokens

    def row(self, variant: StepVariant, recurrence: bool, error: float) -> common.Row:
        p20, p50, p80 = common.quantiles(variant.times_ms)
        flops = self.step_flops(recurrence)
        return (
            {"op": f"step {self.config.recipe}", "impl": variant.name, "mode": phase_name(recurrence).replace("_", " ")}
            | {"shape": f"{rank_sequences(self.config)}x{self.config.train_seq_len}"}
            | {"dtype": "bf16" if self.clock.device.type == "cuda" else "f32", "p50": p50, "p20": p20, "p80": p80}
            | {"tflops": flops / p50 / 1e9, "gbps": "", "floor": flops / self.limits.tflops / 1e9}
            | {"rel_err": error, "n": len(variant.times_ms)}
        )

    def store(self, rows: Sequence[common.Row]) -> None:
        """Write rows at once, so that a later crash does not lose them."""
        path = common.append_rows(rows, self.surroundings) if self.keep else None
        if path:
            print(f"-> {path.relative_to(common.ROOT)}", flush=True)


def phase_name(recurrence: bool) -> str:
    return "after_recurrence" if recurrence else "before_recurrence"


def projected_update(update: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """For each kind of weights ⟨u, w⟩ / ⟨w, w⟩: 1 for the same update, 0 for none, -1 for the opposite one."""
    return {kind: float(update[kind] @ other / (other @ other)) for kind, other in wanted.items()}


def measure_steps(
    variants: Sequence[StepVariant], bench: Bench, recurrence: bool
) -> tuple[dict[str, float], list[str]]:
    """Warm all variants up on the same tokens, compare their losses and weight updates, then time those that agree in turns.

    Returns:
        For each timed variant the relative difference of its mean warm-up loss from the first one's; and the problems of
        the others.
    """
    device, rounds = bench.clock.device, bench.clock.rounds
    tokens = bench.tokens()
    batches = [tokens.next() for _ in range(bench.warmup_steps)]
    means: dict[str, float] = {}
    updates: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for variant in variants:
        try:
            before = variant.flat_weights()
            started = time.perf_counter()
            losses = [float(variant.run(batches[0], recurrence))]
            variant.first_step_s = time.perf_counter() - started
            losses += [float(variant.run(batch, recurrence)) for batch in batches[1:]]
            # on the host, which an illegal access on the device does not affect
            updates[variant.name] = {kind: (now - before[kind]).cpu() for kind, now in variant.flat_weights().items()}
            means[variant.name] = statistics.fmean(losses)
        # any error of a kernel or the compiler: measure the other variants
        except Exception as error:
            traceback.print_exc()
            problems.append(error_line(variant, error))
    errors: dict[str, float] = {}
    for name, mean in means.items():
        first = next(iter(errors), name)
        distance = abs(mean - means[first]) / means[first]
        projected = projected_update(updates[name], updates[first])
        if not distance <= MAX_LOSS_ERROR:
            problems.append(f"{name}: mean loss {mean:.4f}, {first} has {means[first]:.4f}")
        elif odd := {kind: value for kind, value in projected.items() if not abs(value - 1) <= MAX_UPDATE_ERROR}:
            values = ", ".join(f"{kind} {value:.2f}" for kind, value in odd.items())
            problems.append(f"{name}: its weight update, projected on {first}'s, is not 1: {values}")
        else:
            errors[name] = distance
    timed = [variant for variant in variants if variant.name in errors]
    steps = STEPS_PER_TURN if device.type == "cuda" else 1
    for number in range(rounds):
        batches = [tokens.next() for _ in range(steps)]
        turn = number % max(len(timed), 1)
        for variant in timed[turn:] + timed[:turn]:

            def run(variant: StepVariant = variant) -> None:
                for batch in batches:  # noqa: B023
                    variant.run(batch, recurrence)

            try:
                variant.times_ms.append(bench.clock.once_ms(run) / steps)
            except Exception as error:
                traceback.print_exc()
                # an error after another variant's may be that one's fault: keep the times measured before
                if not problems:
                    del errors[variant.name]
                problems.append(error_line(variant, error))
                timed = [other for other in timed if other is not variant]
    return {v.name: errors[v.name] for v in variants if v.name in errors and v.times_ms}, problems


def error_line(variant: StepVariant, error: Exception) -> str:
    """A variant's failure in one line."""
    return f"{variant.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

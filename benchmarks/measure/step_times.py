"""Compare the losses and weight updates of a training step's variants, then time the variants alternately."""

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
from benchmarks.report.results import relative
from train.config import Config
from train.describe import describe

# largest relative difference allowed between the mean warm-up loss of a variant and that of the first variant. The
# losses differ because bfloat16 sums depend on their order
MAX_LOSS_ERROR = 0.02
# `projected_update` of a variant may differ from 1 by at most this, for each kind of weights. On a CPU in bfloat16,
# correct variants gave 0.98 to 1.00. Variants without momentum or with half the learning rate gave 0.5 or less,
# although their losses were close
MAX_UPDATE_ERROR = 0.25
# steps between two readings of the clock; with several, the host can run ahead of the GPU as in training
STEPS_PER_TURN = 4


@dataclass
class Bench:
    """The settings of one run of the benchmark.

    `warmup_steps` is the number of steps whose losses and weight updates are compared. `data` is a folder of shards;
    None means random tokens. `surroundings` has the columns that are equal in all rows. `keep` says whether
    rows are stored.
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
        """Append the rows to the results file if `keep` is set. After that, a crash cannot lose the rows."""
        path = common.append_rows(rows, self.surroundings) if self.keep else None
        if path:
            print(f"-> {relative(path)}", flush=True)


def phase_name(recurrence: bool) -> str:
    return "after_recurrence" if recurrence else "before_recurrence"


def projected_update(update: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns ⟨update, wanted⟩ / ⟨wanted, wanted⟩ for each kind of weights.

    It is 1 for equal updates, 0 for no update and -1 for the opposite update.
    """
    return {kind: float(update[kind] @ other / (other @ other)) for kind, other in wanted.items()}


def measure_steps(
    variants: Sequence[StepVariant], bench: Bench, recurrence: bool
) -> tuple[dict[str, float], list[str]]:
    """Compare all variants with the first one over the warm-up steps, then time those that agree with it.

    All variants get the same tokens. Returns a dict and a list. The dict has, for each timed variant, the relative
    difference of its mean warm-up loss from the first variant's. The list has a line for each variant that failed.
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
            # copied to the host's memory, which an illegal access on the GPU cannot corrupt
            updates[variant.name] = {kind: (now - before[kind]).cpu() for kind, now in variant.flat_weights().items()}
            means[variant.name] = statistics.fmean(losses)
        # a kernel or the compiler may raise any error; the other variants are still measured
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
                # if another variant failed before, this error may be its consequence: keep this variant's earlier times
                if not problems:
                    del errors[variant.name]
                problems.append(error_line(variant, error))
                timed = [other for other in timed if other is not variant]
    return {v.name: errors[v.name] for v in variants if v.name in errors and v.times_ms}, problems


def error_line(variant: StepVariant, error: Exception) -> str:
    return f"{variant.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

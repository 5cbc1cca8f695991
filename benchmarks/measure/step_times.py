"""Ways of taking a step compared after a warm-up, by their losses and by how far their weights moved, then timed in turns."""

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

# how far a way's loss may be from the first one's after the warm-up, relative: bfloat16 in another order
MAX_LOSS_ERROR = 0.02
# how far the part of the first way's movement that a way repeats may be from 1, for each kind of weights: 0.98 to 1.00 in
# bfloat16 on a CPU, at most 0.5 without momentum or at half the rate; losses of so few steps show none of it
MAX_MOVEMENT_ERROR = 0.25
# steps between two looks at the clock: the host may run ahead of the GPU, as it does in training
STEPS_PER_TURN = 4


@dataclass
class Bench:
    """What all measurements of one call share.

    Attributes:
        config: the recipe.
        clock: device and number of measurements.
        limits: what the device reaches in this run.
        surroundings: device and versions, for the rows.
        warmup_steps: steps before timing, whose losses and weights are compared.
        data: folder of shards; None for made tokens.
        keep: whether rows go to the results.
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
        """The same tokens again, from the first on."""
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
        """Keep rows at once, so that whatever ends the process later cannot lose them."""
        path = common.append_rows(rows, self.surroundings) if self.keep else None
        if path:
            print(f"-> {path.relative_to(common.ROOT)}", flush=True)


def phase_name(recurrence: bool) -> str:
    return "after_recurrence" if recurrence else "before_recurrence"


def repeated_movement(moved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """For each kind of weights ⟨m, w⟩ / ⟨w, w⟩: 1 for the same movement, 0 for none, -1 for the opposite one."""
    return {kind: float(moved[kind] @ other / (other @ other)) for kind, other in wanted.items()}


def measure_steps(
    variants: Sequence[StepVariant], bench: Bench, recurrence: bool
) -> tuple[dict[str, float], list[str]]:
    """Warm every variant up on the same tokens, compare losses and weights, then time those that agree in turns.

    Returns:
        Relative distance of each variant's mean warm-up loss from the first one's, and what is wrong with the others.
    """
    device, rounds = bench.clock.device, bench.clock.rounds
    tokens = bench.tokens()
    batches = [tokens.next() for _ in range(bench.warmup_steps)]
    means: dict[str, float] = {}
    moved: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for variant in variants:
        try:
            before = variant.flat_weights()
            started = time.perf_counter()
            losses = [float(variant.run(batches[0], recurrence))]
            variant.first_step_s = time.perf_counter() - started
            losses += [float(variant.run(batch, recurrence)) for batch in batches[1:]]
            # on the host, where a way that loses the device cannot reach it
            moved[variant.name] = {kind: (now - before[kind]).cpu() for kind, now in variant.flat_weights().items()}
            means[variant.name] = statistics.fmean(losses)
        # whatever a kernel or the compiler dies of, the other ways have figures
        except Exception as error:
            traceback.print_exc()
            problems.append(error_line(variant, error))
    errors: dict[str, float] = {}
    for name, mean in means.items():
        first = next(iter(errors), name)
        distance = abs(mean - means[first]) / means[first]
        repeated = repeated_movement(moved[name], moved[first])
        if not distance <= MAX_LOSS_ERROR:
            problems.append(f"{name}: mean loss {mean:.4f}, {first} has {means[first]:.4f}")
        elif odd := {kind: part for kind, part in repeated.items() if not abs(part - 1) <= MAX_MOVEMENT_ERROR}:
            parts = ", ".join(f"{kind} {part:.2f}" for kind, part in odd.items())
            problems.append(f"{name}: of the movement of {first}'s weights it repeats: {parts}")
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
                # what fails after another way may have lost the device to it, and keeps its times
                if not problems:
                    del errors[variant.name]
                problems.append(error_line(variant, error))
                timed = [other for other in timed if other is not variant]
    return {v.name: errors[v.name] for v in variants if v.name in errors and v.times_ms}, problems


def error_line(variant: StepVariant, error: Exception) -> str:
    """A failure in a line."""
    return f"{variant.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

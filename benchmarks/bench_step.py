"""Measure milliseconds per training step of a recipe on one GPU, for several variants in one process.

A step does the work of one of 8 ranks; `benchmarks.measure.step_variants` defines the variants. All variants start from
the same weights and read the same tokens. A variant writes no row if it fails, or if its loss or weight update differs
from the first variant's. The rows of the phase without recurrence are written before the phase with recurrence begins.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import common
from benchmarks.measure.argument_types import parse_positive
from benchmarks.measure.step_times import Bench, error_line, measure_steps, phase_name
from benchmarks.measure.step_variants import StepVariant, add_attention, make_variants, row_names, step_config
from benchmarks.measure.tokens import rank_sequences
from train.common.errors import UserError, main_guard
from train.common.hardware import datasheet_tflops
from train.model.attention_choice import choose_attention
from train.recipes import recipe_names
from train.run.profile_parts import name_compiled_kernels
from train.run.profiling import NO_KERNELS, breakdown, busy_ms, kernel_times, new_trace, write_breakdowns, write_trace

PROFILED_STEPS = 3
# with fewer measurements than this, p20 and p80 do not show the spread
VERDICT_ROUNDS = 3
COLUMNS = ("p20", "p50", "p80", "tokens/s", "speed-up", "util.", "of sheet", "GPU busy", "idle", "step MiB", "first s")


def profile_variant(variant: StepVariant, bench: Bench, recurrence: bool) -> tuple[Any, dict[str, float], float | None]:
    """Run a few steps under the profiler.

    Returns the trace, milliseconds per step for each kernel family, and milliseconds per step in which the GPU was
    busy.
    """
    tokens = bench.tokens()
    batches = [tokens.next() for _ in range(PROFILED_STEPS)]
    trace = new_trace(bench.clock.device)
    with trace:
        for batch in batches:
            variant.run(batch, recurrence)
        if bench.clock.device.type == "cuda":
            torch.cuda.synchronize(bench.clock.device)
    return trace, breakdown(kernel_times(trace), PROFILED_STEPS), busy_ms(trace, PROFILED_STEPS)


def peak_mib(variant: StepVariant, bench: Bench, recurrence: bool) -> float | None:
    """Returns the MiB that one step allocates at its peak, beyond what was allocated before. None on a CPU."""
    device = bench.clock.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    between = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.run(bench.tokens().next(), recurrence)
    return (torch.cuda.max_memory_allocated(device) - between) / 2**20


def measure_phase(names: list[str], bench: Bench, recurrence: bool, traces: Path | None) -> bool:
    """Measure the variants with recurrence off or on.

    Prints a table, stores the rows, and writes traces if `traces` is a folder. Returns whether all variants succeeded.
    """
    config, limits, gpu = bench.config, bench.limits, bench.surroundings["gpu"]
    variants = make_variants(config, names, bench.clock.device)
    errors, problems = measure_steps(variants, bench, recurrence)
    rows = {v.name: bench.row(v, recurrence, errors[v.name]) for v in variants if v.name in errors}
    print(
        f"\n{config.recipe}, {bench.rank_tokens:,} tokens, {phase_name(recurrence).replace('_', ' ')}, on {gpu}; matrix "
        f"products of this run reach {limits.tflops:.3g} TFLOP/s"
    )
    if rows:
        bench.store(list(rows.values()))
    print("step MiB: peak memory of a step above what stays allocated between steps")
    print(f"{'':<28}" + "".join(f"{column:>10}" for column in COLUMNS))
    base = next(iter(rows.values()), None)
    for variant in variants:
        row = rows.get(variant.name)
        if row is None or base is None:
            continue
        try:
            trace, families, busy = profile_variant(variant, bench, recurrence)
            peak = peak_mib(variant, bench, recurrence)
        # the variant's times remain valid
        except Exception as error:
            problems.append(f"{error_line(variant, error)}, while it was profiled")
            trace, families, busy, peak = None, {}, None, None
        print(f"{variant.name:<28}" + "".join(f"{cell:>10}" for cell in cells(row, base, variant, bench, busy, peak)))
        if trace is None:
            continue
        print("    " + (", ".join(f"{family} {ms:.2f}" for family, ms in families.items()) or NO_KERNELS), flush=True)
        if traces:
            stem = f"{config.recipe}_{phase_name(recurrence).partition('_')[0]}_{re.sub('[=/]', '_', variant.name)}"
            write_trace(traces / f"{stem}_rank0.json.gz", trace)
            title = f"{config.recipe}, {variant.name}, {gpu} ({row['p50']:.1f} ms of wall time without the profiler)"
            write_breakdowns(traces, f"{stem}_", trace, PROFILED_STEPS, title)
    for name, row in rows.items():
        if row is not base and base is not None:
            print(comparison(name, base, row), flush=True)
    for problem in problems:
        print(f"FAILED {problem}", flush=True)
    return not problems


def cells(
    row: common.Row, base: common.Row, variant: StepVariant, bench: Bench, busy: float | None, peak: float | None
) -> list[str]:
    """Returns the cells of a variant's table line, in the order of `COLUMNS`."""
    sheet = datasheet_tflops(bench.surroundings["gpu"])
    found = [f"{row[name]:.2f}" for name in ("p20", "p50", "p80")]
    # a tiny step has no speed-up to show, because launches dominate its time
    speed_up = f"{base['p50'] / row['p50']:.2f} x" if bench.keep else "–"
    found += [f"{1e3 * bench.rank_tokens / row['p50']:,.0f}", speed_up]
    found += [f"{row['tflops'] / bench.limits.tflops:.1%}", f"{row['tflops'] / sheet:.1%}" if sheet else "–"]
    found += [f"{busy:.2f}", f"{row['p50'] - busy:.2f}"] if busy is not None else ["–", "–"]
    return [*found, f"{peak:.0f}" if peak is not None else "–", f"{variant.first_step_s:.1f}"]


def comparison(name: str, before: common.Row, after: common.Row) -> str:
    """Returns a line: both milliseconds per step, their relative difference, and the verdict of `verdict_of`."""
    change = after["p50"] / before["p50"] - 1
    return f"{name:<40}{before['p50']:>9.2f} → {after['p50']:>9.2f}  {change:>+7.1%}  {verdict_of(before, after)}"


def verdict_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns "faster" or "SLOWER" if the rows' ranges from p20 to p80 are disjoint, otherwise "within the spread"."""
    if min(before["n"], after["n"]) < VERDICT_ROUNDS:
        return "too few rounds"
    if after["p80"] < before["p20"] or after["p20"] > before["p80"]:
        return "faster" if after["p50"] < before["p50"] else "SLOWER"
    return "within the spread"


def _parser() -> argparse.ArgumentParser:
    parser = common.parser("bench_step", __doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument(
        "--variants",
        default="published,torch,golf",
        help="comma-separated; the others are compared with the first: published (the published script), torch (no kernels), golf (all "
        "kernels), golf-OPERATOR (all but that one), OPERATOR=BACKEND (torch with one kernel, such as muon_step=triton); all but "
        "published may end in +SETTING=VALUE, such as torch+optimizer_graph=on",
    )
    parser.add_argument(
        "--phase", default="both", choices=("before", "after", "both"), help="before: recurrence off; after: on"
    )
    parser.add_argument(
        "--warmup-steps", type=parse_positive, default=10, help="steps before timing; their results are compared"
    )
    add_attention(parser)
    parser.add_argument("--data", type=Path, help="folder of shards; default: random tokens")
    parser.add_argument(
        "--profile",
        type=Path,
        help="folder for each variant's trace and times by kernel family and model part",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = arguments.device
    config = step_config(arguments.recipe, device, tiny=arguments.tiny, attention=arguments.attention)
    if arguments.phase == "after" and not config.recur_layers:
        parser.error(f"--phase after: {arguments.recipe} repeats no layers: expected before or both")
    names = row_names(arguments.variants.split(","), device)
    if arguments.profile:
        # an unusable folder raises an error before anything is measured
        arguments.profile.mkdir(parents=True, exist_ok=True)
        if reason := name_compiled_kernels(device.type):
            print(f"profile: no times by part of the model: {reason}")
    clock = common.Clock(device, warmup_ms=arguments.warmup_ms, rounds=arguments.rounds)
    surroundings = common.environment(device)
    try:
        choice = choose_attention(config, device, rank_sequences(config))
    except UserError as error:
        parser.error(str(error))
    print(f"attention: {choice.name} ({choice.reason})", flush=True)
    # the same attention backend for all variants
    config = config.replace(attention=choice.name)
    bench = Bench(
        config, clock, common.ceilings(clock), surroundings, arguments.warmup_steps, arguments.data, not arguments.tiny
    )
    fine = True
    for recurrence in sorted({False, bool(config.recur_layers)}):
        if arguments.phase not in ("both", phase_name(recurrence).partition("_")[0]):
            continue
        try:
            fine &= measure_phase(names, bench, recurrence, arguments.profile)
        except UserError as error:
            parser.error(str(error))
    if not bench.keep or device.type != "cuda":
        print("not stored: only full-size GPU results are stored")
    return int(not fine)


if __name__ == "__main__":
    main_guard(main)

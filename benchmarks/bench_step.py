"""ms per training step of one GPU's share of a recipe, three ways in turn in one process.

The ways are those of `benchmarks.measure.step_variants`: published, torch, golf, any one operator switched, any of Inductor's switches, and
another value of a setting. All start from the same weights and read the same tokens; a way that fails, or whose loss or
weights leave the first one's, is named and writes no row. Rows are on disk before the next measurement begins. Kernels and
switches that are measured one by one have a process each, because after one illegal access nothing more can run in a process.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import common
from benchmarks.measure.devices import datasheet_tflops
from benchmarks.measure.step_times import Bench, measure_steps, phase_name, said_of
from benchmarks.measure.step_variants import (
    SETTINGS,
    StepVariant,
    add_attention,
    check_ways,
    kernels_problem,
    make_variants,
    named_ways,
    parse_way_switch,
    share_config,
    step_kernels,
)
from benchmarks.measure.tokens import share_sequences
from golf_kernels import dispatch
from train.common.errors import UserError, main_guard
from train.model.attention_choice import choose_attention
from train.model.compile import SWITCHES
from train.optimize.cuda_graph import choose_graph
from train.recipes import recipe_names
from train.run.profile_parts import name_compiled_kernels
from train.run.profiling import NO_KERNELS, breakdown, busy_ms, kernel_times, new_trace, write_breakdowns, write_trace

PROFILED_STEPS = 3
# with fewer measurements p20 and p80 say nothing of the spread
VERDICT_ROUNDS = 3


def profile_variant(variant: StepVariant, bench: Bench, recurrence: bool) -> tuple[Any, dict[str, float], float | None]:
    """A trace of some steps, milliseconds per step by family of kernels, and those in which the GPU was busy."""
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
    """Largest memory allocated in a step above what is allocated between steps, all variants' weights among it; on a GPU."""
    device = bench.clock.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    between = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.run(bench.tokens().next(), recurrence)
    return (torch.cuda.max_memory_allocated(device) - between) / 2**20


def measure_ways(names: list[str], bench: Bench, recurrence: bool, traces: Path | None) -> bool:
    """Measure the ways against each other, print their table, and keep their rows; whether all of them ran."""
    config, limits, gpu = bench.config, bench.limits, bench.surroundings["gpu"]
    variants = make_variants(config, names, bench.clock.device)
    errors, problems = measure_steps(variants, bench, recurrence)
    rows = {v.name: bench.row(v, recurrence, errors[v.name]) for v in variants if v.name in errors}
    print(
        f"\n{config.recipe}, {bench.share_tokens:,} tokens, {phase_name(recurrence).replace('_', ' ')}, on {gpu}, matrix rate of "
        f"this run {limits.tflops:.3g} TFLOP/s"
    )
    if rows:
        bench.store(list(rows.values()))
    datasheet = datasheet_tflops(gpu)
    columns = (
        "p20",
        "p50",
        "p80",
        "tokens/s",
        "speed-up",
        "util.",
        "of sheet",
        "GPU busy",
        "idle",
        "step MiB",
        "first s",
    )
    print(
        "step MiB: most that a step allocates above what stands between steps: all ways' weights, optimizers, averages"
    )
    print(f"{'':<28}" + "".join(f"{column:>10}" for column in columns))
    base = next(iter(rows.values()), None)
    for variant in variants:
        row = rows.get(variant.name)
        if row is None or base is None:
            continue
        try:
            trace, families, busy = profile_variant(variant, bench, recurrence)
            peak = peak_mib(variant, bench, recurrence)
        # its times count all the same
        except Exception as error:
            problems.append(f"{said_of(variant, error)}, while it was profiled")
            trace, families, busy, peak = None, {}, None, None
        cells = [f"{row[name]:.2f}" for name in ("p20", "p50", "p80")]
        # a tiny step is made of what a real one hides: launches
        faster = f"{base['p50'] / row['p50']:.2f} x" if bench.keep else "–"
        cells += [f"{1e3 * bench.share_tokens / row['p50']:,.0f}", faster]
        cells += [f"{row['tflops'] / limits.tflops:.1%}", f"{row['tflops'] / datasheet:.1%}" if datasheet else "–"]
        cells += [f"{busy:.2f}", f"{row['p50'] - busy:.2f}"] if busy is not None else ["–", "–"]
        cells += [f"{peak:.0f}" if peak is not None else "–", f"{variant.first_step_s:.1f}"]
        print(f"{variant.name:<28}" + "".join(f"{cell:>10}" for cell in cells))
        if trace is None:
            continue
        print("    " + (", ".join(f"{family} {ms:.2f}" for family, ms in families.items()) or NO_KERNELS), flush=True)
        if traces:
            stem = f"{config.recipe}_{phase_name(recurrence).partition('_')[0]}_{variant.name.replace('=', '_')}"
            write_trace(traces / f"{stem}_rank0.json.gz", trace)
            title = f"{config.recipe}, {variant.name}, {gpu} ({row['p50']:.1f} ms of wall time without the profiler)"
            write_breakdowns(traces, f"{stem}_", trace, PROFILED_STEPS, title)
    for problem in problems:
        print(f"FAILED {problem}", flush=True)
    return not problems


def measure_pair(way: str, other: str, bench: Bench, recurrence: bool) -> bool:
    """Measure a way and another beside each other, say which is faster, and keep their rows; whether both ran."""
    base, candidate = make_variants(bench.config, [way, other], bench.clock.device)
    phase, gpu = phase_name(recurrence).replace("_", " "), bench.surroundings["gpu"]
    print(f"\n{bench.config.recipe}, {phase}, on {gpu}: {way} beside {other}, ms per step")
    errors, problems = measure_steps([base, candidate], bench, recurrence)
    for problem in problems:
        print(f"FAILED {problem}", flush=True)
    if not {base.name, candidate.name} <= set(errors):
        return False
    before, after = (bench.row(variant, recurrence, errors[variant.name]) for variant in (base, candidate))
    bench.store([before, after])
    verdict = verdict_of(before, after)
    print(
        f"{candidate.name:<40}{before['p50']:>9.2f} → {after['p50']:>9.2f}  {after['p50'] / before['p50'] - 1:>+7.1%}  "
        f"{verdict:<18}first step {candidate.first_step_s:.1f} s"
    )
    if verdict == "faster" and bench.keep and "+" in other:
        commit = bench.surroundings["commit"]
        figure = (
            f"{gpu}, {commit}, {bench.config.recipe} {phase}: {before['p50']:.2f} to {after['p50']:.2f} ms per step"
        )
        name = other.partition("+")[2]
        if name == "optimizer_graph=on":
            print(f"    to make it the default, in train/optimize/cuda_graph.py: FIGURE = {figure!r}", flush=True)
        elif not parse_way_switch(name).settings:
            print(f"    to set it, in train/model/compile.py: figure={figure!r}", flush=True)
    return not problems


def verdict_of(before: common.Row, after: common.Row) -> str:
    """Whether one row is beyond the other's spread."""
    if min(before["n"], after["n"]) < VERDICT_ROUNDS:
        return "too few rounds"
    if after["p80"] < before["p20"] or after["p20"] > before["p80"]:
        return "faster" if after["p50"] < before["p50"] else "SLOWER"
    return "within the spread"


def measure_apart(pairs: Mapping[str, list[str]], arguments: argparse.Namespace) -> int:
    """Measure each pair in a process of its own, which may die or hang; the exit code.

    Args:
        pairs: the arguments that say what to measure, by its name.
        arguments: the others.
    """
    names = ["recipe", "phase", "attention", "device", "rounds", "warmup_ms", "warmup_steps", "data"]
    shared = {name: getattr(arguments, name) for name in names}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in shared.items() if value is not None]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(common.ROOT), *sys.path[1:]])}
    failed = []
    for name, own in pairs.items():
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.bench_step", *own, *options, *["--tiny"] * arguments.tiny]
        try:
            code = subprocess.run(command, env=environ, timeout=arguments.limit_s).returncode
            said = f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            said = f"stopped after {arguments.limit_s} s"
        failed += [f"FAILED {name}: {said}"] if said else []
    print("", *failed, sep="\n", flush=True)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = common.parser("bench_step", __doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument(
        "--ways",
        default="published,torch,golf",
        help="of published, torch, golf (all kernels), golf-OPERATOR (all but that one), and op=backend (torch with one kernel, such "
        "as muon_step=triton); comma-separated",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="OPERATOR",
        help="measure torch beside itself with this operator's kernel alone, or with each of them: all",
    )
    parser.add_argument(
        "--each-kernel", action="append_const", const="all", dest="kernel", help="the same as --kernel all"
    )
    parser.add_argument(
        "--phase", default="both", choices=("before", "after", "both"), help="recurrence off, on, or both"
    )
    parser.add_argument(
        "--warmup-steps", type=common.positive, default=10, help="steps before timing, whose results are compared"
    )
    parser.add_argument(
        "--inductor",
        action="append",
        default=[],
        metavar="SWITCH",
        help="measure each way but published beside itself with a switch of train.model.compile, one NAME=VALUE, or all of them",
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="measure each way but published beside itself with this value of a setting, such as optimizer_graph=on",
    )
    add_attention(parser)
    parser.add_argument(
        "--limit-s",
        type=common.positive,
        default=600,
        help="seconds for each kernel or switch where there are several, which have a process each; default 600",
    )
    parser.add_argument("--data", type=Path, help="folder of shards; default: made tokens")
    parser.add_argument(
        "--profile",
        type=Path,
        help="folder for each way's trace and its time by family of kernels and by part of the model",
    )
    return parser


def _switches(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The switches to measure one by one, and the flag of each; ends the process where one of them cannot be."""
    every = [switch.name for switch in SWITCHES]
    switches = [(name, "--inductor") for given in arguments.inductor for name in (every if given == "all" else [given])]
    switches += [(name, "--setting") for name in arguments.setting]
    named = [(way.partition("+")[2], "--ways") for way in arguments.ways.split(",") if "+" in way]
    for name, flag in [*switches, *named]:
        try:
            is_setting = bool(parse_way_switch(name).settings)
        except ValueError as error:
            unknown = flag == "--setting" and name.partition("=")[0] not in SETTINGS
            wanted = f"{name!r}: expected NAME=VALUE, with NAME one of {', '.join(SETTINGS)}"
            parser.error(f"{flag}: {wanted if unknown else error}")
        if flag != "--ways" and is_setting != (flag == "--setting"):
            parser.error(f"{flag}: {name!r} belongs to {'--setting' if is_setting else '--inductor'}")
    return switches


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    switches, given_ways = _switches(parser, arguments), arguments.ways.split(",")
    device = arguments.device
    config = share_config(arguments.recipe, device, tiny=arguments.tiny, attention=arguments.attention)
    if arguments.phase == "after" and not config.recur_layers:
        parser.error(f"--phase after: {arguments.recipe} repeats no layers: expected before or both")
    try:
        for name in arguments.setting:
            choose_graph(config.replace(**parse_way_switch(name).settings), device)
    except UserError as error:
        print(f"error: --setting: {error}", file=sys.stderr)
        return common.NOTHING_TO_RUN
    names = [] if arguments.kernel and not switches else named_ways(given_ways, device)
    if arguments.kernel and (problem := kernels_problem()):
        print(f"error: --kernel: no kernel of a training step can run here: {problem}", file=sys.stderr)
        return common.NOTHING_TO_RUN
    kernels = [name for given in arguments.kernel for name in (step_kernels() if given == "all" else [given])]
    if unknown := sorted(set(kernels) - set(dispatch.describe())):
        parser.error(
            f"--kernel: no operator {', '.join(unknown)}: expected all, or some of {', '.join(step_kernels())}"
        )
    pairs = {("torch", f"{name}=triton"): ["--kernel", name] for name in kernels}
    for way in names if switches else ():
        pairs |= {(way, f"{way}+{name}"): ["--ways", way, flag, name] for name, flag in switches if way != "published"}
    check_ways(other for _, other in pairs)
    if switches and not pairs:
        parser.error(
            f"{switches[0][1]}: no switch is set for published: expected torch, golf or operator=backend in --ways"
        )
    if pairs and arguments.profile:
        parser.error(
            "--profile: not with --kernel, --inductor or --setting: name the ways, such as --ways torch,torch+pdl"
        )
    if len(pairs) > 1:
        return measure_apart({other: own for (_, other), own in pairs.items()}, arguments)
    if arguments.profile:
        # better found now than after the first way
        arguments.profile.mkdir(parents=True, exist_ok=True)
        if reason := name_compiled_kernels(device.type):
            print(f"the model's parts have no ranges: {reason}")
    clock = common.Clock(device, warmup_ms=arguments.warmup_ms, rounds=arguments.rounds)
    surroundings = common.environment(device)
    try:
        choice = choose_attention(config, device, share_sequences(config))
    except UserError as error:
        parser.error(str(error))
    print(f"attention: {choice.name} ({choice.reason})", flush=True)
    # all ways attend by one back end
    config = config.replace(attention=choice.name)
    bench = Bench(
        config, clock, common.ceilings(clock), surroundings, arguments.warmup_steps, arguments.data, not arguments.tiny
    )
    fine = True
    for recurrence in sorted({False, bool(config.recur_layers)}):
        if arguments.phase not in ("both", phase_name(recurrence).partition("_")[0]):
            continue
        try:
            for way, other in pairs:
                fine &= measure_pair(way, other, bench, recurrence)
            if not pairs:
                fine &= measure_ways(names, bench, recurrence, arguments.profile)
        except UserError as error:
            parser.error(str(error))
    if not bench.keep or device.type != "cuda":
        print("not kept: only a GPU's full shapes are")
    return int(not fine)


if __name__ == "__main__":
    main_guard(main)

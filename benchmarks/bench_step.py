"""ms per training step of one GPU's share of a recipe, three ways in turn in one process.

`published` is the recipe written plainly (`benchmarks.published`), `torch` is this trainer on PyTorch's reference
operators, `golf` is this trainer on every kernel that can run here, and `op=backend` is `torch` with that one switched.
All start from the same weights and read the same made tokens; a variant whose loss leaves the published one's writes no
row. The share is what one of 8 GPUs has: an eighth of the batch, and the matrices that one rank orthogonalizes. What
the ranks would exchange is not in it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.published import PublishedStep
from golf_kernels import dispatch
from golf_kernels.muon import assign
from train.config import MICRO_BATCHES, Config
from train.describe import describe
from train.distributed import Ranks
from train.loop import compiled_loss, training_step
from train.model.attention_choice import choose_attention, use_attention
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers, split_parameters
from train.profiling import breakdown, kernel_times, new_trace, plot_breakdown, write_trace
from train.recipes import load_recipe, recipe_names

# dense bfloat16 TFLOP/s of the datasheets, for a utilization beside the measured one
DATASHEET_TFLOPS = {"H100": 989.4, "H200": 989.4}
# how far a variant's loss may be from the published way's after the warm-up, relative: bfloat16 in another order
MAX_LOSS_ERROR = 0.02
TINY = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 64, "bigram_dim": 16}


@dataclass
class StepVariant:
    """One way to take a step.

    Attributes:
        name: of the way.
        backends: value of GOLF_BACKEND while it runs.
        step: takes token ids `(sequences, length + 1)` and whether layers repeat, and returns the loss.
        times_ms: measured.
    """

    name: str
    backends: str
    step: Callable[[np.ndarray, bool], Tensor]
    times_ms: list[float] = field(default_factory=list)

    def run(self, tokens: np.ndarray, recurrence: bool) -> Tensor:
        with forced_backends(self.backends):
            return self.step(tokens, recurrence)


@contextlib.contextmanager
def forced_backends(text: str) -> Iterator[None]:
    """GOLF_BACKEND set to `text` for the block."""
    before = os.environ.get(dispatch.ENVIRONMENT_VARIABLE)
    os.environ[dispatch.ENVIRONMENT_VARIABLE] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.ENVIRONMENT_VARIABLE]
        else:
            os.environ[dispatch.ENVIRONMENT_VARIABLE] = before


def all_kernels() -> str:
    """GOLF_BACKEND with the fastest kind of kernel of every operator that has one here, and PyTorch for the rest."""
    found = {op: dispatch.available_backends(op) for op in dispatch.describe()}
    return ",".join(["torch", *(f"{op}={backends[0]}" for op, backends in found.items() if backends[0] != "torch")])


class MadeTokens:
    """Random tokens in the place of a loader, so that a step is measured and not a disk."""

    def __init__(self, config: Config, sequences: int, seed: int = 0) -> None:
        self.shape = (sequences, config.train_seq_len + 1)
        self.vocab_size = config.vocab_size
        self.generator = np.random.default_rng(seed)

    def next(self) -> np.ndarray:
        """`(sequences, length + 1)` uint16, Zipf-like as text is."""
        ranks = self.generator.zipf(1.2, self.shape)
        return np.minimum(ranks, self.vocab_size - 1).astype(np.uint16)


class OneBatch:
    """A loader that gives one batch, from pinned memory as the trainer's does."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        batch = torch.from_numpy(tokens.astype(np.int32))
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        self.batch = batch.long()

    def next_batch(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.batch[:, :-1], self.batch[:, 1:])]


def trainer_step(model: GPT, config: Config, share: list[int], device: torch.device) -> Callable[..., Tensor]:
    """The trainer's own step on one rank's share: its loop, its optimizers, its moving average."""
    # one micro-batch is the whole of a rank's part of the step
    ranks = Ranks(world_size=MICRO_BATCHES, device=device)
    optimizers = build_optimizers(model, config, owned=share)
    average = EMA(model, config.ema_decay) if config.ema_decay else None
    loss_of = compiled_loss(model, config, device)

    def step(tokens: np.ndarray, recurrence: bool) -> Tensor:
        loss = training_step(
            optimizers, loss_of, OneBatch(tokens, device), ranks, recurrence, 1.0, config.muon_momentum
        )
        if average:
            average.update()
        return loss

    return step


def make_variants(config: Config, names: list[str], device: torch.device, sequences: int) -> list[StepVariant]:
    """The ways to measure, each with a model of its own that starts from the same weights."""
    torch.manual_seed(config.seed)
    first = GPT(config).to(device)
    choice = choose_attention(config, device, sequences)
    print(f"attention: {choice.name} ({choice.reason})")
    use_attention(first, choice.name)
    matrices = list(split_parameters(first, config)["matrix"].values())
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), MICRO_BATCHES)
    share = [number for number, owner in enumerate(owners) if owner == 0]
    variants = []
    for name in names:
        model = copy.deepcopy(first)
        if name == "published":
            compiled = compiled_loss(model, config, device)
            variants.append(StepVariant(name, "torch", PublishedStep(model, config, share, compiled)))
            continue
        backends = {"torch": "torch", "golf": all_kernels()}.get(name, f"torch,{name}")
        with forced_backends(backends):
            dispatch.validate()
            variants.append(StepVariant(name, backends, trainer_step(model, config, share, device)))
    return variants


def measure_steps(
    variants: list[StepVariant], tokens: MadeTokens, recurrence: bool, clock: common.Clock, warmup_steps: int
) -> dict[str, float]:
    """Warm every variant up on the same tokens, compare their losses, then time them in turns.

    Returns:
        Relative distance of each variant's mean warm-up loss from the first one's.

    Raises:
        CheckFailed: it is too large.
    """
    losses: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(warmup_steps):
        batch = tokens.next()
        for variant in variants:
            losses[variant.name].append(float(variant.run(batch, recurrence)))
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    wanted = means[variants[0].name]
    errors = {name: abs(mean - wanted) / wanted for name, mean in means.items()}
    for name, error in errors.items():
        if not error <= MAX_LOSS_ERROR:
            raise common.CheckFailed(f"{name}: mean loss {means[name]:.4f}, {variants[0].name} has {wanted:.4f}")
    for number in range(clock.rounds):
        batch = tokens.next()
        turn = number % len(variants)
        for variant in variants[turn:] + variants[:turn]:
            variant.times_ms.append(clock.once_ms(lambda variant=variant, batch=batch: variant.run(batch, recurrence)))
    return errors


def profile_variant(
    variant: StepVariant, tokens: MadeTokens, recurrence: bool, device: torch.device, steps: int = 3
) -> tuple[Any, dict[str, float], float]:
    """A trace of some steps, milliseconds per step by family, and the wall milliseconds per step beside them."""
    batches = [tokens.next() for _ in range(steps)]
    trace = new_trace(device)
    with trace:
        started = time.perf_counter()
        for batch in batches:
            variant.run(batch, recurrence)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall_ms = 1e3 * (time.perf_counter() - started) / steps
    return trace, breakdown(kernel_times(trace), steps), wall_ms


def peak_mib(variant: StepVariant, tokens: MadeTokens, recurrence: bool, device: torch.device) -> float:
    """Largest memory allocated in a step above what is allocated between steps, all variants' weights among it."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    between = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.run(tokens.next(), recurrence)
    return (torch.cuda.max_memory_allocated(device) - between) / 2**20


def main() -> int:
    parser = common.parser("bench_step", __doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument(
        "--ways",
        default="published,torch,golf",
        help="of published, torch, golf, and op=backend (torch with one kernel, such as muon_step=triton); comma-separated",
    )
    parser.add_argument("--warmup-steps", type=int, default=10, help="steps before timing, whose losses are compared")
    parser.add_argument(
        "--inductor", action="append", default=[], metavar="NAME=VALUE", help="set torch._inductor.config.NAME"
    )
    parser.add_argument("--profile", type=Path, help="folder for a trace and a picture of each way")
    arguments = parser.parse_args()
    device = arguments.device
    for item in arguments.inductor:
        name, _, value = item.partition("=")
        set_inductor(name, value)
    changes: dict[str, Any] = {"compile": "on" if device.type == "cuda" else "off"}
    if arguments.tiny:
        changes |= TINY | {"train_batch_tokens": MICRO_BATCHES * 2 * TINY["train_seq_len"], "compute_dtype": "float32"}
    config = load_recipe(arguments.recipe).config(**changes)
    sequences = config.train_batch_tokens // (MICRO_BATCHES * config.train_seq_len)
    share_tokens = sequences * config.train_seq_len
    clock = common.Clock(device, warmup_ms=arguments.warmup_ms, rounds=arguments.rounds)
    limits = common.ceilings(clock)
    surroundings = common.environment(device)
    datasheet = next((tflops for gpu, tflops in DATASHEET_TFLOPS.items() if gpu in surroundings["gpu"]), None)
    flops = describe(config, {})["mflop_per_token"]
    rows = []
    for recurrence in sorted({False, bool(config.recur_layers)}):
        tokens = MadeTokens(config, sequences)
        variants = make_variants(config, arguments.ways.split(","), device, sequences)
        errors = measure_steps(variants, tokens, recurrence, clock, arguments.warmup_steps)
        phase = "after" if recurrence else "before"
        step_flops = 1e6 * flops[f"{phase}_recurrence"] * share_tokens
        print(
            f"\n{config.recipe}, {share_tokens:,} tokens, {phase} recurrence, on {surroundings['gpu']}, matrix rate of this run "
            f"{limits.tflops:.0f} TFLOP/s"
        )
        print(
            f"{'':<24}{'p20':>9}{'p50':>9}{'p80':>9}  {'tokens/s':>10}  {'util.':>6}  {'of datasheet':>12}  {'kernels ms':>10}  {'peak MiB':>9}"
        )
        for variant in variants:
            p20, p50, p80 = common.quantiles(variant.times_ms)
            tflops = step_flops / p50 / 1e9
            trace, families, wall_ms = profile_variant(variant, tokens, recurrence, device)
            of_sheet = f"{tflops / datasheet:>12.1%}" if datasheet else f"{'':>12}"
            print(
                f"{variant.name:<24}{p20:>9.2f}{p50:>9.2f}{p80:>9.2f}  {1e3 * share_tokens / p50:>10,.0f}  {tflops / limits.tflops:>6.1%}  "
                f"{of_sheet}  {sum(families.values()):>10.2f}  {peak_mib(variant, tokens, recurrence, device):>9.0f}"
            )
            print("    " + ", ".join(f"{family} {ms:.2f}" for family, ms in families.items()))
            rows.append(
                {"op": f"step {config.recipe}", "impl": variant.name, "mode": f"{phase} recurrence"}
                | {"shape": f"{sequences}x{config.train_seq_len}", "dtype": "bf16" if device.type == "cuda" else "f32"}
                | {"p50": p50, "p20": p20, "p80": p80, "tflops": tflops, "gbps": "", "floor": step_flops / limits.tflops / 1e9}
                | {"rel_err": errors[variant.name], "n": clock.rounds}
            )  # fmt: skip
            if arguments.profile:
                arguments.profile.mkdir(parents=True, exist_ok=True)
                stem = f"{config.recipe}_{phase}_{variant.name.replace('=', '_')}"
                write_trace(arguments.profile / f"{stem}.json.gz", trace)
                title = (
                    f"{config.recipe}, {variant.name}, {surroundings['gpu']} (wall {wall_ms:.1f} ms under the profiler)"
                )
                plot_breakdown(arguments.profile / f"{stem}.png", families, title)
        del variants
    path = None if arguments.tiny else common.append_rows(rows, surroundings)
    print(f"-> {path.relative_to(common.ROOT)}" if path else "not kept: only a GPU's full shapes are")
    return 0


def set_inductor(name: str, value: str) -> None:
    """Set one of Inductor's switches, such as `triton.mix_order_reduction=False`.

    Raises:
        SystemExit: there is no such switch.
    """
    import torch._inductor.config as inductor

    try:
        before = getattr(inductor, name)
    except AttributeError:
        sys.exit(f"--inductor: torch {torch.__version__} has no switch {name!r}")
    setattr(inductor, name, value == "True" if isinstance(before, bool) else type(before)(value))


if __name__ == "__main__":
    sys.exit(main())

"""Milliseconds on a CPU: the trainer's step beside a plain one, and Muon beside torch.optim.Muon and heavyball.

`plain` runs a step's micro-batches one by one, calls the `golf::` operators and multiplies in float32. `trainer` is the
step of `python -m train` in one process. Both start from the same weights and read the same tokens. For both, the
memory allocator keeps freed memory, as in the trainer; for the Muons it does not. The Muons step on the 18 matrices of
three layers.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_newton_schulz import model_shapes
from benchmarks.measure import common
from benchmarks.measure.argument_types import parse_positive
from benchmarks.measure.step_times import Bench, measure_steps, phase_name
from benchmarks.measure.step_variants import StepVariant, step_config, weights_of
from golf_kernels import Muon
from train.common.distributed import MICRO_BATCHES
from train.common.errors import main_guard
from train.common.hardware import keep_freed_memory
from train.config import Config
from train.data.loaders import Batch, unpack
from train.loop import training_step
from train.model.compile import compiled_loss
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers
from train.recipes import recipe_names

CPU = torch.device("cpu")
# least cosine between the first update of a Muon and that of torch.optim.Muon; other coefficients gave 0.98
LEAST_COSINE = 0.9


class MicroBatches:
    """A loader for one step, which splits the step's tokens into micro-batches of `sequences` sequences."""

    def __init__(self, tokens: np.ndarray, sequences: int) -> None:
        self.rows = torch.from_numpy(tokens.view(np.int16)).split(sequences)

    def next_batch(self) -> list[Batch]:
        return [unpack(rows, CPU) for rows in self.rows]


def step_variant(name: str, config: Config, sequences: int) -> StepVariant:
    """Returns the variant `plain` or `trainer`, with micro-batches of `sequences` sequences."""
    torch.manual_seed(config.seed)
    model = GPT(config)
    optimizers = build_optimizers(model, config)
    average = EMA(model, config.ema_decay) if config.ema_decay else None
    if name == "plain":
        model.compute_dtype = torch.float32
        for group in optimizers.muon.param_groups if optimizers.muon else ():
            group["compute_dtype"] = torch.float32
    loss_of = model if name == "plain" else compiled_loss(model, config, CPU)

    def step(tokens: np.ndarray, recurrence: bool) -> Tensor:
        loader = MicroBatches(tokens, sequences)
        if name == "plain":
            losses = []
            for inputs, targets in (batches := loader.next_batch()):
                losses.append(loss_of(inputs, targets, recurrence=recurrence))
                (losses[-1] / len(batches)).backward()
            optimizers.step(1.0, config.muon_momentum)
            optimizers.zero_grad()
            loss = torch.stack(losses).mean().detach()
        else:
            loss = training_step(optimizers, loss_of, loader, recurrence, 1.0, config.muon_momentum)
        if average:
            average.update()
        return loss

    return StepVariant(name, "torch", step, weights_of(model, config, average.average() if average else {}))


def measure_step(bench: Bench, sequences: int, recurrence: bool) -> bool:
    """Print the times of both variants and their ratio. Returns whether both ran and agree."""
    variants = [step_variant(name, bench.config, sequences) for name in ("plain", "trainer")]
    _, problems = measure_steps(variants, bench, recurrence)
    title = f"{bench.config.recipe}, {bench.rank_tokens:,} tokens, {phase_name(recurrence).replace('_', ' ')}"
    medians = [statistics.median(variant.times_ms or [math.nan]) for variant in variants]
    for variant, median in zip(variants, medians, strict=True):
        print(f"{title}, {variant.name}: {median:.1f} ms, {1e3 * bench.rank_tokens / median:,.0f} tokens/s")
    print(f"{title}: trainer is {ratio(variants[0].times_ms, variants[1].times_ms):.2f} times as fast as plain")
    print("".join(f"FAILED {problem}\n" for problem in problems), end="", flush=True)
    return not problems


def ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """Returns the median of before / after over all pairs of times. Other work on the machine changes it little."""
    return statistics.median(b / a for b, a in zip(before, after, strict=True)) if before and after else math.nan


def muons() -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Returns name → function that builds an optimizer with its own defaults, for each installed optimizer."""
    found: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "torch.optim.Muon": lambda weights: torch.optim.Muon(weights, lr=0.02, weight_decay=0.0),
        "golf_kernels.Muon": lambda weights: Muon(weights, lr=0.02, weight_decay=0.0),
    }
    try:
        import heavyball
    except ImportError as error:
        print(f"heavyball.Muon is left out: {error}", file=sys.stderr)
        return found
    return found | {"heavyball.Muon": lambda weights: heavyball.Muon(weights, lr=0.02, weight_decay=0.0)}


def step_ms(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], clock: common.Clock) -> float:
    # some optimizers drop the gradients in a step
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient.clone()
    return clock.once_ms(optimizer.step)


def measure_muon(clock: common.Clock, shapes: Sequence[tuple[int, int]]) -> bool:
    """Print each optimizer's time and its ratio to torch.optim.Muon's. Returns whether all updates point the same way."""
    times: dict[str, list[float]] = {}
    updates: dict[str, Tensor] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, build in muons().items():
        generator = torch.Generator().manual_seed(0)
        weights, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
        parameters: list[Tensor] = [torch.nn.Parameter(weight.clone()) for weight in weights]
        try:
            optimizer = build(parameters)
            times[name] = [step_ms(optimizer, gradients, clock)]
        # some optimizers compile their step, which fails without a suitable compiler
        except Exception as error:
            print(f"{name} is left out: {str(error).strip().partition(chr(10))[0]}")
            continue
        optimizers[name] = optimizer
        updates[name] = torch.cat([(p.detach() - w).flatten() for p, w in zip(parameters, weights, strict=True)])
    for number in range(clock.rounds + 1):
        turn = number % len(optimizers)
        for name in [*optimizers][turn:] + [*optimizers][:turn]:
            times[name].append(step_ms(optimizers[name], gradients, clock))
    # drop the first two steps, which allocate memory
    times = {name: found[2:] for name, found in times.items()}
    first, *_ = optimizers
    fine = True
    for name in optimizers:
        cosine = float(torch.cosine_similarity(updates[name], updates[first], dim=0))
        fine &= cosine > LEAST_COSINE
        print(
            f"{name}, {len(shapes)} matrices: {statistics.median(times[name]):.1f} ms, {ratio(times[first], times[name]):.2f} times "
            f"as fast as {first}{'' if cosine > LEAST_COSINE else f', FAILED: cosine of the updates {cosine:.2f}'}"
        )
    return fine


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("bench_cpu", __doc__.splitlines()[0] if __doc__ else "", rounds=7)
    parser.add_argument("--recipe", default="quickstart", choices=recipe_names())
    parser.add_argument("--seq-len", type=parse_positive, help="tokens per sequence; default: the recipe's")
    parser.add_argument("--tokens", type=parse_positive, help="tokens per step; default: the recipe's")
    arguments = parser.parse_args(argv)
    if arguments.device.type != "cpu":
        parser.error(f"--device: expected cpu, found {arguments.device}")
    config = step_config(arguments.recipe, CPU, tiny=arguments.tiny)
    length = arguments.seq_len or config.train_seq_len
    tokens = arguments.tokens or config.train_batch_tokens
    if tokens % length:
        parser.error(f"--tokens: expected a multiple of {length}, found {tokens}")
    # the benchmarks give one process an eighth of the batch, as on 8 ranks
    config = config.replace(train_seq_len=length, train_batch_tokens=MICRO_BATCHES * tokens)
    clock = common.Clock(CPU, warmup_ms=arguments.warmup_ms, rounds=arguments.rounds)
    fine = measure_muon(clock, model_shapes(3, 16, 2) if arguments.tiny else model_shapes(3))
    keep_freed_memory()
    bench = Bench(config, clock, common.Ceilings(1.0, 1.0), common.environment(CPU), 2, None, False)
    sequences = max(tokens // length // MICRO_BATCHES, 1)
    for recurrence in sorted({False, bool(config.recur_layers)}):
        fine &= measure_step(bench, sequences, recurrence)
    return int(not fine)


if __name__ == "__main__":
    main_guard(main)

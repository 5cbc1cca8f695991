"""Quantization at a recipe's full shapes: calibration, GPTQ of all matrices, and generation of calibration texts.

Weights and tokens are random. Goals on one H100: calibration on 64 batches in 4 s, GPTQ of 67 matrices in 2 s. Goal on
eight H100: 128 texts of 2,048 tokens, 16 on each GPU, in well under a minute. Floors count arithmetic and memory
traffic, but generation is limited by its many kernel launches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import common
from benchmarks.measure.argument_types import parse_positive
from benchmarks.measure.models import NARROW, random_model, window_flops
from train.common.errors import main_guard
from train.config import Config
from train.model.attention_choice import choose_attention, use_attention
from train.model.decoder import sample
from train.model.gpt import GPT
from train.model.order import make_plan
from train.quantize.calibrate import collect_hessians
from train.quantize.generate import TEMPERATURE, generate_tokens
from train.quantize.gptq import gptq
from train.quantize.quantize_model import quantize_model
from train.quantize.rank_work import gptq_cost
from train.quantize.row_scales import ROW_SCALES
from train.quantize.tensors import clip_settings, matrices_to_calibrate, stored_bits
from train.recipes import load_recipe

RECIPE = "sp8192_sdclip"
STAGES = ("calibrate", "gptq", "generate")
# texts of one rank: #1392 generated 128 texts on eight ranks
TEXTS = 16
# number of batches checked in float64; checking all would take too long
CHECKED_BATCHES = 2
# sequences per forward pass in float64, in which attention stores all scores
EXACT_SEQUENCES = 4
# the least `agreement` that the check accepts
LEAST_AGREEMENT = 0.9
TINY = NARROW | {"train_seq_len": 64, "train_batch_tokens": 1024, "eval_seq_len": 64, "passthrough_max_elements": 512}


def make_batches(config: Config, count: int, device: torch.device) -> list[Tensor]:
    """Returns `count` micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (max(config.train_batch_tokens // 8 // config.train_seq_len, 1), config.train_seq_len)
    return [torch.randint(config.vocab_size, shape, generator=generator).to(device) for _ in range(count)]


def calibration_flops(config: Config) -> float:
    """Returns FLOPs of calibration per token: the forward pass of all layers, and second moments of matrices' inputs.

    Second moments are symmetric, so only half of each counts. A layer has four inputs, because queries, keys and values
    share one. The tied embedding adds one input to the total.
    """
    dim, runs = config.model_dim, len(make_plan(config, recurrence=bool(config.recur_layers)))
    moments = runs * (3 * dim**2 + config.mlp_hidden**2) + dim**2
    return window_flops(config, config.window) / config.window - 2 * config.vocab_size * dim + moments


def measure_calibration(
    model: GPT, config: Config, names: Sequence[str], count: int, clock: common.Clock, limits: common.Ceilings
) -> list[common.Row]:
    """Check the Hessians of a few batches against float64, then time calibration on `count` batches."""
    recurrence = bool(config.recur_layers)
    batches = make_batches(config, count, model.head_weight.device)
    exact = copy.deepcopy(model).double()
    exact.compute_dtype = torch.float64
    use_attention(exact, "math")
    few = batches[:CHECKED_BATCHES]
    parts = [part for ids in few for part in ids.split(EXACT_SEQUENCES)]
    truth = collect_hessians(exact, parts, names, recurrence=recurrence)
    found = collect_hessians(model, few, names, recurrence=recurrence)
    # a Hessian is the mean over batches, and the same tokens are more batches in `parts` than in `few`
    whole = len(parts) / len(few)
    error = common.relative_error([found[name] for name in names], [truth[name] * whole for name in names])
    # bfloat16 errors add up over the layers
    largest = 0.1 if model.compute_dtype == torch.bfloat16 else 1e-4
    if not error <= largest:
        raise common.CheckFailed(f"calibrate: relative error {error:.2e}, at most {largest:.0e}")
    del exact, truth
    tokens = batches[0].numel()
    weights = 4.0 * sum(weight.numel() for weight in model.parameters())
    shape = f"{len(names)} matrices {count} batches of {tokens} tokens"

    def work() -> object:
        return collect_hessians(model, batches, names, recurrence=recurrence)

    flops, traffic = count * tokens * calibration_flops(config), count * weights
    return [measured("calibrate", shape, model, work, flops, traffic, error, clock, limits)]


def make_hessians(model: GPT, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Returns a Hessian for each name: the second moments of random inputs.

    The columns of the inputs differ in scale by up to 20 times.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters, made = dict(model.named_parameters()), {}
    for name in names:
        columns = parameters[name].shape[1]
        inputs = torch.randn(2 * columns, columns, generator=generator) * torch.linspace(0, -3, columns).exp()
        inputs = inputs.to(parameters[name].device)
        made[name] = inputs.mT @ inputs / len(inputs)
    return made


def gptq_case(model: GPT, config: Config, names: Sequence[str]) -> common.Case:
    """Returns the case of GPTQ on all matrices and embedding tables, from weights to codes and scales on the host."""
    parameters = dict(model.named_parameters())

    def truth(hessians: dict[str, Tensor]) -> list[Tensor]:
        weights = []
        for name in names:
            weight = parameters[name].detach().float()
            bits, clip = stored_bits(name, weight, config), clip_settings(name, config)
            scales = ROW_SCALES[clip.name](weight, bits, sigmas=clip.sigmas, floor=clip.floor)
            codes, _ = gptq(weight.double(), hessians[name].double(), scales.double(), bits, damp=config.gptq_damp)
            weights.append((codes * scales.double()[:, None]).cpu())
        return weights

    shapes = [parameters[name].shape for name in names]
    return common.Case(
        "gptq",
        f"{len(names)} matrices",
        "float32",
        lambda seed: make_hessians(model, names, seed),
        truth,
        flops=sum(gptq_cost(*shape) for shape in shapes),
        bytes=sum(4.0 * columns**2 + 5.0 * rows * columns for rows, columns in shapes),
        # float32 may round a weight the other way; its code is then off by one, which changes the rest of its row
        max_rel_err=0.1,
    )


def agreement(model: GPT, config: Config, texts: Tensor) -> float:
    """Returns the fraction of generated tokens that stay the same if drawn again from the logits of the finished texts.

    Both draws use the same random numbers. Only the first draw uses the key-value cache, so a low fraction shows an
    error of the cache.
    """
    rows, length = texts.shape
    draws = np.array([np.random.default_rng([config.seed, number]).random(length) for number in range(rows)])
    given = torch.from_numpy(draws).to(texts.device)
    same = 0
    with torch.no_grad():
        for row in range(rows):
            logits = model.logits(texts[row : row + 1], recurrence=bool(config.recur_layers))[0, :-1]
            drawn = sample(logits, given[row, 1:], TEMPERATURE)
            same += int((drawn == texts[row, 1:]).sum())
    return same / (rows * (length - 1))


def measure_generation(
    model: GPT, config: Config, rows: int, clock: common.Clock, limits: common.Ceilings
) -> list[common.Row]:
    """Check the `agreement` of one rank's generated texts, then time their generation."""
    length, recurrence = config.train_seq_len, bool(config.recur_layers)

    def write() -> Tensor:
        return generate_tokens(
            model, range(rows), length, temperature=TEMPERATURE, seed=config.seed, recurrence=recurrence
        )

    agreed = agreement(model, config, write())
    if agreed < LEAST_AGREEMENT:
        raise common.CheckFailed(f"generate: {agreed:.1%} of the tokens agree, expected {LEAST_AGREEMENT:.0%} at least")
    # each step reads all weights and, on average, half of the final keys and values
    runs = len(make_plan(config, recurrence=recurrence))
    weights = 2.0 * sum(weight.numel() for weight in model.parameters())
    traffic = length * (weights + rows * runs * 2 * config.kv_dim * length / 2 * model.compute_dtype.itemsize)
    flops, shape = rows * window_flops(config, config.window), f"{rows} texts of {length} tokens"
    return [measured("generate", shape, model, write, flops, traffic, 1 - agreed, clock, limits)]


def measured(
    op: str,
    shape: str,
    model: GPT,
    work: Callable[[], Any],
    flops: float,
    traffic: float,
    error: float,
    clock: common.Clock,
    limits: common.Ceilings,
) -> common.Row:
    """Run a stage once as warm-up, then time it. Returns the stage's row."""
    work()
    p20, p50, p80 = common.quantiles([clock.once_ms(work) for _ in range(clock.rounds)])
    row: common.Row = {"op": op, "impl": "golf", "mode": "eager", "shape": shape}
    row |= {"dtype": str(model.compute_dtype).removeprefix("torch."), "p50": p50, "p20": p20, "p80": p80}
    row |= {"tflops": flops / p50 / 1e9, "gbps": traffic / p50 / 1e6, "floor": limits.floor_ms(flops, traffic)}
    return row | {"rel_err": error, "n": clock.rounds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser("bench_quantize", __doc__.splitlines()[0], rounds=3, warmup_ms=0.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--batches", type=parse_positive, help="calibration batches; default 64, or 2 with --tiny")
    parser.add_argument(
        "--texts",
        type=parse_positive,
        help=f"texts to generate; default {TEXTS} (one of eight ranks), or 2 with --tiny",
    )
    options = parser.parse_args(arguments)
    changes: dict[str, Any] = TINY if options.tiny else {}
    settings = load_recipe(RECIPE).settings | {"recipe": RECIPE, "device": options.device.type, "gptq_tied_embed": True}
    config = Config(**(settings | changes))
    clock = common.Clock(options.device, options.warmup_ms, options.rounds)
    limits = common.ceilings(common.Clock(options.device, 300.0, options.rounds))
    model = random_model(config, options.device)
    attention = choose_attention(config, options.device, TEXTS)
    use_attention(model, attention.name)
    print(f"attention: {attention.name} ({attention.reason})")
    names = matrices_to_calibrate(model, config)
    count, texts = options.batches or (2 if options.tiny else 64), options.texts or (2 if options.tiny else TEXTS)

    def codes(given: dict[str, Tensor]) -> list[Tensor]:
        stored = quantize_model(model, config, given)
        return [stored[name].dequantize() for name in names]

    for stage in options.stages:
        if stage == "calibrate":
            rows = measure_calibration(model, config, names, count, clock, limits)
        elif stage == "gptq":
            rows = common.measure(
                gptq_case(model, config, names), [common.Variant("golf", codes, graph=False)], clock, limits
            )
        else:
            rows = measure_generation(model, config, texts, clock, limits)
        common.report(rows, common.environment(options.device), keep=not options.tiny)
    return 0


if __name__ == "__main__":
    main_guard(main)

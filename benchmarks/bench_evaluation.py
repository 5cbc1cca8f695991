"""Sliding-window evaluation with random text and weights: the published scripts compared with this project.

* `published`: all logits of every window, in batches of 32 windows, compiled on a GPU.
* `plain loop` (CPU only): as `published`, but one window at a time.
* `golf`: this project's evaluation, `train.evaluate.scoring.evaluate_model`.
* `golf, layer 0 per window`: `golf`, but overlapping windows do not share layer 0's projections.
* `golf, N processes` (CPU only): `golf` with one process per core, as in `make run`.

Goals: on a GPU twice the tokens per second of `published` and 45 % of the measured matrix rate; on a CPU three times
the tokens per second of `plain loop`.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

# must be imported before a process group exists, see train.common.distributed
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import common
from benchmarks.measure.models import NARROW, random_model, window_flops
from train.common.errors import main_guard
from train.config import Config
from train.data.tokenizer import ByteTables
from train.evaluate.scoring import evaluate_model
from train.evaluate.windows import plan_windows
from train.model.attention_choice import choose_attention, use_attention
from train.model.compile import without_kernel, write_out
from train.model.gpt import GPT
from train.recipes import load_recipe

RECIPES = ("sp4096_recurrence", "sp8192_sdclip")
# number of tokens to predict in each published validation text; number of windows per batch in the published scripts
VALIDATION_TARGETS = {"sp4096_recurrence": 45_508_608, "sp8192_sdclip": 40_540_160}
PUBLISHED_BATCH = 32
PLAIN = "plain loop"


class Text(NamedTuple):
    """Random tokens and the bytes that they encode."""

    tokens: np.ndarray
    tables: ByteTables
    target_bytes: np.ndarray


def text_flops(model: GPT, config: Config, targets: int) -> float:
    """Returns the FLOPs of scoring a text. Projections of layer 0 that windows share count once per token."""
    plan = plan_windows(targets, config.window, config.eval_stride, config.eval_rule)
    flops = len(plan.start) * window_flops(config, config.eval_stride)
    if model.overlap_problem is not None:
        return flops
    again = int(plan.length.sum() - plan.start[-1] - plan.length[-1])
    dim, kv_dim = config.model_dim, config.kv_dim
    return flops - 2 * again * (dim * (dim + 2 * kv_dim) + config.ve_dim * kv_dim)


def make_text(vocab_size: int, count: int, seed: int) -> Text:
    """Returns random tokens, Zipf-distributed as in real text. `count` of the tokens are to be predicted."""
    random = np.random.default_rng(seed)
    tokens = np.minimum(random.zipf(1.2, count + 1), vocab_size - 1).astype(np.uint16)
    boundary = np.arange(vocab_size) < 3
    base = np.where(boundary, 0, random.integers(1, 9, vocab_size)).astype(np.int16)
    tables = ByteTables(base, (random.random(vocab_size) < 0.4) & ~boundary, boundary)
    return Text(tokens, tables, tables.count(tokens))


def published_run(
    model: GPT, config: Config, compiled: bool, batch_windows: int = PUBLISHED_BATCH
) -> Callable[[Text], list[Tensor]]:
    """Returns a function that scores a text as the published scripts do, and returns the sums of nats and bytes."""
    forward = model.logits
    if compiled:
        write_out(model, without_kernel(model.head_weight.device))
        forward = torch.compile(forward, dynamic=False, fullgraph=True)
    length, stride, device = config.window, config.eval_stride, model.head_weight.device

    @torch.inference_mode()
    def run(text: Text) -> list[Tensor]:
        tokens = torch.from_numpy(text.tokens.astype(np.int64))
        base, space, boundary = (torch.from_numpy(array).to(device) for array in vars(text.tables).values())
        nats, size = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        total = len(tokens) - 1
        starts = [start for start in range(0, total, stride) if start == 0 or start + length - stride < total]
        for low in range(0, len(starts), batch_windows):
            batch = starts[low : low + batch_windows]
            inputs, targets = (torch.zeros(len(batch), length, dtype=torch.int64, device=device) for _ in range(2))
            counts = []
            for row, start in enumerate(batch):
                end = min(start + length, total)
                chunk = tokens[start : end + 1].to(device)
                inputs[row, : end - start], targets[row, : end - start] = chunk[:-1], chunk[1:]
                counts.append(end - start)
            logits = forward(inputs, recurrence=bool(config.recur_layers))
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(inputs.shape)
            for row, (start, count) in enumerate(zip(batch, counts, strict=True)):
                first = 0 if start == 0 else length - stride
                nats += nll[row, first:count].double().sum()
                target, previous = targets[row, first:count], inputs[row, first:count]
                size += (base[target].double() + (space[target] & ~boundary[previous]).double()).sum()
        return [nats, size]

    return run


def golf_run(
    model: GPT, config: Config, share_layer0: bool, rank: int = 0, world_size: int = 1
) -> Callable[[Text], list[Tensor]]:
    """Returns a function that scores a text as this project does. That function returns the sums of nats and bytes."""

    def run(text: Text) -> list[Tensor]:
        found = evaluate_model(
            model, text.tokens, text.target_bytes, config, share_layer0=share_layer0, rank=rank, world_size=world_size
        )
        return [torch.tensor(found.val_loss * found.tokens), torch.tensor(float(found.bytes))]

    return run


class Processes:
    """`golf_run` on several processes with one thread each."""

    def __init__(self, config: Config, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        spawn, store = multiprocessing.get_context("spawn"), Path(self._folder.name, "store").as_uri()
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(config, rank, count, store, theirs), daemon=True)
            process.start()
            # this process closes its copy of the other end, so that reading fails if the other process dies
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, text: Text) -> list[Tensor]:
        for end in self._ends:
            end.send(text)
        found: list[list[Tensor]] = [end.recv() for end in self._ends]
        return found[0]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(config: Config, rank: int, world_size: int, store: str, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    # every process uses the same seed, hence the same model
    run = golf_run(random_model(config, torch.device("cpu")), config, True, rank, world_size)
    while True:
        try:
            text = end.recv()
        except EOFError:
            break
        end.send(run(text))
    dist.destroy_process_group()


def make_case(model: GPT, config: Config, targets: int) -> common.Case:
    exact = copy.deepcopy(model).double()
    exact.compute_dtype = torch.float64
    # the bfloat16 attention backend may not support float64
    use_attention(exact, "sdpa")
    windows = len(plan_windows(targets, config.window, config.eval_stride).start)
    fraction = config.eval_stride / config.window
    # each batch reads every weight at least once
    weights = sum(weight.numel() for weight in model.parameters()) * 2
    return common.Case(
        "evaluation",
        f"{config.recipe} {targets} targets window {config.window} stride {config.eval_stride}",
        str(model.compute_dtype).removeprefix("torch."),
        lambda seed: make_text(config.vocab_size, targets, seed),
        published_run(exact, config, compiled=False),
        flops=text_flops(model, config, targets),
        bytes=weights * max(windows * fraction, 1),
        # bfloat16 changes the mean over thousands of tokens by about 1e-4
        max_rel_err=2e-3 if model.compute_dtype == torch.bfloat16 else 1e-6,
    )


def describe_rows(
    rows: Sequence[common.Row], targets: int, limits: common.Ceilings, whole: int, *, on_gpu: bool
) -> list[str]:
    """Returns a line per row: tokens per second, speed-up over the first row, and fraction of the measured matrix rate.

    If `whole` is not 0, the line also has the seconds that 8 devices would take for `whole` tokens.
    """
    lines = []
    for row in rows:
        rate = targets / row["p50"] * 1e3
        lines.append(
            f"{row['impl']}: {rate:,.0f} tokens/s, {rows[0]['p50'] / row['p50']:.2f} x {rows[0]['impl']}, "
            f"{row['tflops'] / limits.tflops:.0%} of the matrix rate"
        )
        plain = next((other["p50"] for other in rows if other["impl"] == PLAIN), None)
        if row["impl"].startswith("golf") and plain:
            lines[-1] += f", {plain / row['p50']:.2f} x {PLAIN} (goal: 3 x)"
        elif row["impl"] == "golf" and on_gpu:
            lines[-1] += " (goals: 2 x, 45 %)"
        if whole:
            lines[-1] += f"; computed: {whole / rate / 8:,.1f} s for the validation text on 8 such devices"
    return lines


def run_recipe(name: str, options: Any, clock: common.Clock, limits: common.Ceilings) -> None:
    on_gpu = options.device.type == "cuda"
    changes: dict[str, Any] = NARROW if options.tiny else {}
    settings = {"eval_seq_len": 2048, "eval_stride": 64, "eval_rule": "once"}
    settings |= {"recipe": name, "device": options.device.type, "logits_rounding": "none"}
    config = Config(**(load_recipe(name).settings | settings | changes))
    model = random_model(config, options.device)
    attention = choose_attention(config, options.device, PUBLISHED_BATCH)
    use_attention(model, attention.name)
    print(f"attention: {attention.name} ({attention.reason})")
    targets = options.tokens or (2048 if options.tiny else 409_600)
    variants = [
        common.Variant("published", published_run(model, config, compiled=on_gpu), graph=False),
        common.Variant("golf", golf_run(model, config, share_layer0=True), graph=False),
    ]
    if model.overlap_problem is None:
        variants.append(
            common.Variant("golf, layer 0 per window", golf_run(model, config, share_layer0=False), graph=False)
        )
    processes = None
    if not on_gpu:
        variants.append(common.Variant(PLAIN, published_run(model, config, compiled=False, batch_windows=1)))
        cores = len(os.sched_getaffinity(0))
        if cores > 1:
            processes = Processes(config, cores)
            variants.append(common.Variant(f"golf, {cores} processes", processes))
    try:
        rows = common.measure(make_case(model, config, targets), variants, clock, limits)
    finally:
        if processes is not None:
            processes.close()
    whole = 0 if options.tiny else VALIDATION_TARGETS[name]
    common.report(rows, common.environment(options.device), keep=not options.tiny)
    print("\n".join(describe_rows(rows, targets, limits, whole, on_gpu=on_gpu)) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(
        "bench_evaluation", "Sliding-window evaluation compared with the published scripts.", rounds=5
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="default: both, or the first with --tiny")
    parser.add_argument("--tokens", type=int, help="targets of the text; default 409,600, or 2,048 with --tiny")
    options = parser.parse_args(arguments)
    clock = common.Clock(options.device, options.warmup_ms, options.rounds)
    limits = common.ceilings(clock)
    for name in options.recipes or RECIPES[: 1 if options.tiny else None]:
        run_recipe(name, options, clock, limits)
    return 0


if __name__ == "__main__":
    main_guard(main)

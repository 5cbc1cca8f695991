"""Every launch of a Triton kernel that ships, on tensors without data: the recipes', and those that no recipe makes.

Tensors lie on PyTorch's device `meta`, where shapes, strides and the alignment of addresses hold and nothing is computed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure.tokens import rank_sequences
from golf_kernels import dispatch
from golf_kernels.muon import Muon
from golf_kernels.newton_schulz import COEFFICIENTS
from train.config import Config
from train.evaluate.scoring import BATCH_SEQS
from train.model.gpt import GPT
from train.optimize.groups import build_optimizers
from train.recipes import load_recipe, recipe_names

SEQUENCES, LENGTH = 48, 2048
# heads of queries and of keys, their dimension, and half of what turns: up to the ends of what the kernels take
HEADS = (
    (8, 8, 64, 0),
    (8, 4, 64, 8),
    (6, 3, 80, 20),
    (8, 2, 128, 64),
    (16, 1, 256, 32),
    (32, 8, 256, 128),
    (64, 8, 128, 64),
)
# width and hidden size: one that wide tiles divide and one that they do not, both with the most sums of a row
MLPS = ((512, 4096), (640, 1984))


class OnKernels(TorchDispatchMode):
    """Operators run on their Triton kernels, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = {f"golf::{op}": op for op, backends in dispatch.describe().items() if "triton" in backends}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in self.operators:
            return dispatch.run_on("triton", self.operators[func.name()], *args)
        return func(*args, **(kwargs or {}))


def launch_everything() -> None:
    """Makes every launch that ships."""
    with torch.device("meta"):
        for name in recipe_names():
            launch_recipe(load_recipe(name).config(device="cuda"))
        with torch.no_grad():
            launch_branches()


def launch_recipe(config: Config) -> None:
    """One GPU's share of a training step and its batches of an evaluation, with and without recurrence."""
    model = GPT(config)
    ids = torch.empty(rank_sequences(config), config.train_seq_len, dtype=torch.int64)
    count, stride = BATCH_SEQS, config.eval_stride
    late = config.window - (stride or config.window)
    windows = torch.empty(count, config.window, dtype=torch.int64)
    text = torch.empty(config.window + (count - 1) * stride, dtype=torch.int64)
    for recurrence in sorted({False, bool(config.recur_layers)}):
        with OnKernels():
            model(ids, ids, recurrence=recurrence).backward()
        with OnKernels(), torch.no_grad():
            states = [model.hidden(windows, recurrence=recurrence, rows_from=first) for first in {0, late}]
            if stride and model.overlap_problem is None:
                states.append(
                    model.overlapping_hidden(text, windows=count, stride=stride, recurrence=recurrence, rows_from=late)
                )
            for hidden in states:
                score(hidden.flatten(0, 1), model.head_weight, config.logits_rounding == "bf16")
    muon = build_optimizers(model, config).muon
    assert muon is not None
    step_muon(muon, torch.bfloat16)


def launch_branches() -> None:
    """Other dtypes and shapes than the recipes', and every branch of every kernel."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    # rows that can be read 16 bytes at a time, and rows that cannot
    for columns, dtype, chosen in itertools.product(
        (512, 333), (bfloat16, torch.float16, float32), COEFFICIENTS.values()
    ):
        coefficients = [value for triple in chosen.schedule() for value in triple]
        run("newton_schulz", [torch.empty(2048, columns)], coefficients, 1e-7, chosen.prescale, dtype)
    for columns, dtype, extras in itertools.product((512, 333), (bfloat16, float32), (False, True)):
        weight = torch.nn.Parameter(torch.empty(2048, columns))
        weight.grad = torch.empty_like(weight)
        step_muon(Muon([weight], row_normalize=extras, normuon=extras), dtype)
    for (width, hidden), eps, slope, add in itertools.product(MLPS, (None, 1e-6), (0.0, 0.5), (False, True)):
        shapes = ((SEQUENCES * LENGTH, width), (hidden, width), (width, hidden))
        x, up, down = (torch.empty(shape, dtype=bfloat16) for shape in shapes)
        for save in (False, True):
            y, *saved = run("leaky_relu2_mlp", x, up, down, None, None, slope, eps, 1.0, add, save)
        run("leaky_relu2_mlp_backward", y, x, up, down, None, *saved, slope, eps is not None, 1.0, add)
    for rounded in (False, True):
        score(x, up, rounded)
    for heads, kv_heads, dim, half in HEADS:
        q, k = (torch.empty(SEQUENCES, LENGTH, number, dim, dtype=bfloat16) for number in (heads, kv_heads))
        table, gain = torch.empty(LENGTH, 1, half, dtype=bfloat16), torch.empty(heads)
        q_hat, k_hat, rstd = run("qk_norm_rope", q, k, table, table, gain, 1e-6)
        run("qk_norm_rope_backward", q, k, q_hat, k_hat, table, table, gain, rstd)
        run("xsa_backward", q, *run("xsa", q, k), k)
    for width in (333, 768, 4096):
        stream, mix = torch.empty(SEQUENCES, LENGTH, width, dtype=bfloat16), torch.empty(2, width)
        mixed = run("mix_rms_norm", stream, stream, mix, 1e-6, 0.5)
        run("mix_rms_norm_backward", *mixed, stream, stream, mix, 1e-6, 0.5)


def score(hidden: Tensor, weight: Tensor, rounded: bool) -> None:
    run("window_nll", hidden, weight, torch.empty(hidden.shape[0], dtype=torch.int64), 30.0, rounded)


@torch.no_grad()
def step_muon(muon: Muon, compute_dtype: torch.dtype) -> None:
    for group in muon.param_groups:
        # of its own accord it would take a CPU's
        group["compute_dtype"] = compute_dtype
        run("muon_step", group["params"], muon, [(group, group["params"])])


def run(op: str, *arguments: Any) -> list[Tensor]:
    found = dispatch.run_on("triton", op, *arguments)
    return list(found) if isinstance(found, (list, tuple)) else [found]

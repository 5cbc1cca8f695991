"""Causal attention of one layer of a recipe, forward and backward, on every backend that can run here.

Each backend has the form that the trainer calls: compiled on a GPU. `training` is a micro-batch of a training step,
`evaluation` a batch of windows. A backend that fails at the recipe's shapes is left out with its error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import common
from benchmarks.measure.step_variants import step_config
from train.common.errors import main_guard
from train.config import Config
from train.data.loaders import micro_batch_sequences
from train.evaluate.scoring import BATCH_SEQS
from train.model.attention_backends import activate, causal_attention
from train.model.attention_choice import attention_form, attention_inputs, batch_shape, check_attention
from train.model.documents import Documents
from train.model.gpt import resolve_compute_dtype
from train.recipes import recipe_names

BATCHES = ("training", "evaluation")
Given = tuple[Tensor, Tensor, Tensor, Documents | None, Tensor]


def gradients(output: Tensor, given: Given) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    return [output.detach(), *torch.autograd.grad(output, given[:3], given[4])]


def exact(given: Given) -> list[Tensor]:
    """Output and gradients in float64, computed one sequence at a time."""
    query, key, value, documents, gradient = given
    parts = []
    for row in range(len(query)):
        rows = slice(row, row + 1)
        own = None if documents is None else Documents(documents.starts[rows])
        one = [tensor[rows].detach().double().requires_grad_() for tensor in (query, key, value)]
        output = causal_attention(*one, documents=own, backend="math")
        parts.append([output.detach(), *torch.autograd.grad(output, one, gradient[rows].double())])
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def make_variant(name: str, config: Config, device: torch.device) -> common.Variant:
    # one compiled form for each set of documents, as in training
    forms: dict[int, object] = {}

    def run(given: Given) -> list[Tensor]:
        activate(name)
        form = forms.setdefault(id(given[3]), attention_form(name, config, device, given[3]))
        return gradients(form(*given[:3]), given)  # type: ignore[operator]

    return common.Variant(name, run, graph=False)


def make_case(config: Config, sequences: int, device: torch.device) -> common.Case:
    """One layer's attention. FLOPs count 2 products forward and 5 backward, each over half of all pairs of positions."""
    shape, dtype = batch_shape(config, sequences).rsplit(" ", 1)
    pairs = sequences * config.num_heads * config.train_seq_len**2 / 2
    element = resolve_compute_dtype(config).itemsize
    tokens = sequences * config.train_seq_len * config.head_dim * element
    return common.Case(
        "attention",
        shape,
        dtype,
        lambda seed: attention_inputs(config, sequences, device, seed),
        exact,
        flops=2 * 7 * pairs * config.head_dim,
        # forward: read q, k, v, write y; backward: read q, k, v, y and its gradient, write three gradients
        bytes=tokens * (6 * config.num_heads + 6 * config.num_kv_heads),
        max_rel_err=2e-2 if element == 2 else 1e-5,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser("bench_attention", "One layer's attention on each backend.", rounds=30)
    parser.add_argument(
        "--recipe", default="sp8192_sdclip", choices=recipe_names(), help="whose shapes; default sp8192_sdclip"
    )
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=BATCHES, help="default: both")
    options = parser.parse_args(arguments)
    device = options.device
    config = step_config(options.recipe, device, tiny=options.tiny)
    problems = check_attention(config, device)
    for name, problem in problems.items():
        if problem is not None:
            print(f"{name}: left out: {problem}")
    clock = common.Clock(device, options.warmup_ms, options.rounds)
    limits = common.ceilings(clock)
    sequences = {"training": micro_batch_sequences(config), "evaluation": 2 if options.tiny else BATCH_SEQS}
    for batch in options.batches:
        case = make_case(config, sequences[batch], device)
        given = case.make(0)
        # PyTorch's plain formula stores all scores, so it is no candidate on a GPU
        names = [name for name in problems if problems[name] is None and (name != "math" or device.type != "cuda")]
        variants = [make_variant(name, config, device) for name in names]
        able = [variant for variant in variants if common.runs(variant, given)]
        common.report(common.measure(case, able, clock, limits), common.environment(device), keep=not options.tiny)
    return 0


if __name__ == "__main__":
    main_guard(main)

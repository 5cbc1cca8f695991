"""The ways to take a training step that are measured beside each other: models and optimizers of one GPU's share.

`published` is the recipe written plainly (`benchmarks.measure.published_step`), `torch` is this trainer on PyTorch's reference
operators, `golf` is this trainer on all kernels, `golf-op` on all but one, and `op=backend` is `torch` with that one
switched. On a GPU a way that lacks a kernel never has the name `golf`: `row_names` calls it `golf-op`.
`WAY+SETTING=VALUE` is a way with another value of a setting that decides how a step is computed: `torch+optimizer_graph=on`. The share is what one of 8 GPUs has: an eighth of the batch, and the
matrices that one rank orthogonalizes, or all of them where losses are compared. What the ranks would exchange is not in it.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure.published_model import published_model
from benchmarks.measure.published_step import PublishedStep
from benchmarks.measure.tokens import OneBatch, rank_sequences
from golf_kernels import dispatch
from golf_kernels.sharding import assign
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.values import ConfigError
from train.config import MICRO_BATCHES, Config
from train.loop import training_step
from train.model.attention_choice import choose_attention, use_attention
from train.model.compile import compiled_loss
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers, split_parameters
from train.recipes import load_recipe

# settings that decide how a step is computed, and not what
SETTINGS = ("optimizer_graph",)
TINY = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 64, "bigram_dim": 16}


@dataclass
class StepVariant:
    """One way to take a step.

    Attributes:
        name: of the way.
        backends: value of GOLF_BACKEND while it runs.
        step: takes token ids `(sequences, length + 1)` and whether layers repeat, and returns the loss.
        weights: what a step changes in place: "matrix", "embedding" and "scalar" weights, and their "average" if there is one.
        times_ms: measured.
        first_step_s: seconds of the first step, in which it was compiled.
    """

    name: str
    backends: str
    step: Callable[[np.ndarray, bool], Tensor]
    weights: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)
    first_step_s: float = float("nan")

    def run(self, tokens: np.ndarray, recurrence: bool) -> Tensor:
        with dispatch.forced(self.backends):
            return self.step(tokens, recurrence)

    def flat_weights(self) -> dict[str, Tensor]:
        """A copy of all weights of each kind, flat, in float32."""
        return {
            kind: torch.cat([tensor.detach().float().flatten() for tensor in tensors])
            for kind, tensors in self.weights.items()
            if tensors
        }


def all_kernels(without: Iterable[str] = ()) -> str:
    """GOLF_BACKEND with the fastest kind of kernel of every operator that has one here, and PyTorch for the rest.

    Args:
        without: operators that are left to PyTorch, with their backward passes.
    """
    left = {f"{op}{end}" for op in without for end in ("", "_backward")}
    found = {op: dispatch.available_backends(op) for op in dispatch.describe() if op not in left}
    return ",".join(["torch", *(f"{op}={backends[0]}" for op, backends in found.items() if backends[0] != "torch")])


def kernel_problems() -> dict[str, str]:
    """The operators of a training step that have kernels: why theirs cannot run here, or nothing where they can.

    Each name means its backward pass, too.
    """
    problems: dict[str, str] = {}
    for op, backends in dispatch.describe().items():
        # windows are evaluation's
        if "triton" in backends and "window" not in op:
            problem = "" if backends["triton"] == dispatch.AVAILABLE else backends["triton"]
            name = op.removesuffix("_backward")
            problems[name] = problems.get(name) or problem
    return problems


def step_kernels() -> list[str]:
    """The operators of a training step whose kernels can run here."""
    return [op for op, problem in kernel_problems().items() if not problem]


def reasons(problems: Mapping[str, str]) -> str:
    """Each reason once, with the operators that have it, unless all have the same."""
    operators: dict[str, list[str]] = {}
    for op, problem in problems.items():
        operators.setdefault(problem, []).append(op)
    return "; ".join(
        operators if len(operators) == 1 else (f"{', '.join(ops)}: {why}" for why, ops in operators.items())
    )


def row_names(names: Sequence[str], device: torch.device) -> list[str]:
    """The ways by the names of their rows, after it was said what `golf` is made of here.

    Raises:
        UserError: a way cannot be taken, is named twice, or is to be golf on a GPU where no kernel is left.
    """
    check_ways(names)
    problems = {op: problem for op, problem in kernel_problems().items() if problem}
    found = []
    for name in names:
        way, plus, change = name.partition("+")
        golf, *without = way.split("-")
        if golf == "golf":
            kernels = [op for op in step_kernels() if op not in without]
            lacking = {op: problem for op, problem in problems.items() if op not in without}
            if not kernels and device.type == "cuda":
                raise UserError(
                    f"--ways: {name!r}: no kernel of a training step is left, so that it would be torch: "
                    f"{reasons(lacking) or 'all are left out'}; leave it out"
                )
            print(f"{name}: {', '.join(kernels) or 'no kernel, so it is torch'}")
            print("".join(f"    without {op}: {problem}\n" for op, problem in lacking.items()), end="", flush=True)
            if device.type == "cuda":
                way = "-".join([way, *lacking])
        found.append(f"{way}{plus}{change}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise UserError(f"--ways: {', '.join(twice)} twice: expected each way once")
    return found


def add_attention(parser: argparse.ArgumentParser) -> None:
    """The flag that names the attention back end of all ways, with the trainer's environment variable as its default."""
    parser.add_argument(
        "--attention",
        default=os.environ.get("ATTENTION", "auto"),
        help="back end of all ways: auto, sdpa, fa3, …, as the trainer's; default: ATTENTION, or auto, the fastest that can run",
    )


def refuse_forced() -> None:
    """Refuse GOLF_BACKEND, which the ways would override.

    Raises:
        UserError: it is set.
    """
    if text := os.environ.get(dispatch.ENVIRONMENT_VARIABLE):
        raise UserError(
            f"{dispatch.ENVIRONMENT_VARIABLE}={text} is set, but each of the ways has back ends of its own: unset it, and name "
            "them as a way, such as --ways torch,muon_step=triton"
        )


def step_config(recipe: str, device: torch.device, *, tiny: bool, attention: str = "auto") -> Config:
    """A recipe's settings as a share of its step is measured: compiled on a GPU, and narrow where `tiny`.

    Raises:
        UserError: there is no such attention back end, or GOLF_BACKEND is set, which the ways would override.
    """
    refuse_forced()
    changes: dict[str, Any] = {"compile": "on" if device.type == "cuda" else "off", "attention": attention}
    if tiny:
        changes |= TINY | {"train_batch_tokens": MICRO_BATCHES * 2 * TINY["train_seq_len"], "compute_dtype": "float32"}
    # each way has code of its own for one and the same forward
    torch._dynamo.config.recompile_limit = 64
    return load_recipe(recipe).config(**changes)


def trainer_step(
    model: GPT, config: Config, share: list[int], device: torch.device
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The trainer's own step on one rank's share: its loop, its optimizers, and its moving average by name of the weights."""
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

    return step, average.average() if average else {}


def changed_setting(text: str) -> dict[str, Any]:
    """A setting and its value from SETTING=VALUE.

    Raises:
        ValueError: there is no such setting, or it has no such value.
    """
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise ValueError(f"+{text}: expected +SETTING=VALUE, with SETTING one of {', '.join(SETTINGS)}")
    changes: dict[str, Any] = {name: value}
    try:
        Config(**changes)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return changes


def check_ways(names: Iterable[str]) -> None:
    """Refuse ways that cannot be taken here, before anything is measured.

    Raises:
        UserError: by its name, with the reason.
    """
    for name in names:
        way, _, change = name.partition("+")
        if name == "published":
            continue
        try:
            if "+" in name:
                changed_setting(change)
            golf, *without = way.split("-")
            if golf == "golf" and (unknown := set(without) - set(kernel_problems())):
                raise ValueError(
                    f"golf leaves out {', '.join(sorted(unknown))}, expected some of {', '.join(kernel_problems())}"
                )
            with dispatch.forced(backends_of(way)):
                dispatch.validate()
        except (ValueError, dispatch.BackendError) as error:
            raise UserError(
                f"--ways: {name!r}: expected published, torch, golf, golf-OPERATOR or OPERATOR=BACKEND, and +SETTING=VALUE behind "
                f"all but the first: {error}"
            ) from error


def backends_of(way: str) -> str:
    """GOLF_BACKEND of a way that is not the published one."""
    golf, *without = way.split("-")
    return all_kernels(without) if golf == "golf" else "torch" if way == "torch" else f"torch,{way}"


def make_variants(config: Config, names: list[str], device: torch.device, *, whole: bool = False) -> list[StepVariant]:
    """The ways to measure, each with a model of its own that starts from the same weights.

    Args:
        config: the recipe.
        names: of the ways.
        device: where they run.
        whole: update every matrix, so that losses are those of a training; otherwise one rank's share.
    """
    check_ways(names)
    torch.manual_seed(config.seed)
    first = GPT(config).to(device)
    use_attention(first, choose_attention(config, device, rank_sequences(config)).name)
    matrices: list[Tensor] = list(split_parameters(first, config)["matrix"].values())
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), MICRO_BATCHES)
    share = [number for number, owner in enumerate(owners) if whole or owner == 0]
    if not whole:
        # a block's output begins as zero; where nobody updates it, all gradients before it would stay zero
        with torch.no_grad():
            torch._foreach_add_(matrices, [torch.randn_like(matrix) for matrix in matrices], alpha=0.02)
    variants = []
    for name in names:
        if name == "published":
            model = published_model(first)
            with dispatch.forced("torch"):
                plain = PublishedStep(model, config, share, compiled_loss(model, config, device))
            variants.append(StepVariant(name, "torch", plain, weights_of(model, config, plain.average)))
            continue
        model = copy.deepcopy(first)
        way, _, change = name.partition("+")
        backends = backends_of(way)
        changes = changed_setting(change) if change else {}
        with dispatch.forced(backends):
            step, average = trainer_step(model, config.replace(**changes), share, device)
        variants.append(StepVariant(name, backends, step, weights_of(model, config, average)))
    return variants


def weights_of(model: GPT, config: Config, average: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The trained weights by kind, and their average."""
    kinds = split_parameters(model, config)
    weights: dict[str, list[Tensor]] = {kind: list(parameters.values()) for kind, parameters in kinds.items()}
    return weights | {"average": [average[name] for names in kinds.values() for name in names if average]}

"""The variants of a training step that the benchmarks compare. Each does the work of one of 8 ranks.

* `published`: the step of the published script (`benchmarks.measure.published_step`).
* `torch`: this trainer's step with the PyTorch backend of every operator.
* `golf`: this trainer's step with all kernels.
* `golf-OPERATOR`: `golf` without the kernel of that operator.
* `OPERATOR=BACKEND`: `torch` with one kernel, such as `muon_step=triton`.

Every name except `published` may end in a changed setting, `+SETTING=VALUE`, such as `torch+optimizer_graph=on`.

A step takes an eighth of the batch. Muon updates the matrices of one rank (in `benchmarks.bench_loss_curves` all
matrices). The ranks do not communicate.
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
from golf_kernels import dispatch, operators, tuned
from golf_kernels.backend_names import without_variant
from golf_kernels.sharding import assign
from train.common.distributed import MICRO_BATCHES
from train.common.errors import UserError
from train.common.values import ConfigError
from train.config import Config
from train.loop import training_step
from train.model.attention_choice import choose_attention, use_attention
from train.model.compile import compiled_loss
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers, split_parameters
from train.recipes import load_recipe

# the settings that a variant may change; none of them changes a step's result
SETTINGS = ("optimizer_graph",)
NAMES = "published, torch, golf, golf-OPERATOR or OPERATOR=BACKEND; all but published may end in +SETTING=VALUE"
TINY = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 64, "bigram_dim": 16}


@dataclass
class StepVariant:
    """A variant of the training step.

    `backends` is the value of GOLF_BACKEND during a step. `step(tokens, recurrence)` takes token ids `(sequences,
    length + 1)` and returns the loss. `weights` maps each kind of weights to the tensors that a step changes.
    `times_ms` lists the measured times. `first_step_s` has the seconds of the first step, compilation included.
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
        """Copies each kind of weights into one flat float32 tensor."""
        return {
            kind: torch.cat([tensor.detach().float().flatten() for tensor in tensors])
            for kind, tensors in self.weights.items()
            if tensors
        }


def all_kernels(without: Iterable[str] = ()) -> str:
    """Returns the value of GOLF_BACKEND that uses the preferred kernel of each operator that is not in `without`.

    Of a kernel with variants it names the one that `python -m golf_kernels tune` prefers on this machine.
    """
    decided = tuned.load()
    preferred = decided.preferences("call") if decided else {}
    kernels = []
    for op in operators.declared():
        kernel = dispatch.available_backends(op)[0]
        if op not in set(without) and kernel != "torch":
            named = preferred.get(op, kernel)
            kernels.append(f"{op}={named if without_variant(named) == kernel else kernel}")
    return ",".join(["torch", *kernels])


def kernel_problems() -> dict[str, str]:
    """Returns operator → why its Triton kernels cannot run here, or an empty text if they can.

    Only operators of a training step that have Triton kernels are included. An operator's kernels include those of its
    backward pass.
    """
    backends, problems = dispatch.describe(), {}
    for op, operator in operators.declared().items():
        states = [backends[member].get("triton") for member in dispatch.members(op)]
        if operator.called_by in ("model", "optimize") and None not in states:
            problems[op] = next((state for state in states if state and state != dispatch.AVAILABLE), "")
    return problems


def step_kernels() -> list[str]:
    """Returns the operators of a training step whose Triton kernels can run here."""
    return [op for op, problem in kernel_problems().items() if not problem]


def reasons(problems: Mapping[str, str]) -> str:
    """Join the problems into one text, which names each reason after the operators that it concerns.

    If all operators have the same reason, the text is that reason alone.
    """
    operators: dict[str, list[str]] = {}
    for op, problem in problems.items():
        operators.setdefault(problem, []).append(op)
    return "; ".join(
        operators if len(operators) == 1 else (f"{', '.join(ops)}: {why}" for why, ops in operators.items())
    )


def row_names(names: Sequence[str], device: torch.device) -> list[str]:
    """Returns the variants' names for the rows, and prints which kernels `golf` uses.

    If the kernel of an operator cannot run on this GPU, the row of `golf` is named `golf-OPERATOR`. So all rows of one
    name were measured with the same kernels.
    """
    check_names(names)
    problems = {op: problem for op, problem in kernel_problems().items() if problem}
    found = []
    for name in names:
        base, plus, change = name.partition("+")
        golf, *without = base.split("-")
        if golf == "golf":
            kernels = [op for op in step_kernels() if op not in without]
            lacking = {op: problem for op, problem in problems.items() if op not in without}
            if not kernels and device.type == "cuda":
                raise UserError(
                    f"--variants: {name!r} has no kernel, so it would be torch: {reasons(lacking) or 'all are left out'}: "
                    "leave it out"
                )
            print(f"{name}: {', '.join(kernels) or 'no kernel, so it is torch'}")
            print("".join(f"    without {op}: {problem}\n" for op, problem in lacking.items()), end="", flush=True)
            if device.type == "cuda":
                base = "-".join([base, *lacking])
        found.append(f"{base}{plus}{change}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise UserError(f"--variants: {', '.join(twice)} twice: expected each variant once")
    return found


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add the option `--attention`. Its default is the environment variable ATTENTION, which the trainer reads too."""
    parser.add_argument(
        "--attention",
        default=os.environ.get("ATTENTION", "auto"),
        help="attention backend of all variants: auto (the fastest), sdpa, fa3, …; default: $ATTENTION, or auto",
    )


def refuse_forced() -> None:
    """Raise an error if GOLF_BACKEND is set, because each variant sets this variable."""
    if text := os.environ.get(dispatch.ENVIRONMENT_VARIABLE):
        raise UserError(
            f"{dispatch.ENVIRONMENT_VARIABLE}={text} is set, but each variant has its own backends: unset it, and name a "
            "variant such as --variants torch,muon_step=triton"
        )


def step_config(recipe: str, device: torch.device, *, tiny: bool, attention: str = "auto") -> Config:
    """Returns the settings for measuring a recipe's step: compiled on a GPU, and a narrow model with `tiny`.

    Raises:
        UserError: GOLF_BACKEND is set.
    """
    refuse_forced()
    changes: dict[str, Any] = {"compile": "on" if device.type == "cuda" else "off", "attention": attention}
    changes["device"] = device.type
    if tiny:
        changes |= TINY | {"train_batch_tokens": MICRO_BATCHES * 2 * TINY["train_seq_len"]}
    # each variant compiles the same functions anew, more often than Dynamo's default limit allows
    torch._dynamo.config.recompile_limit = 64
    return load_recipe(recipe).config(**changes)


def trainer_step(
    model: GPT, config: Config, owned: list[int], device: torch.device
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Returns the trainer's step for one rank, and a dictionary from each weight's name to its moving average.

    The step updates the matrices whose indices are in `owned`.
    """
    optimizers = build_optimizers(model, config, owned=owned)
    average = EMA(model, config.ema_decay) if config.ema_decay else None
    loss_of = compiled_loss(model, config, device)

    def step(tokens: np.ndarray, recurrence: bool) -> Tensor:
        loss = training_step(optimizers, loss_of, OneBatch(tokens, device), recurrence, 1.0, config.muon_momentum)
        if average:
            average.update()
        return loss

    return step, average.average() if average else {}


def changed_setting(text: str) -> dict[str, Any]:
    """Parse SETTING=VALUE. Raises ValueError if a variant may not change this setting or the value is wrong."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise ValueError(f"+{text}: expected +SETTING=VALUE, with SETTING one of {', '.join(SETTINGS)}")
    changes: dict[str, Any] = {name: value}
    try:
        Config(**changes)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return changes


def check_names(names: Iterable[str]) -> None:
    """Raise a UserError if a variant does not exist or cannot run here."""
    for name in names:
        base, _, change = name.partition("+")
        if name == "published":
            continue
        try:
            if "+" in name:
                changed_setting(change)
            golf, *without = base.split("-")
            if golf == "golf" and (unknown := set(without) - set(kernel_problems())):
                raise ValueError(
                    f"golf has no kernel of {', '.join(sorted(unknown))}, only of {', '.join(kernel_problems())}"
                )
            with dispatch.forced(backends_of(base)):
                dispatch.validate()
        except (ValueError, dispatch.BackendError) as error:
            raise UserError(f"--variants: {name!r}: expected {NAMES}: {error}") from error


def backends_of(name: str) -> str:
    """Returns the value of GOLF_BACKEND for a variant. `name` must not end in +SETTING=VALUE."""
    golf, *without = name.split("-")
    return all_kernels(without) if golf == "golf" else "torch" if name == "torch" else f"torch,{name}"


def make_variants(config: Config, names: list[str], device: torch.device, *, whole: bool = False) -> list[StepVariant]:
    """Build the variants. Each has a model of its own. All models have the same initial weights.

    With `whole`, Muon updates all matrices in a step, otherwise the matrices of rank 0.
    """
    check_names(names)
    torch.manual_seed(config.seed)
    first = GPT(config).to(device)
    use_attention(first, choose_attention(config, device, rank_sequences(config)).name)
    matrices: list[Tensor] = list(split_parameters(first, config)["matrix"].values())
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), MICRO_BATCHES)
    owned = [number for number, owner in enumerate(owners) if whole or owner == 0]
    if not whole:
        # output projections start at zero. Those of other ranks are not updated here, so they would stay zero and block
        # all gradients
        with torch.no_grad():
            torch._foreach_add_(matrices, [torch.randn_like(matrix) for matrix in matrices], alpha=0.02)
    variants = []
    for name in names:
        if name == "published":
            model = published_model(first)
            with dispatch.forced("torch"):
                plain = PublishedStep(model, config, owned, compiled_loss(model, config, device))
            variants.append(StepVariant(name, "torch", plain, weights_of(model, config, plain.average)))
            continue
        model = copy.deepcopy(first)
        base, _, change = name.partition("+")
        backends = backends_of(base)
        changes = changed_setting(change) if change else {}
        with dispatch.forced(backends):
            step, average = trainer_step(model, config.replace(**changes), owned, device)
        variants.append(StepVariant(name, backends, step, weights_of(model, config, average)))
    return variants


def weights_of(model: GPT, config: Config, average: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    kinds = split_parameters(model, config)
    weights: dict[str, list[Tensor]] = {kind: list(parameters.values()) for kind, parameters in kinds.items()}
    return weights | {"average": [average[name] for names in kinds.values() for name in names if average]}

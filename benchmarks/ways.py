"""The ways to take a training step that are measured beside each other: models, optimizers and tokens of one GPU's share.

`published` is the recipe written plainly (`benchmarks.published`), `torch` is this trainer on PyTorch's reference
operators, `golf` is this trainer on every kernel that can run here, and `op=backend` is `torch` with that one switched.
`WAY+SWITCH` is a way with one of Inductor's switches (`train.inductor`). The share is what one of 8 GPUs has: an eighth of
the batch, and the matrices that one rank orthogonalizes. What the ranks would exchange is not in it.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.published import PublishedStep
from golf_kernels import dispatch
from golf_kernels.sharding import assign
from train.config import MICRO_BATCHES, Config
from train.data.loaders import Stream
from train.data.shards import find_shards
from train.distributed import Ranks
from train.errors import UserError
from train.inductor import chosen_options, parse_switch
from train.loop import compiled_loss, training_step
from train.model.attention import Attention
from train.model.attention_choice import choose_attention, use_attention
from train.model.gpt import GPT
from train.model.mlp import MLP
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers, split_parameters
from train.recipes import load_recipe

TINY = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 64, "bigram_dim": 16}


@dataclass
class StepVariant:
    """One way to take a step.

    Attributes:
        name: of the way.
        backends: value of GOLF_BACKEND while it runs.
        step: takes token ids `(sequences, length + 1)` and whether layers repeat, and returns the loss.
        times_ms: measured.
        first_step_s: seconds of the first step, in which it was compiled.
        warmup_loss: mean loss of the steps before it was timed; None before them.
    """

    name: str
    backends: str
    step: Callable[[np.ndarray, bool], Tensor]
    times_ms: list[float] = field(default_factory=list)
    first_step_s: float = float("nan")
    warmup_loss: float | None = None

    def run(self, tokens: np.ndarray, recurrence: bool) -> Tensor:
        with dispatch.forced(self.backends):
            return self.step(tokens, recurrence)


def all_kernels() -> str:
    """GOLF_BACKEND with the fastest kind of kernel of every operator that has one here, and PyTorch for the rest."""
    found = {op: dispatch.available_backends(op) for op in dispatch.describe()}
    return ",".join(["torch", *(f"{op}={backends[0]}" for op, backends in found.items() if backends[0] != "torch")])


def step_kernels() -> list[str]:
    """The operators of a training step whose kernels can run here; each name means its backward pass, too."""
    # windows are evaluation's
    names = [op for op in dispatch.describe() if "triton" in dispatch.available_backends(op) and "window" not in op]
    return [name for name in names if not name.endswith("_backward")]


def kernels_problem() -> str:
    """Why no kernel of a training step can run here; empty where one can."""
    if step_kernels():
        return ""
    reasons: dict[str, list[str]] = {}
    for op, backends in dispatch.describe().items():
        if "triton" in backends:
            reasons.setdefault(backends["triton"], []).append(op)
    return "; ".join(reasons if len(reasons) == 1 else (f"{', '.join(ops)}: {why}" for why, ops in reasons.items()))


def add_attention(parser: argparse.ArgumentParser) -> None:
    """The flag that names the attention back end of all ways, with the trainer's environment variable as its default."""
    parser.add_argument(
        "--attention",
        default=os.environ.get("ATTENTION", "auto"),
        help="back end of all ways: auto, sdpa, fa3, …, as the trainer's; default: ATTENTION, or auto, the fastest that can run",
    )


def share_config(recipe: str, device: torch.device, *, tiny: bool, attention: str = "auto") -> Config:
    """A recipe's settings as a share of its step is measured: compiled on a GPU, and narrow where `tiny`.

    Raises:
        UserError: there is no such attention back end, or GOLF_BACKEND is set, which the ways would override.
    """
    if text := os.environ.get(dispatch.ENVIRONMENT_VARIABLE):
        raise UserError(
            f"{dispatch.ENVIRONMENT_VARIABLE}={text} is set, but each of the ways has back ends of its own: unset it, and name "
            "them as a way, such as --ways torch,muon_step=triton"
        )
    changes: dict[str, Any] = {"compile": "on" if device.type == "cuda" else "off", "attention": attention}
    if tiny:
        changes |= TINY | {"train_batch_tokens": MICRO_BATCHES * 2 * TINY["train_seq_len"], "compute_dtype": "float32"}
    # each way has code of its own for one and the same forward
    torch._dynamo.config.recompile_limit = 64
    return load_recipe(recipe).config(**changes)


def share_sequences(config: Config) -> int:
    """Sequences of one GPU's share of a step."""
    return config.train_batch_tokens // (MICRO_BATCHES * config.train_seq_len)


def token_source(config: Config, data: Path | None) -> Tokens:
    """The share's tokens from the first on: of the shards in a folder, or made."""
    return MadeTokens(config) if data is None else ShardTokens(config, data)


class Tokens(Protocol):
    """Where batches come from: `(sequences, length + 1)` uint16 each."""

    def next(self) -> np.ndarray: ...


class MadeTokens:
    """Random tokens in the place of a loader, so that a step is measured and not a disk."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.shape = (share_sequences(config), config.train_seq_len + 1)
        self.vocab_size = config.vocab_size
        self.generator = np.random.default_rng(seed)

    def next(self) -> np.ndarray:
        """`(sequences, length + 1)` uint16, Zipf-like as text is."""
        ranks = self.generator.zipf(1.2, self.shape)
        return np.minimum(ranks, self.vocab_size - 1).astype(np.uint16)


class ShardTokens:
    """The tokens of a dataset's training shards, in their order."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.stream = Stream(find_shards(folder, "train"), config.vocab_size)
        self.shape = (share_sequences(config), config.train_seq_len + 1)
        self.place = 0

    def next(self) -> np.ndarray:
        """`(sequences, length + 1)` uint16."""
        rows = self.stream.span(self.place, self.shape[0] * self.shape[1])
        self.place += len(rows)
        return rows.reshape(self.shape)


class OneBatch:
    """A loader that gives one batch, from pinned memory as the trainer's does."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        batch = torch.from_numpy(tokens.astype(np.int32))
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        self.batch = batch.long()

    def next_batch(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.batch[:, :-1], self.batch[:, 1:])]


def trainer_step(
    model: GPT, config: Config, share: list[int], device: torch.device, options: Mapping[str, Any] | None
) -> Callable[..., Tensor]:
    """The trainer's own step on one rank's share: its loop, its optimizers, its moving average."""
    # one micro-batch is the whole of a rank's part of the step
    ranks = Ranks(world_size=MICRO_BATCHES, device=device)
    optimizers = build_optimizers(model, config, owned=share)
    average = EMA(model, config.ema_decay) if config.ema_decay else None
    loss_of = compiled_loss(model, config, device, options)

    def step(tokens: np.ndarray, recurrence: bool) -> Tensor:
        loss = training_step(
            optimizers, loss_of, OneBatch(tokens, device), ranks, recurrence, 1.0, config.muon_momentum
        )
        if average:
            average.update()
        return loss

    return step


def check_ways(names: Iterable[str]) -> None:
    """Refuse ways that cannot be taken here, before anything is measured.

    Raises:
        UserError: by its name, with the reason.
    """
    for name in names:
        way, _, switch = name.partition("+")
        if name == "published":
            continue
        try:
            if switch or "+" in name:
                parse_switch(switch)
            with dispatch.forced("torch" if way in ("torch", "golf") else f"torch,{way}"):
                dispatch.validate()
        except (ValueError, dispatch.BackendError) as error:
            raise UserError(
                f"--ways: {name!r}: expected published, torch, golf or operator=backend, and +SWITCH behind all but the first: "
                f"{error}"
            ) from error


def make_variants(config: Config, names: list[str], device: torch.device) -> list[StepVariant]:
    """The ways to measure, each with a model of its own that starts from the same weights."""
    check_ways(names)
    torch.manual_seed(config.seed)
    first = GPT(config).to(device)
    use_attention(first, choose_attention(config, device, share_sequences(config)).name)
    matrices = list(split_parameters(first, config)["matrix"].values())
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), MICRO_BATCHES)
    share = [number for number, owner in enumerate(owners) if owner == 0]
    variants = []
    for name in names:
        model = copy.deepcopy(first)
        if name == "published":
            for module in model.modules():
                if isinstance(module, (Attention, MLP)):
                    module.as_published = True
            # torch.compile's defaults, whatever train.inductor has chosen
            compiled = compiled_loss(model, config, device, {})
            variants.append(StepVariant(name, "torch", PublishedStep(model, config, share, compiled)))
            continue
        way, _, switch = name.partition("+")
        backends = {"torch": "torch", "golf": all_kernels()}.get(way, f"torch,{way}")
        options = chosen_options()[0] | dict(parse_switch(switch).options) if switch else None
        with dispatch.forced(backends):
            variants.append(StepVariant(name, backends, trainer_step(model, config, share, device, options)))
    return variants

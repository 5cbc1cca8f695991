"""Lists a model's parameters with their optimizer classes, and computes the model's FLOP per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from train.config import Config
from train.model.embeddings import projects
from train.model.gpt import GPT
from train.model.order import virtual_order

_BLOCK_MATRICES = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class ParameterRow:
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    count: int  # number of elements
    dtype: torch.dtype
    kind: str  # optimizer class, see `classify`


def classify(name: str, config: Config) -> str:
    """Return a parameter's optimizer class: "matrix" (Muon), "embedding" (AdamW) or "scalar" (AdamW with other rates).

    Vectors belong to "scalar".
    """
    parts = name.split(".")
    if name in ("embedding.weight", "bigram.embedding", "ve.embedding"):
        return "embedding"
    if name == "bigram.proj" or (parts[0] == "blocks" and parts[-1] in _BLOCK_MATRICES):
        return "matrix"
    if name == "ve.proj" and config.ve_proj_optimizer == "muon":
        return "matrix"
    return "scalar"


def parameter_table(model: GPT) -> list[ParameterRow]:
    """List the parameters of a model, which may be on the meta device."""
    return [
        ParameterRow(name, tuple(weight.shape), weight.numel(), weight.dtype, classify(name, model.config))
        for name, weight in model.named_parameters()
    ]


def mflop_per_token(config: Config, *, recurrence: bool, length: int | None = None) -> float:
    """Return the MFLOP of one training token, forward and backward.

    FLOP = 6 · weights + 6 · layer runs · T · d. The second term is causal attention. T is `length`, or `train_seq_len`
    if it is None. `weights` is the number of weights in matrix products: a repeated layer counts once per run, the
    output head once, and embedding lookups do not count.
    """
    dim, runs = config.model_dim, len(virtual_order(config, recurrence=recurrence))
    block = 2 * dim * dim + 2 * config.kv_dim * dim + 2 * config.mlp_hidden * dim
    weights = runs * block + config.vocab_size * dim
    if config.bigram_vocab_size and projects(config, config.bigram_dim, dim):
        weights += config.bigram_dim * dim
    if config.ve_dim and projects(config, config.ve_dim, config.kv_dim):
        weights += config.ve_dim * config.kv_dim
    attention = runs * (length or config.train_seq_len) * dim
    return 6 * (weights + attention) / 1e6

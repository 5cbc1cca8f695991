"""The published systems, and narrow copies of them for tests. A system is a recipe's settings under a short name."""

from __future__ import annotations

from typing import Any

import torch

from train.config import Config
from train.model.gpt import GPT
from train.optimize.groups import split_parameters
from train.recipes import load_recipe

_RECIPES = {
    "baseline": "baseline",
    "sp1024": "sp1024_smear_bigram",
    "sp2048": "sp2048_normuon",
    "sp4096": "sp4096_recurrence",
    "sp8192": "sp8192_sdclip",
    "frontier": "sp8192_frontier",
}
SYSTEMS = {system: load_recipe(recipe).settings for system, recipe in _RECIPES.items()}
"""System → the settings of its recipe, unchanged, so that tests cover what is trained."""

_NARROW: dict[str, object] = {
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 259,
    "mlp_mult": 2.0,
    "train_seq_len": 16,
}
# logits rounded to bfloat16 would hide all but the third digit
_NARROW |= {"logits_rounding": "none"}
# the rotary base grows beyond rope_train_seq_len (NTK rule). Where that is 8, the tests' texts are longer
_NARROW_BY_SYSTEM: dict[str, dict[str, object]] = {
    "baseline": {"rope_train_seq_len": 8},
    "sp1024": {"rope_train_seq_len": 8, "bigram_vocab_size": 41, "bigram_dim": 12},
    "sp2048": {"rope_train_seq_len": 16},
    "sp4096": {"rope_train_seq_len": 8, "rope_dims": 4, "ve_dim": 12},
    "sp8192": {"rope_train_seq_len": 16, "rope_dims": 4, "ve_dim": 12},
    "frontier": {"rope_train_seq_len": 8, "rope_dims": 4, "loader": "sequential"},
}

_FOUR = {"num_layers": 4, "recur_layers": (1,), "parallel_start_layer": 3, "ve_layers": (2, 3), "xsa_last_n": 4}
SHALLOW: dict[str, dict[str, Any]] = {
    "baseline": {"num_layers": 3},
    "sp1024": {"num_layers": 2},
    "sp2048": {"num_layers": 2},
    "sp4096": _FOUR,
    "sp8192": _FOUR,
    "frontier": {"num_layers": 3, "recur_layers": (1,), "parallel_start_layer": 2, "xsa_last_n": 3},
}
"""System → changed settings that leave it few layers but all of its features."""

CASES = [("baseline", False), ("sp1024", False), ("sp2048", False)] + [
    (system, recurrence) for system in ("sp4096", "sp8192", "frontier") for recurrence in (False, True)
]
"""(system, whether recurrence is on), for every state that a system has."""


def narrow_config(system: str, **changes: object) -> Config:
    """The settings of a narrow copy of a system: all features and layers, but small widths."""
    return Config(**(SYSTEMS[system] | _NARROW | _NARROW_BY_SYSTEM[system] | changes))


def random_model(config: Config, *, seed: int = 0) -> GPT:
    """A float64 model. All trained parameters are random, because a zero could hide an error."""
    torch.manual_seed(seed)
    model = GPT(config).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def block_matrices(model: GPT) -> dict[str, torch.nn.Parameter]:
    """Query, key, value, output, up and down of every layer, by parameter name."""
    kinds = split_parameters(model, model.config)
    return {name: weight for name, weight in kinds["matrix"].items() if name.startswith("blocks.")}


def random_ids(config: Config, rows: int = 2, length: int = 13, *, seed: int = 1) -> torch.Tensor:
    """Random token ids `(rows, length)`. Some are 1, with which a document begins."""
    ids = torch.randint(2, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 0] = ids[0, length // 2] = ids[-1, length // 3] = 1
    return ids

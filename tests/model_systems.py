"""The published systems as model settings, and narrow copies of them that a test can afford."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from train.config import Config
from train.model.gpt import GPT

BASELINE = {"vocab_size": 1024, "num_layers": 9}
SP1024 = {
    "vocab_size": 1024,
    "num_layers": 8,
    "mlp_mult": 3.0,
    "train_seq_len": 2048,
    "smear_gate": "published",
    "bigram_vocab_size": 2048,
    "orthogonal_init": True,
}
SP2048 = {
    "vocab_size": 2048,
    "num_layers": 8,
    "mlp_mult": 3.0,
    "train_seq_len": 4096,
    "rope_train_seq_len": 4096,
    "qat": True,
}
_ELEVEN = {
    "num_layers": 11,
    "mlp_mult": 4.0,
    "mlp_slope": 0.5,
    "train_seq_len": 2048,
    "rope_dims": 16,
    "qk_gain_init": 5.0,
    "orthogonal_init": True,
    "ln_scale": True,
    "xsa_last_n": 11,
    "ve_dim": 128,
    "ve_layers": (9, 10),
    "parallel_start_layer": 7,
}
SP4096 = _ELEVEN | {
    "vocab_size": 4096,
    "rope_train_seq_len": 1024,
    "smear_gate": "published",
    "ve_proj_optimizer": "adamw",
    "parallel_form": "gptj",
    "recur_layers": (4, 5),
    "recur_form": "blend",
    "recur_scale_params": 2,
}
SP8192 = _ELEVEN | {
    "vocab_size": 8192,
    "rope_train_seq_len": 2048,
    "skip_gates": True,
    "parallel_form": "lanes",
    "recur_layers": (3, 4, 5),
    "recur_form": "unroll",
}

SYSTEMS = {"baseline": BASELINE, "sp1024": SP1024, "sp2048": SP2048, "sp4096": SP4096, "sp8192": SP8192}

# the length beyond which the rotary base grows is kept below the tests' texts, so that the NTK rule takes part
_NARROW = {"model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 259, "mlp_mult": 2.0, "train_seq_len": 16}
_NARROW_BY_SYSTEM = {
    "baseline": {"rope_train_seq_len": 8},
    "sp1024": {"rope_train_seq_len": 8, "bigram_vocab_size": 41, "bigram_dim": 12},
    "sp2048": {"rope_train_seq_len": 16},
    "sp4096": {"rope_train_seq_len": 8, "rope_dims": 4, "ve_dim": 12},
    "sp8192": {"rope_train_seq_len": 16, "rope_dims": 4, "ve_dim": 12},
}

_FOUR = {"num_layers": 4, "recur_layers": (1,), "parallel_start_layer": 3, "ve_layers": (2, 3), "xsa_last_n": 4}
SHALLOW = {
    "baseline": {"num_layers": 3},
    "sp1024": {"num_layers": 2},
    "sp2048": {"num_layers": 2},
    "sp4096": _FOUR,
    "sp8192": _FOUR,
}
"""Changes that leave each system few layers, with all its parts still in use."""

CASES = [("baseline", False), ("sp1024", False), ("sp2048", False)] + [
    (system, recurrence) for system in ("sp4096", "sp8192") for recurrence in (False, True)
]
"""Systems with the states of recurrence that they know."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep tests of narrow models on one core: more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow_config(system: str, **changes: object) -> Config:
    """A narrow copy of a system: all its parts and layers, small widths."""
    return Config(**(SYSTEMS[system] | _NARROW | _NARROW_BY_SYSTEM[system] | changes))


def random_model(config: Config, *, seed: int = 0) -> GPT:
    """A float64 model whose every trained parameter is random, so that no part is silent."""
    torch.manual_seed(seed)
    model = GPT(config).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def random_ids(config: Config, rows: int = 2, length: int = 13, *, seed: int = 1) -> torch.Tensor:
    """Token ids `(rows, length)` with document beginnings among them."""
    ids = torch.randint(2, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 0] = ids[0, length // 2] = ids[-1, length // 3] = 1
    return ids

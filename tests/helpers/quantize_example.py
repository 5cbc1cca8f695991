"""A small random model that has every class of tensor, and token batches for its calibration."""

from typing import Any

import torch
from torch import Tensor

from train.config import Config
from train.model.gpt import GPT


def tiny(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "vocab_size": 260, "num_layers": 4, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_slope": 0.5,
        "train_seq_len": 16, "train_batch_tokens": 64, "ve_dim": 8, "ve_layers": (2, 3), "skip_gates": True,
        "recur_layers": (1, 2), "bigram_vocab_size": 300, "bigram_dim": 8, "smear_gate": "published",
        "passthrough_max_elements": 300, "embed_dtype": "float32", "scale_floor": "none",
    }  # fmt: skip
    return Config(**(settings | changes))


def random_model(config: Config, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter.float()).to(parameter.dtype))
    return model


def random_batches(config: Config, count: int = 3, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, config.vocab_size, (2, config.train_seq_len), generator=generator) for _ in range(count)]

"""Random models in a recipe's shapes, settings for narrow models, and the FLOPs of a forward pass."""

from __future__ import annotations

import torch

from train.config import Config
from train.model.gpt import GPT
from train.model.order import make_plan

# few narrow layers, so that most of the work is the logits that this project's sliding-window evaluation skips
NARROW = {
    "num_layers": 4,
    "recur_layers": (1,),
    "parallel_start_layer": 3,
    "xsa_last_n": 4,
    "ve_layers": (2, 3),
    "model_dim": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ve_dim": 16,
    "train_seq_len": 256,
    "train_batch_tokens": 2048,
    "eval_seq_len": 256,
    "eval_stride": 16,
}


def window_flops(config: Config, rows: int) -> float:
    """Returns the FLOPs of the forward pass of one evaluation window, with recurrence if the model has it.

    The last layer and the head compute only `rows` positions. A product takes 2 FLOPs per weight and position.
    Attention takes 4 · model_dim FLOPs per query and visible key.
    """
    dim, length = config.model_dim, config.window
    runs = len(make_plan(config, recurrence=bool(config.recur_layers)))
    key_value = 2 * dim * config.kv_dim
    others = 2 * dim * dim + 2 * dim * config.mlp_hidden
    weights = runs * length * key_value + ((runs - 1) * length + rows) * others + rows * config.vocab_size * dim
    tables = length * (config.ve_dim * config.kv_dim + bool(config.bigram_vocab_size) * config.bigram_dim * dim)
    pairs = (runs - 1) * length * length / 2 + rows * (length - rows / 2)
    return 2 * (weights + tables) + 4 * dim * pairs


def random_model(config: Config, device: torch.device) -> GPT:
    """Returns a model whose matrices are all random. In a newly built model some matrices are zero."""
    torch.manual_seed(config.seed)
    model = GPT(config).to(device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5)
    return model

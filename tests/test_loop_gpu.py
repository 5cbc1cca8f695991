"""What a GPU must see of a training step: no wait of the host, no graph break, no compilation behind the first steps."""

import pytest
import torch

from train.config import MICRO_BATCHES
from train.distributed import Ranks
from train.loop import compiled_loss, training_step
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers
from train.recipes import load_recipe, recipe_names

NARROW = {
    "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 128, "bigram_dim": 16,
    "train_batch_tokens": MICRO_BATCHES * 4 * 128, "compile": "on", "device": "cuda",
}  # fmt: skip


class RandomBatch:
    """One batch on the GPU."""

    def __init__(self, vocab_size: int) -> None:
        tokens = torch.randint(vocab_size, (4, 129), device="cuda")
        self.batch = (tokens[:, :-1], tokens[:, 1:])

    def next_batch(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.batch]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_step_never_waits_and_never_compiles_again(recipe: str) -> None:
    config = load_recipe(recipe).config(**NARROW)
    device = torch.device("cuda")
    model = GPT(config).to(device)
    optimizers = build_optimizers(model, config)
    average = EMA(model, 0.99)
    loss_of = compiled_loss(model, config, device)
    loader, ranks = RandomBatch(config.vocab_size), Ranks(world_size=MICRO_BATCHES, device=device)
    forms = sorted({False, bool(config.recur_layers)})

    def steps(count: int) -> list[torch.Tensor]:
        losses = []
        for recurrence in forms * count:
            losses.append(training_step(optimizers, loss_of, loader, ranks, recurrence, 1.0, 0.95))
            average.update()
        return losses

    steps(3)
    torch._dynamo.config.error_on_recompile = True
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = steps(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch._dynamo.config.error_on_recompile = False
    assert all(bool(loss.isfinite()) for loss in losses)
    assert losses[-1] < losses[0]

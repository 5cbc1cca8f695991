"""What a GPU must see of a training step: no wait of the host, no graph break, no compilation behind the first steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.measure.step_variants import all_kernels
from golf_kernels import dispatch
from train.common.distributed import MICRO_BATCHES, Ranks
from train.data.dataset import Dataset
from train.data.shards import write_shard
from train.loop import training_step
from train.model.attention_choice import choose_attention, use_attention
from train.model.compile import compiled_loss
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers
from train.recipes import load_recipe, recipe_names
from train.run.clocks import WallClock

NARROW = {
    "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 128, "bigram_dim": 16,
    "train_batch_tokens": MICRO_BATCHES * 4 * 128, "compile": "on", "device": "cuda",
}  # fmt: skip
# the step that counts most first, as a rented GPU may not see the end; without kernels a graph is not the default
CASES = [
    *(("sp8192_sdclip", kernels, graph) for kernels, graph in ((True, "auto"), (False, "auto"), (False, "on"))),
    *((recipe, True, "auto") for recipe in recipe_names() if recipe != "sp8192_sdclip"),
    ("sp2048_normuon", False, "on"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "kernels", "graph"), CASES)
def test_a_step_never_waits_and_never_compiles_again(recipe: str, kernels: bool, graph: str, tmp_path: Path) -> None:
    # something to learn: each token follows from the one before it
    write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(2**18) % 397)
    config = load_recipe(recipe).config(**NARROW, data_path=str(tmp_path), optimizer_graph=graph)
    device = torch.device("cuda")
    backends = all_kernels() if kernels else "torch"
    with dispatch.forced(backends):
        model = GPT(config).to(device)
        use_attention(model, choose_attention(config, device, 4).name)
        optimizers = build_optimizers(model, config)
        assert optimizers.graph.on == (graph == "on" or "muon_step=triton" in backends)
        average = EMA(model, 0.99)
        loss_of = compiled_loss(model, config, device)
        loader = Dataset(config).loader(Ranks(device=device))
        clock = WallClock(1000.0, device=device)
        forms = sorted({False, bool(config.recur_layers)})

        def steps(count: int) -> list[torch.Tensor]:
            losses = []
            for recurrence in forms * count:
                losses.append(training_step(optimizers, loss_of, loader, recurrence, 1.0, 0.95))
                average.update()
                assert not clock.tick()
            return losses

        clock.resume()
        first = steps(3)[0]
        torch._dynamo.config.error_on_recompile = True
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = steps(5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch._dynamo.config.error_on_recompile = False
    assert all(bool(loss.isfinite()) for loss in losses)
    assert losses[-1] < first

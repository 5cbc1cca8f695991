"""A compiled training step on a CPU: one graph for each form of recurrence, and nothing compiled behind the first steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train.common.distributed import MICRO_BATCHES, Ranks
from train.data.dataset import Dataset
from train.data.shards import write_shard
from train.evaluate.scoring import flat_evaluation
from train.loop import training_step
from train.model.compile import compiled_loss
from train.model.gpt import GPT
from train.optimize.averaging import EMA
from train.optimize.groups import build_optimizers
from train.recipes import load_recipe

CPU = torch.device("cpu")
NARROW = {
    "num_layers": 4, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "vocab_size": 260, "train_seq_len": 16,
    "train_batch_tokens": MICRO_BATCHES * 2 * 16,
    "compile": "on", "device": "cpu",
}  # fmt: skip
REPEATING = {"xsa_last_n": 4, "ve_layers": (3,), "recur_layers": (1,), "parallel_start_layer": 2}
RECIPES = {"sp2048_normuon": {}, "sp4096_recurrence": REPEATING, "sp8192_sdclip": REPEATING}


class Bytes:
    def count(self, previous: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(target)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_compiled_behind_the_first_steps(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = (np.arange(2**14) % 251).astype(np.uint16)
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    config = load_recipe(recipe).config(**NARROW | RECIPES[recipe], data_path=str(tmp_path))
    compiled: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    compiler = torch.compile

    # whether anything is compiled is Dynamo's decision, and Inductor would ask a C++ compiler
    def traced(function: object, *, dynamic: bool, fullgraph: bool, options: object = None) -> object:
        return compiler(function, dynamic=dynamic, fullgraph=fullgraph, backend=look)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(config)
    optimizers, average = build_optimizers(model, config), EMA(model, 0.99)
    loss_of, loader, ranks = compiled_loss(model, config, CPU), Dataset(config).loader(Ranks()), Ranks()
    forms = sorted({False, bool(config.recur_layers)})

    def step(recurrence: bool, number: int) -> None:
        training_step(optimizers, loss_of, loader, ranks, recurrence, 1 - number / 10, 0.9 + number / 100)
        average.update()

    def validate(recurrence: bool) -> None:
        flat_evaluation(model, tokens[:97], Bytes(), config, recurrence=recurrence)

    for recurrence in forms:
        step(recurrence, 0)
    assert len(compiled) == len(forms)
    validate(False)
    behind = len(compiled)
    for number, recurrence in enumerate(forms * 3):
        step(recurrence, number)
    validate(False)
    step(False, 8)
    assert len(compiled) == behind

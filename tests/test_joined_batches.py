"""Micro-batches that run as one batch: the same tokens in the same order, and the same mean loss and gradients."""

from __future__ import annotations

import pytest
import torch
from model_systems import SHALLOW, narrow_config, random_ids, random_model

from train.data.loaders import CPU_BATCH_TOKENS, Batch, join_micro_batches
from train.loop import training_step
from train.optimize.groups import Optimizers


class MicroBatches:
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def next_batch(self) -> list[Batch]:
        return self.batches


class Keeping(Optimizers):
    """Keeps the gradients and changes no weight."""

    def __init__(self) -> None:
        pass

    def step(self, lr_scale: float, momentum: float) -> None:
        pass

    def zero_grad(self) -> None:
        pass


@pytest.mark.parametrize("system", ["sp1024", "sp8192"])
def test_one_batch_has_the_mean_loss_and_gradients_of_its_micro_batches(system: str) -> None:
    config = narrow_config(system, **SHALLOW[system], document_masking=True)
    model = random_model(config)
    rows = [random_ids(config, rows=3, length=17, seed=seed) for seed in range(4)]
    batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted, sums = 0.0, [torch.zeros_like(parameter) for parameter in trained]
    for inputs, targets in batches:
        loss = model(inputs, targets, recurrence=bool(config.recur_layers))
        wanted += loss.item() / 4
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        sums = [s if g is None else s + g / 4 for s, g in zip(sums, gradients, strict=True)]
    assert len(join_micro_batches(batches)) == 1
    loss = training_step(Keeping(), model, MicroBatches(batches), bool(config.recur_layers), 1.0, 0.9)
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    torch.testing.assert_close(found, sums, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (CPU_BATCH_TOKENS // 8, [8]),
        (CPU_BATCH_TOKENS // 8 + 1, [4, 4]),
        (CPU_BATCH_TOKENS // 3, [2, 2, 2, 2]),
        (CPU_BATCH_TOKENS // 2 + 1, [1] * 8),
        (2 * CPU_BATCH_TOKENS, [1] * 8),
    ],
)
def test_a_batch_holds_whole_micro_batches_in_order(tokens: int, sizes: list[int]) -> None:
    micro = [(torch.full((1, tokens), number), torch.full((1, tokens), -number)) for number in range(8)]
    joined = join_micro_batches(micro)
    assert [len(inputs) for inputs, _ in joined] == sizes
    assert [int(row[0]) for inputs, _ in joined for row in inputs] == list(range(8))
    assert [-int(row[0]) for _, targets in joined for row in targets] == list(range(8))


def test_a_gpu_runs_the_published_micro_batches() -> None:
    micro = [(torch.empty(1, 8, device="meta"),) * 2] * 8
    assert join_micro_batches(micro) is micro

"""train/model/compile.py with the recipes: how many graphs a run needs, and what is part of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from model_systems import SHALLOW, block_matrices
from recipe_training import Training, narrow_recipe, write_tokens
from torch import Tensor

from train.evaluate.scoring import flat_evaluation
from train.loop import warm_up
from train.model.compile import compiled_loss


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[torch.fx.GraphModule]]:
    """The forward graphs that torch.compile makes, run as they are (Inductor would add minutes and change nothing here)."""
    found: list[torch.fx.GraphModule] = []
    backend = torch._dynamo.lookup_backend(getattr(request, "param", "aot_eager"))

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(graph)
        return backend(graph, inputs)

    torch._dynamo.reset()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, backend=keep, **options))
    yield found
    torch._dynamo.reset()


# what makes a graph anew are Dynamo's guards, whoever runs it
@pytest.mark.parametrize("graphs", ["eager"], indirect=True)
@pytest.mark.parametrize(
    ("name", "system", "graphs_needed"),
    [
        ("sp2048_normuon", "sp2048", 1),
        ("sp4096_recurrence", "sp4096", 2),
        ("sp8192_frontier", "frontier", 4),
    ],
)
def test_nothing_is_compiled_after_the_warm_up(
    name: str, system: str, graphs_needed: int, tokens: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    class Silent:
        def line(self, text: str) -> None: ...

        def warmup_step(self, step: int, total: int, note: str = "") -> None: ...

    schedule = {"warmup_steps": 1, "iterations": 8, "recur_start_step": 4, "warmdown_iters": 4}
    run = Training.begin(narrow_recipe(name, tokens, compile="on", **schedule, **SHALLOW[system]))
    run.loss_of = compiled_loss(run.model, run.config, torch.device("cpu"))
    before = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    warm_up(run.model, run.optimizers, run.loss_of, run.loader, run.config, Silent())  # type: ignore[arg-type]
    assert len(graphs) == graphs_needed
    assert all(torch.equal(tensor, run.model.state_dict()[key]) for key, tensor in before.items())
    run.run(2)
    validated = np.arange(2 * run.config.train_seq_len + 1) % 64
    flat_evaluation(run.model, validated, np.ones(len(validated) - 1, np.uint16), run.config, recurrence=False)
    compiled = len(graphs)
    # recurrence begins in their middle
    run.run(run.config.iterations - 2)
    assert len(graphs) == compiled


@pytest.mark.parametrize("qat", [True, False])
def test_fake_quantization_takes_part_in_the_compiled_step(
    qat: bool, tokens: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    run = Training.begin(narrow_recipe("sp2048_normuon", tokens, compile="on", qat=qat, **SHALLOW["sp2048"]))
    loss_of = compiled_loss(run.model, run.config, torch.device("cpu"))
    inputs, targets = run.loader.next_batch()[0]
    weight = run.model.blocks[0].mlp.up
    with torch.no_grad():
        for parameter in block_matrices(run.model).values():
            parameter.normal_(std=0.1)
    step = weight.detach().abs().amax(dim=1) / 31
    # a twentieth of a step moves weights that lie in the middle of their cells, but not their codes
    offset = (weight.detach() / step[:, None]).frac().abs()
    middle = (offset < 0.3) & (weight.detach().abs() < 10 * step[:, None])
    assert middle.sum() > 1000
    losses, gradients = [], []
    for shift in (0.0, 0.05):
        with torch.no_grad():
            weight += shift * step[:, None] * middle
        run.optimizers.zero_grad()
        loss = loss_of(inputs, targets, recurrence=False)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(weight.grad.clone())
    assert (losses[0] == losses[1]) is qat
    assert torch.equal(gradients[0], gradients[1]) is qat
    assert gradients[0].abs().sum() > 0

"""Every recipe as a narrow copy: same code, small widths, made tokens; training, resumption, ranks, compilation."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from model_systems import block_matrices
from recipe_training import SEQ_LEN, STEPS, Training, narrow_recipe, write_tokens
from torch import Tensor

from train.checkpoint import load_checkpoint, save_checkpoint
from train.common.distributed import Ranks
from train.model.compile import compiled_loss
from train.model.gpt import GPT
from train.model.parameters import classify
from train.optimize.groups import build_optimizers
from train.recipes import recipe_names

# a whole schedule in fewer steps, where graphs are counted: constant, recurrent, falling, averaged
SHORT = {"iterations": 8, "recur_start_step": 4, "warmdown_iters": 4}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def runs(tokens: Path) -> dict[str, Training]:
    return {}


def finished(runs: dict[str, Training], name: str, tokens: Path) -> Training:
    """One uninterrupted run per recipe, shared by the tests."""
    if name not in runs:
        runs[name] = Training.begin(narrow_recipe(name, tokens))
        runs[name].losses = runs[name].run(STEPS)  # type: ignore[attr-defined]
    return runs[name]


@pytest.mark.parametrize("name", recipe_names())
def test_the_loss_begins_at_ln_vocab(name: str, tokens: Path) -> None:
    config = narrow_recipe(name, tokens)
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (64, SEQ_LEN + 1))
    loss = GPT(config).loss(ids[:, :-1], ids[:, 1:], recurrence=False)
    assert float(loss.detach()) == pytest.approx(math.log(config.vocab_size), abs=0.012)


@pytest.mark.parametrize("name", recipe_names())
def test_training_lowers_the_loss(name: str, runs: dict[str, Training], tokens: Path) -> None:
    losses = finished(runs, name, tokens).losses  # type: ignore[attr-defined]
    assert np.mean(losses[-3:]) < losses[0] - 0.3


@pytest.mark.parametrize("name", recipe_names())
def test_a_resumed_run_is_bit_equal(name: str, runs: dict[str, Training], tokens: Path, tmp_path: Path) -> None:
    expected = finished(runs, name, tokens).weights()
    stop = random.randrange(1, STEPS)
    print(f"killed after step {stop}")
    first = Training.begin(narrow_recipe(name, tokens))
    first.run(stop)
    save_checkpoint(tmp_path / "checkpoint.pt", first.parts, Ranks(), {"step": stop})
    second = Training.begin(narrow_recipe(name, tokens, seed=first.config.seed))
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.fill_(math.nan)
    second.step = load_checkpoint(tmp_path / "checkpoint.pt", second.parts, Ranks())["step"]
    second.run(STEPS)
    found = second.weights()
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert different == []


@pytest.mark.parametrize("name", ["sp4096_recurrence"])
def test_untrained_vectors_stay_and_trained_ones_move(name: str, runs: dict[str, Training], tokens: Path) -> None:
    run = finished(runs, name, tokens)
    torch.manual_seed(run.config.seed)
    start = GPT(run.config).state_dict()
    moved = {key for key, tensor in run.model.state_dict().items() if not torch.equal(tensor, start[key])}
    assert set(start) - moved == {"recur_scales"}
    assert torch.all(start["recur_scales"] == 0.5)


def test_dead_skips_of_sdclip_get_no_gradient(tokens: Path) -> None:
    run = Training.begin(narrow_recipe("sp8192_sdclip", tokens))
    inputs, targets = run.loader.next_batch()[0]
    for recurrence, dead in ((False, [3, 4]), (True, [4])):
        # zero-initialized projections hide the skips, so give every weight some size
        torch.manual_seed(1)
        for parameter in run.model.parameters():
            parameter.data.normal_(std=0.1)
        run.optimizers.zero_grad()
        run.model.loss(inputs, targets, recurrence=recurrence).backward()
        for key in ("skips.weights", "skips.gates"):
            sizes = dict(run.model.named_parameters())[key].grad.abs().sum(dim=1)
            assert [row for row, size in enumerate(sizes) if size == 0] == dead


RANK_SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = ["tests/helpers"]
from recipe_training import STEPS, Training, narrow_recipe
from train.common.distributed import start_ranks
from train.recipes import recipe_names
torch.set_num_threads(1)
with start_ranks("cpu") as ranks:
    for name in recipe_names():
        run = Training.begin(narrow_recipe(name, Path(sys.argv[1])), ranks, double=True)
        run.run(STEPS)
        torch.save(run.weights(), f"{sys.argv[2]}/{name}.{ranks.rank}.pt")
"""


def test_two_ranks_give_the_weights_of_one(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    result = subprocess.run(
        [*command, tmp_path / "ranks.py", tokens, tmp_path], env=environ, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    for name in recipe_names():
        one = Training.begin(narrow_recipe(name, tokens), double=True)
        one.run(STEPS)
        ranks = [torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for rank in range(2)]
        for key, tensor in one.weights().items():
            assert torch.equal(ranks[0][key], ranks[1][key]), (name, key)
            # in float64, as a fake-quantized weight that rounds the other way is no error of the reduction
            torch.testing.assert_close(
                ranks[0][key], tensor, rtol=0, atol=1e-9, msg=lambda m, k=f"{name} {key}": f"{k}: {m}"
            )


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
@pytest.mark.parametrize("name", ["sp4096_recurrence", "sp8192_sdclip"])
def test_nothing_is_compiled_after_the_warm_up(name: str, tokens: Path, graphs: list[torch.fx.GraphModule]) -> None:
    from train.loop import warm_up

    class Silent:
        def warmup_step(self, step: int, total: int, note: str = "") -> None: ...

    run = Training.begin(narrow_recipe(name, tokens, compile="on", warmup_steps=1, **SHORT))
    run.loss_of = compiled_loss(run.model, run.config, torch.device("cpu"))
    before = run.weights()
    warm_up(run.model, run.optimizers, run.loss_of, run.loader, run.config, run.ranks, Silent())  # type: ignore[arg-type]
    assert len(graphs) == 2
    assert all(
        torch.equal(tensor, run.model.state_dict()[key]) for key, tensor in before.items() if "average" not in key
    )
    # recurrence begins in their middle
    run.run(run.config.iterations)
    assert len(graphs) == 2


@pytest.mark.parametrize("qat", [True, False])
def test_fake_quantization_takes_part_in_the_compiled_step(
    qat: bool, tokens: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    run = Training.begin(narrow_recipe("sp2048_normuon", tokens, compile="on", qat=qat))
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


@pytest.mark.parametrize("name", recipe_names())
def test_every_trained_parameter_has_an_optimizer(name: str, tokens: Path) -> None:
    config = narrow_recipe(name, tokens)
    model = GPT(config)
    optimizers = build_optimizers(model, config)
    held = [
        id(p)
        for optimizer in (optimizers.muon, optimizers.adamw)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(held) == len(set(held))
    missing = {key for key, parameter in model.named_parameters() if id(parameter) not in held}
    assert missing == ({"recur_scales"} if config.recur_scale_params else set())
    muon = {id(p) for group in optimizers.muon.param_groups for p in group["params"]}
    kinds = {key: classify(key, config) for key, _ in model.named_parameters()}
    assert {key for key, p in model.named_parameters() if id(p) in muon} == {
        key for key, kind in kinds.items() if kind == "matrix"
    }

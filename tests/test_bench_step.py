"""The step benchmark: the plain step equals the trainer's, and a wrong way is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_step, common
from benchmarks.bench_step import MadeTokens, StepVariant, make_variants, measure_steps
from benchmarks.published import quintic
from train.config import Config
from train.recipes import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# widths at which 8 ranks still find matrices to share; EMA and clipping as in the recipe
NARROW = {
    "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "vocab_size": 300, "train_seq_len": 32, "bigram_dim": 8, "compile": "off",
    "train_batch_tokens": 8 * 2 * 32, "compute_dtype": "float32", "device": "cpu", "embed_dtype": "float32",
}  # fmt: skip

SHALLOW = NARROW | {
    "num_layers": 3,
    "recur_layers": (1,),
    "parallel_start_layer": 2,
    "ve_layers": (2,),
    "xsa_last_n": 3,
}


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("recurrence", [False, True])
def test_the_plain_step_and_the_trainers_step_train_alike(recipe: str, recurrence: bool) -> None:
    config = load_recipe(recipe).config(**NARROW)
    if recurrence and not config.recur_layers:
        pytest.skip("this recipe repeats no layer")
    plain, ours = make_variants(config, ["published", "torch"], CPU, 2)
    # the scripts' bfloat16 is another rounding of the same step
    plain.step.muon.dtype = torch.float32
    tokens = MadeTokens(config, 2)
    curves: list[tuple[float, float]] = []
    for _ in range(4):
        batch = tokens.next()
        curves.append(tuple(float(variant.run(batch, recurrence)) for variant in (plain, ours)))
    first, second = np.array(curves).T
    assert first[0] == pytest.approx(np.log(300), abs=0.15)
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert abs(first[-1] - first[0]) > 0.1


def curve(variant: StepVariant, config: Config, steps: int, smooth: int = 20) -> np.ndarray:
    """The loss after steps on the same tokens for every variant, smoothed over some of them."""
    tokens = MadeTokens(config, 2)
    losses = [float(variant.run(tokens.next(), bool(config.recur_layers))) for _ in range(steps)]
    return np.convolve(losses, np.ones(smooth) / smooth, "valid")


def test_loss_curves_of_300_steps_lie_within_the_spread_of_seeds() -> None:
    first = load_recipe("sp8192_sdclip").config(**SHALLOW, matrix_lr=0.005, seed=1)
    # the scripts' way with its bfloat16 orthogonalization, from three starts
    seeds = [first.replace(seed=seed) for seed in (1, 2, 3)]
    plain = np.stack([curve(make_variants(config, ["published"], CPU, 2)[0], config, 300) for config in seeds])
    ours = curve(make_variants(first, ["torch"], CPU, 2)[0], first, 300)
    spread = np.abs(plain[1:] - plain[0]).max(axis=0)
    distance = np.abs(ours - plain[0])
    assert plain[0][0] - plain[0][-1] > 0.5
    assert distance.mean() < spread.mean() and distance[-50:].mean() < spread[-50:].mean()


def test_kernels_in_the_interpreter_train_like_the_reference() -> None:
    config = load_recipe("sp8192_sdclip").config(**SHALLOW, matrix_lr=0.005)
    assert "leaky_relu2_mlp=triton" in bench_step.all_kernels()
    curves = [curve(variant, config, 8, smooth=1) for variant in make_variants(config, ["torch", "golf"], CPU, 2)]
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert not np.array_equal(*curves)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 32)])
def test_the_plain_orthogonalization_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(quintic(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 5).float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25


def test_a_way_whose_loss_leaves_the_published_one_is_refused() -> None:
    config = load_recipe("quickstart").config(**NARROW)
    ways = [
        StepVariant(name, "torch", lambda *_, loss=loss: torch.tensor(loss)) for name, loss in (("a", 5.0), ("b", 5.2))
    ]
    with pytest.raises(common.CheckFailed, match=r"b: mean loss 5\.2000, a has 5\.0000"):
        measure_steps(ways, MadeTokens(config, 2), False, common.Clock(CPU, rounds=1), 2)
    assert not ways[0].times_ms


def test_made_tokens_are_the_same_for_every_way_and_inside_the_vocabulary() -> None:
    config = load_recipe("quickstart").config(**NARROW)
    batches = [MadeTokens(config, 2).next() for _ in range(2)]
    assert np.array_equal(*batches) and batches[0].shape == (2, 33) and batches[0].max() < 300


def test_the_share_is_an_eighth_of_the_work() -> None:
    config = load_recipe("sp8192_sdclip").config(**NARROW)
    plain, _ = make_variants(config, ["published", "torch"], CPU, 2)
    count = sum(len(bank) for bank in plain.step.muon.banks)
    # 66 matrices of the layers and the value embedding's projection
    assert 67 / 8 - 6 < count < 67 / 8 + 6


def test_the_command_prints_a_table_and_keeps_nothing_from_a_cpu(tmp_path: Path) -> None:
    # without the interpreter, in which one step of the kernels takes seconds
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = "-m benchmarks.bench_step --tiny --device cpu --rounds 1 --warmup-ms 1 --warmup-steps 1 --recipe quickstart --ways published,golf"
    result = subprocess.run(
        [sys.executable, *command.split(), "--profile", str(tmp_path)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "before recurrence, on cpu" in result.stdout and "after recurrence, on cpu" in result.stdout
    for way in ("published", "golf"):
        assert f"\n{way} " in result.stdout
        assert (tmp_path / f"quickstart_after_{way}.json.gz").stat().st_size > 1000
    assert "not kept" in result.stdout


def test_an_unknown_inductor_switch_is_named() -> None:
    with pytest.raises(SystemExit, match="has no switch 'no_such_thing'"):
        bench_step.set_inductor("no_such_thing", "1")

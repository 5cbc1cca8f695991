"""Loss curves with and without a kernel: what lies within the spread of seeds, and what does not."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_loss_curves as bench
from benchmarks.measure import step_variants
from benchmarks.measure.tokens import MadeTokens
from train.config import Config
from train.recipes import load_recipe

COMMAND = ["--tiny", "--device", "cpu", "--recipe", "quickstart", "--seeds", "2", "--steps", "4"]
NARROW = {
    "model_dim": 32, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "vocab_size": 300, "train_seq_len": 32, "bigram_dim": 8,
    "recur_layers": (1,), "parallel_start_layer": 2, "ve_layers": (2,), "xsa_last_n": 3, "train_batch_tokens": 8 * 2 * 32,
    "compile": "off", "embed_dtype": "float32", "device": "cpu", "matrix_lr": 0.005,
}  # fmt: skip


def trained(config: Config, name: str, steps: int) -> np.ndarray:
    return bench.train(config, name, MadeTokens(config), steps, torch.device("cpu"))


@pytest.fixture(scope="module")
def config() -> Config:
    return load_recipe("sp8192_sdclip").config(**NARROW)


@pytest.fixture(scope="module")
def seeds(config: Config) -> list[np.ndarray]:
    return [trained(config.replace(seed=config.seed + number), "torch", 300) for number in range(3)]


def test_loss_curves_of_300_steps_lie_within_the_spread_of_seeds(config: Config, seeds: list[np.ndarray]) -> None:
    # the scripts' step, with its bfloat16 orthogonalization
    published = trained(config, "published", 300)
    distances, spread = bench.compare(seeds, {"published": published})
    assert 0 < distances["published"] < spread < 0.1
    # log 300 is 5.7
    for curve in (*seeds, published):
        assert curve[:5].mean() > 5 and curve[-20:].mean() < 3.2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of a CPU run in Triton's interpreter")
def test_loss_curves_of_300_steps_of_all_kernels_lie_within_the_spread_of_seeds(config: Config) -> None:
    narrower = config.replace(num_layers=2, parallel_start_layer=1, ve_layers=(1,), xsa_last_n=2, recur_layers=())
    assert set(step_variants.step_kernels()) == set(step_variants.kernel_problems())
    three = [trained(narrower.replace(seed=config.seed + number), "torch", 300) for number in range(3)]
    golf = trained(narrower, "golf", 300)
    distances, spread = bench.compare(three, {"golf": golf, "published": trained(narrower, "published", 300)})
    # sums in another order: 0 would be PyTorch's operators under another name
    assert 0 < distances["golf"] < spread / 10 and distances["published"] < spread < 0.1
    assert golf[:5].mean() > 5 and golf[-20:].mean() < 3.2


@pytest.mark.parametrize("wrong", [{"matrix_lr": 0.0}, {"matrix_lr": 0.0025}, "negated"])
def test_a_wrong_step_of_the_matrices_leaves_the_spread_of_seeds(
    wrong: dict[str, float] | str, config: Config, seeds: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = step_variants.build_optimizers

    def negated(*given: object, **named: object) -> object:
        optimizers = build(*given, **named)
        optimizers.muon.param_groups[0]["base_lr"] *= -1
        return optimizers

    if wrong == "negated":
        monkeypatch.setattr(step_variants, "build_optimizers", negated)
    changed = config if wrong == "negated" else config.replace(**wrong)
    distances, spread = bench.compare([curve[:100] for curve in seeds], {"wrong": trained(changed, "torch", 100)})
    assert distances["wrong"] > 2 * spread


def test_all_matrices_move(config: Config) -> None:
    for name in ("published", "torch"):
        (variant,) = step_variants.make_variants(config, [name], torch.device("cpu"), whole=True)
        tokens, before = MadeTokens(config), [matrix.detach().clone() for matrix in variant.weights["matrix"]]
        for _ in range(2):
            variant.run(tokens.next(), True)
        assert all(not torch.equal(*pair) for pair in zip(before, variant.weights["matrix"], strict=True))


def test_a_variant_is_trained_beside_seeds_on_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the same variant by another name has the same curve, to the last bit
    assert bench.main([*COMMAND, "--variants", "torch,xsa=torch", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "distance 0.00000 nats, within the spread of seeds" in printed and "not stored" in printed
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    first, other = (np.array([float(row[f"torch, seed {seed}"]) for row in rows]) for seed in (1337, 1338))
    assert abs(first[0] - np.log(512)) < 0.3 and not np.array_equal(first, other)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_variant_that_trains_otherwise_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = {("torch", 1337): [6.0, 5.0], ("torch", 1338): [6.1, 5.1], ("golf", 1337): [6.0, 5.4]}
    monkeypatch.setattr(bench, "train", lambda config, name, *_: np.array(curves[name, config.seed]))
    assert bench.main([*COMMAND[:-1], "2", "--variants", "torch,golf"]) == 1
    assert (
        "golf: 6.0000 to 5.4000 (torch: 6.0000 to 5.0000), distance 0.20000 nats, NOT within" in capsys.readouterr().out
    )
    monkeypatch.setitem(curves, ("golf", 1337), [6.0, 5.1])
    assert bench.main([*COMMAND[:-1], "2", "--variants", "torch,golf"]) == 0
    monkeypatch.setitem(curves, ("golf", 1337), [6.0, float("nan")])
    assert bench.main([*COMMAND[:-1], "2", "--variants", "torch,golf"]) == 1


def test_distances_by_hand() -> None:
    ramp = np.arange(40.0)
    # averages over 20 steps of curves that are a constant apart
    found, spread = bench.compare([ramp, ramp + 0.5, ramp - 1.0], {"other": ramp + 0.25})
    assert found == {"other": pytest.approx(0.25)} and spread == pytest.approx((0.5 + 1.0 + 1.5) / 3)


def test_rows_of_a_gpu_are_kept_under_their_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.common, "ROOT", tmp_path)
    monkeypatch.setattr(bench.common, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.common, "environment", lambda device: {"gpu": "NVIDIA H100", "commit": "c"})
    monkeypatch.setattr(bench, "train", lambda config, name, *_: np.array([6.0, config.seed % 7]))
    command = ["--device", "cpu", "--steps", "2", "--variants", "torch,golf"]
    for _ in range(2):
        assert bench.main(command) == 0
    assert "-> curves/NVIDIA_H100.csv" in capsys.readouterr().out
    header, *rows = csv.reader((tmp_path / "curves" / "NVIDIA_H100.csv").open())
    assert header == list(bench.COLUMNS) and len(rows) == 2
    assert dict(zip(header, rows[0], strict=True))["variant"] == "golf"
    bench.main([*command, "--tiny"])
    assert "not stored" in capsys.readouterr().out


def test_a_variant_beside_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([*COMMAND, "--variants", "torch"])
    assert ended.value.code == 2 and "--variants: expected another one to compare torch with" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--steps", "1"]])
def test_a_single_curve_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--tiny", "--device", "cpu", *arguments])
    assert "expected at least 2 of each" in capsys.readouterr().err

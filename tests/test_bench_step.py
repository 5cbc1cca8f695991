"""The step benchmark: the plain step equals the trainer's, and a wrong way is refused."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_loss_curves, bench_step, common
from benchmarks.bench_step import Bench, measure_steps
from benchmarks.published import quintic
from benchmarks.ways import MadeTokens, ShardTokens, StepVariant, all_kernels, make_variants
from train.config import Config
from train.data.shards import write_shard
from train.errors import UserError
from train.model.attention import Attention
from train.model.gpt import GPT
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
    plain, ours = make_variants(config, ["published", "torch"], CPU)
    # the scripts' bfloat16 is another rounding of the same step
    plain.step.muon.dtype = torch.float32
    tokens = MadeTokens(config)
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
    tokens = MadeTokens(config)
    losses = [float(variant.run(tokens.next(), bool(config.recur_layers))) for _ in range(steps)]
    return np.convolve(losses, np.ones(smooth) / smooth, "valid")


def test_loss_curves_of_300_steps_lie_within_the_spread_of_seeds() -> None:
    first = load_recipe("sp8192_sdclip").config(**SHALLOW, matrix_lr=0.005, seed=1)
    # the scripts' way with its bfloat16 orthogonalization, from three starts
    seeds = [first.replace(seed=seed) for seed in (1, 2, 3)]
    plain = np.stack([curve(make_variants(config, ["published"], CPU)[0], config, 300) for config in seeds])
    ours = curve(make_variants(first, ["torch"], CPU)[0], first, 300)
    spread = np.abs(plain[1:] - plain[0]).max(axis=0)
    distance = np.abs(ours - plain[0])
    assert plain[0][0] - plain[0][-1] > 0.5
    assert distance.mean() < spread.mean() and distance[-50:].mean() < spread[-50:].mean()


def test_kernels_in_the_interpreter_train_like_the_reference() -> None:
    config = load_recipe("sp8192_sdclip").config(**SHALLOW, matrix_lr=0.005)
    assert "leaky_relu2_mlp=triton" in all_kernels()
    curves = [curve(variant, config, 8, smooth=1) for variant in make_variants(config, ["torch", "golf"], CPU)]
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert not np.array_equal(*curves)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 32)])
def test_the_plain_orthogonalization_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(quintic(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 5).float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25


def made_bench(rounds: int = 2) -> Bench:
    config = load_recipe("quickstart").config(**NARROW)
    return Bench(config, common.Clock(CPU, rounds=rounds), common.Ceilings(1.0, 1.0), {}, 2, None, False)


def made_way(name: str, loss: float, fails_at: int = -1) -> StepVariant:
    calls = []

    def step(*_: object) -> torch.Tensor:
        calls.append(name)
        if len(calls) == fails_at:
            raise RuntimeError(f"no {name}\nand more")
        return torch.tensor(loss)

    return StepVariant(name, "torch", step)


def test_a_way_that_fails_or_whose_loss_leaves_the_first_ones_has_no_time_and_the_others_have() -> None:
    ways = [made_way("a", 5.0), made_way("b", 5.2), made_way("c", 5.0, fails_at=2), made_way("d", 5.05)]
    errors, problems = measure_steps(ways, made_bench(rounds=3), recurrence=False)
    assert errors == pytest.approx({"a": 0.0, "d": 0.01}, abs=1e-6)
    assert sorted(problems) == ["b: mean loss 5.2000, a has 5.0000", "c: RuntimeError: no c"]
    assert [len(way.times_ms) for way in ways] == [3, 0, 0, 3]


def test_a_way_is_warmed_up_once_and_timed_anew_beside_each_other() -> None:
    losses = iter([5.0, 5.0, *[1.0] * 50])
    base = StepVariant("base", "torch", lambda *_: torch.tensor(next(losses)))
    for name in ("one", "two"):
        errors, problems = measure_steps([base, made_way(name, 5.0)], made_bench(), recurrence=False)
        assert errors == {"base": 0.0, name: 0.0} and problems == [] and len(base.times_ms) == 2


def test_each_switch_is_measured_beside_the_way_without_it_and_kept_before_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, stored = [], []

    def make(config: Config, names: list[str], *_: object) -> list[StepVariant]:
        made.extend(names)
        return [made_way(names[0], 5.0, fails_at=1 if "combo" in names[0] else -1)]

    bench = made_bench()
    bench.surroundings |= {"gpu": "Made GPU", "commit": "aaaaaaa"}
    monkeypatch.setattr(bench_step, "make_variants", make)
    monkeypatch.setattr(bench.clock, "once_ms", lambda run: (run(), 1.0 if "mix" in made[-1] else 2.0)[1])
    monkeypatch.setattr(Bench, "store", lambda self, rows: stored.append([row["impl"] for row in rows]))
    assert not bench_step.measure_pairs("torch", ["torch+mix_order_reduction_off", "torch+combo_kernels"], bench, False)
    assert made == ["torch", "torch+mix_order_reduction_off", "torch+combo_kernels"]
    assert stored == [["torch", "torch+mix_order_reduction_off"]]
    printed = capsys.readouterr().out
    assert (
        re.search(r"^torch\+mix_order_reduction_off +1\.00 → +1\.00 ", printed, re.MULTILINE)
        and "within the spread" in printed
    )
    assert "FAILED torch+combo_kernels: RuntimeError: no torch+combo_kernels" in printed


def test_a_switch_that_wins_is_offered_with_its_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = made_bench()
    bench.keep, bench.surroundings = True, {"gpu": "Made GPU", "commit": "aaaaaaa"}
    monkeypatch.setattr(Bench, "store", lambda *_: None)
    times = {"torch": 2.0, "torch+pdl": 1.0}
    current = []

    def make(config: Config, names: list[str], *_: object) -> list[StepVariant]:
        way = made_way(names[0], 5.0)
        step = way.step
        way.step = lambda *given: (current.append(way.name), step(*given))[1]
        return [way]

    monkeypatch.setattr(bench_step, "make_variants", make)
    monkeypatch.setattr(bench.clock, "once_ms", lambda run: (run(), times[current[-1]])[1])
    assert bench_step.measure_pairs("torch", ["torch+pdl"], bench, False)
    printed = capsys.readouterr().out
    assert "-50.0%  faster" in printed
    assert "figure='Made GPU, aaaaaaa, quickstart before recurrence: 2.00 to 1.00 ms per step'" in printed


def test_a_kernel_is_switched_with_its_backward_pass() -> None:
    found = bench_step.step_kernels()
    assert "leaky_relu2_mlp=triton,leaky_relu2_mlp_backward=triton" in found and "muon_step=triton" in found
    names = ",".join(found)
    assert "=cpp" not in names and "window" not in names and not any(name.startswith("xsa_backward") for name in found)


def test_without_a_kernel_that_can_run_its_reason_is_said_and_nothing_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--each-kernel", "--tiny", "--device", "cpu", "--recipe", "quickstart"]
    monkeypatch.setattr(bench_step, "choose_attention", None)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "error: --each-kernel: no kernel of a training step can run here: PyTorch finds no CUDA GPU\n"
    assert bench_step.main(command) == common.NOTHING_TO_RUN
    assert capsys.readouterr().err == said
    # where the operators have several reasons, each is said once
    answers = {"a": {"triton": "no X", "torch": "available"}, "b": {"torch": "available"}, "c": {"triton": "no Y"}}
    answers["d"] = {"triton": "no X"}
    monkeypatch.setattr(bench_step.dispatch, "describe", lambda: answers)
    monkeypatch.setattr(bench_step, "step_kernels", list)
    assert bench_step.main(command) == common.NOTHING_TO_RUN
    assert "can run here: a, d: no X; c: no Y\n" in capsys.readouterr().err


def test_tokens_of_shards_follow_each_other(tmp_path: Path) -> None:
    config = load_recipe("quickstart").config(**NARROW)
    write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(200, dtype=np.uint16) % 300)
    tokens = ShardTokens(config, tmp_path)
    first, second = tokens.next(), tokens.next()
    assert first.shape == (2, 33) and np.array_equal(np.concatenate([first, second]).ravel(), np.arange(132) % 300)


def test_made_tokens_are_the_same_for_every_way_and_inside_the_vocabulary() -> None:
    config = load_recipe("quickstart").config(**NARROW)
    batches = [MadeTokens(config).next() for _ in range(2)]
    assert np.array_equal(*batches) and batches[0].shape == (2, 33) and batches[0].max() < 300


def test_only_the_published_ways_attention_is_the_scripts() -> None:
    config = load_recipe("sp8192_sdclip").config(**SHALLOW)
    (plain,) = make_variants(config, ["published"], CPU)
    assert {part.as_published for part in plain.step.model.modules() if isinstance(part, Attention)} == {True}
    assert {part.as_published for part in GPT(config).modules() if isinstance(part, Attention)} == {False}


def test_the_share_is_an_eighth_of_the_work() -> None:
    config = load_recipe("sp8192_sdclip").config(**NARROW)
    plain, _ = make_variants(config, ["published", "torch"], CPU)
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
        assert (tmp_path / f"quickstart_after_{way}_rank0.json.gz").stat().st_size > 1000
    assert "not kept" in result.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--inductor", "no_such"], "no_such' is no switch"),
        (["--ways", "torch+no_such=1"], "has no switch no_such"),
        (["--inductor", "all", "--inductor", "no_such"], "no_such' is no switch"),
        (["--tiny", "--data", "no_such_folder"], "no_such_folder"),
        (["--warmup-steps", "0"], "--warmup-steps: expected a whole number from 1"),
        (
            ["--recipe", "baseline", "--phase", "after"],
            "--phase after: baseline repeats no layers: expected before or both",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_step.main(["--device", "cpu", "--recipe", "quickstart", "--warmup-ms", "1", "--rounds", "1", *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("way", ["", "foo", "torch+no_such", "published+pdl", "xsa=cuda", "no_such=triton"])
def test_a_way_that_cannot_be_taken_is_refused_before_any_is_measured(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with pytest.raises(UserError, match=rf"--ways: '{re.escape(way)}': expected published, torch, golf or op"):
        bench_loss_curves.main(["--ways", f"torch,{way}", "--device", "cpu", "--out", str(folder)])
    assert not folder.exists()
    with pytest.raises(UserError, match=rf"--ways: '{re.escape(way)}'"):
        make_variants(load_recipe("quickstart").config(), [way], CPU)


@pytest.mark.parametrize(("bench", "flag"), [(bench_step, "--profile"), (bench_loss_curves, "--out")])
def test_a_place_that_is_none_is_found_before_anything_is_measured(
    bench: types.ModuleType, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "make_variants", None)
    with pytest.raises(FileExistsError):
        bench.main(["--ways", "torch", "--device", "cpu", "--tiny", flag, str(tmp_path / "file")])

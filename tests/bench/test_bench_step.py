"""The step benchmark: which variants have a time, what is measured apart, verdicts, and what is refused."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from step_example import NARROW

from benchmarks import bench_loss_curves, bench_step
from benchmarks.measure import common
from benchmarks.measure.step_times import Bench, measure_steps
from benchmarks.measure.step_variants import StepVariant, make_variants
from train.common.errors import UserError
from train.config import Config
from train.recipes import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def made_bench(rounds: int = 2) -> Bench:
    config = load_recipe("quickstart").config(**NARROW)
    return Bench(config, common.Clock(CPU, rounds=rounds), common.Ceilings(1.0, 1.0), {}, 2, None, False)


def made_variant(name: str, loss: float, fails_at: int = -1) -> StepVariant:
    calls = []

    def step(*_: object) -> torch.Tensor:
        calls.append(name)
        if len(calls) == fails_at:
            raise RuntimeError(f"no {name}\nand more")
        return torch.tensor(loss)

    return StepVariant(name, "torch", step)


def test_a_variant_that_fails_or_whose_loss_leaves_the_first_ones_has_no_time_and_the_others_have() -> None:
    variants = [
        made_variant("a", 5.0),
        made_variant("b", 5.2),
        made_variant("c", 5.0, fails_at=2),
        made_variant("d", 5.05),
    ]
    errors, problems = measure_steps(variants, made_bench(rounds=3), recurrence=False)
    assert errors == pytest.approx({"a": 0.0, "d": 0.01}, abs=1e-6)
    assert sorted(problems) == ["b: mean loss 5.2000, a has 5.0000", "c: RuntimeError: no c"]
    assert [len(variant.times_ms) for variant in variants] == [3, 0, 0, 3]


def test_what_a_variant_that_loses_the_device_leaves_to_the_others_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def made(name: str) -> StepVariant:
        def step(*_: object) -> torch.Tensor:
            calls.append(name)
            # two calls each in the warm-up, then one in each of three turns
            if "bad" in calls and calls.count("bad") >= 4:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return torch.tensor(5.0)

        return StepVariant(name, "torch", step)

    variants = [made("a"), made("bad"), made("c")]
    errors, problems = measure_steps(variants, made_bench(rounds=5), recurrence=False)
    # the turns begin with a, bad and c
    assert errors == {"a": 0.0, "c": 0.0} and [len(each.times_ms) for each in variants] == [1, 1, 1]
    assert [problem.partition(":")[0] for problem in problems] == ["bad", "c", "a"]
    assert made_bench().row(variants[0], False, 0.0)["n"] == 1


def test_a_variant_whose_weights_move_otherwise_has_no_time() -> None:
    def moving(name: str, rate: float, average: float) -> StepVariant:
        weights = {"matrix": [torch.ones(2, 3), torch.zeros(2)], "average": [torch.ones(5)], "scalar": []}

        def step(*_: object) -> torch.Tensor:
            weights["matrix"][0].add_(torch.arange(6.0).view(2, 3), alpha=rate)
            weights["average"][0].add_(average)
            return torch.tensor(5.0)

        return StepVariant(name, "torch", step, weights)

    variants = [moving("a", 0.1, 0.5), moving("b", 0.11, 0.45), moving("c", -0.1, 0.5), moving("d", 0.1, 0.0)]
    variants += [moving("e", 0.05, 0.5), moving("f", float("nan"), 0.5)]
    errors, problems = measure_steps(variants, made_bench(), recurrence=False)
    said = {"c": "matrix -1.00", "d": "average 0.00", "e": "matrix 0.50", "f": "matrix nan"}
    assert problems == [
        f"{variant}: its weight update, projected on a's, is not 1: {what}" for variant, what in said.items()
    ]
    assert list(errors) == ["a", "b"] and [len(variant.times_ms) for variant in variants] == [2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_share_whose_muon_turns_around_or_has_no_momentum_is_refused(recipe: str) -> None:
    # in bfloat16 as on a GPU; the losses of a warm-up do not show it
    config = load_recipe(recipe).config(**NARROW | {"device": "cuda"})
    bench = Bench(config, common.Clock(CPU, rounds=1), common.Ceilings(1.0, 1.0), {}, 5, None, False)
    plain, ours, turned, forgetful = make_variants(config, ["published", "torch", "published", "published"], CPU)
    turned.name, forgetful.name = "turned", "forgetful"
    step = turned.step.muon.step
    turned.step.muon.step = lambda rate: step(-rate)
    forgetful.step.muon.config = config.replace(muon_momentum=0.0)
    errors, problems = measure_steps([plain, ours, turned, forgetful], bench, recurrence=False)
    assert set(errors) == {"published", "torch"}
    # without momentum a third of the movement is the same
    for problem, said in zip(problems, ("turned: {} matrix -", "forgetful: {} matrix 0."), strict=True):
        assert problem.startswith(said.format("its weight update, projected on published's, is not 1:"))


def test_a_variant_that_fails_has_no_row_and_the_others_are_compared_with_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = []

    def make(config: Config, names: list[str], *_: object) -> list[StepVariant]:
        return [made_variant(name, 5.0, fails_at=1 if name == "xsa=triton" else -1) for name in names]

    bench = made_bench(rounds=3)
    bench.surroundings |= {"gpu": "Made GPU", "commit": "aaaaaaa"}
    monkeypatch.setattr(bench_step, "make_variants", make)
    monkeypatch.setattr(bench.clock, "once_ms", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(Bench, "store", lambda self, rows: stored.append([row["impl"] for row in rows]))
    assert bench_step.measure_phase(["torch", "muon_step=triton"], bench, False, None)
    assert not bench_step.measure_phase(["torch", "xsa=triton", "golf"], bench, False, None)
    assert stored == [["torch", "muon_step=triton"], ["torch", "golf"]]
    printed = capsys.readouterr().out
    lines = re.findall(r"^(\S+) +2\.00 → +2\.00 +\+0\.0%  within the spread$", printed, re.MULTILINE)
    assert lines == ["muon_step=triton", "golf"]
    assert "FAILED xsa=triton: RuntimeError: no xsa=triton\n" in printed


@pytest.mark.parametrize(
    ("times", "rounds", "verdict"),
    [
        ((2.0, 1.998), 2, "too few rounds"),
        ((2.0, 1.998), 3, "faster"),
        ((2.0, 3.0), 3, "SLOWER"),
        ((2.0, 2.0), 3, "within the spread"),
    ],
)
def test_a_verdict_needs_rounds(times: tuple[float, float], rounds: int, verdict: str) -> None:
    before, after = ({"p20": time, "p50": time, "p80": time, "n": rounds} for time in times)
    assert bench_step.verdict_of(before, after) == verdict


def test_the_command_prints_a_table_and_keeps_nothing_from_a_cpu(tmp_path: Path) -> None:
    # without the interpreter, in which one step of the kernels takes seconds
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = "-m benchmarks.bench_step --tiny --device cpu --rounds 1 --warmup-ms 1 --warmup-steps 1 --recipe sp8192_sdclip --variants published,golf"
    result = subprocess.run(
        [sys.executable, *command.split(), "--profile", str(tmp_path)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "step MiB: peak memory of a step above what stays allocated between steps" in result.stdout
    assert "before recurrence, on cpu" in result.stdout and "after recurrence, on cpu" in result.stdout
    for variant in ("published", "golf"):
        rows = [
            line.split() for line in result.stdout.splitlines() if line.startswith(f"{variant} ") and "→" not in line
        ]
        # a tiny step has no speed-up, and a CPU neither a data sheet, GPU time nor its memory
        assert len(rows) == 2 and all(row[5] == "–" and row[7:11] == ["–"] * 4 for row in rows)
        assert (tmp_path / f"sp8192_sdclip_after_{variant}_rank0.json.gz").stat().st_size > 1000
    assert "not stored" in result.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tiny", "--data", "no_such_folder"], "no_such_folder"),
        (
            ["--tiny", "--variants", "torch+optimizer_graph=on"],
            "optimizer_graph: on needs a CUDA GPU, and this run is on cpu",
        ),
        (["--tiny", "--attention", "fa3"], "attention: fa3 cannot run: needs a CUDA GPU; these can: sdpa, math"),
        (["--warmup-steps", "0"], "--warmup-steps: expected a whole number, at least 1"),
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


def test_attention_is_taken_from_the_environment_or_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(config: Config, *_: object) -> None:
        asked.append(config.attention)
        raise UserError("enough")

    monkeypatch.setenv("ATTENTION", "math")
    monkeypatch.setattr(bench_step, "choose_attention", note)
    for given in ([], ["--attention", "sdpa"]):
        with pytest.raises(SystemExit):
            bench_step.main(["--tiny", "--device", "cpu", "--warmup-ms", "1", "--variants", "torch", *given])
    assert asked == ["math", "sdpa"]


@pytest.mark.parametrize(("bench", "flag"), [(bench_step, "--profile"), (bench_loss_curves, "--out")])
def test_a_place_that_is_none_is_found_before_anything_is_measured(
    bench: types.ModuleType, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "make_variants", None)
    with pytest.raises(FileExistsError):
        bench.main(["--variants", "torch,golf", "--device", "cpu", "--tiny", flag, str(tmp_path / "file")])

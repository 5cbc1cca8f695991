"""The step benchmark: the plain step equals the trainer's, and a wrong way is refused."""

import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import bench_loss_curves, bench_step, common, ways
from benchmarks.bench_step import Bench, measure_steps
from benchmarks.published import quintic
from benchmarks.ways import MadeTokens, ShardTokens, StepVariant, all_kernels, make_variants, step_kernels
from golf_kernels import dispatch
from train import loop
from train.config import Config
from train.data.shards import write_shard
from train.errors import UserError
from train.inductor import SWITCHES
from train.model.attention import Attention
from train.model.gpt import GPT
from train.model.mlp import MLP
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
    plain, ours = make_variants(config, ["published", "torch"], CPU, whole=True)
    # the scripts' bfloat16 is another rounding of the same step
    plain.step.muon.dtype = torch.float32
    (first, plain_moved), (second, moved) = (trained(variant, config, 4, recurrence) for variant in (plain, ours))
    assert first[0] == pytest.approx(np.log(300), abs=0.15)
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert abs(first[-1] - first[0]) > 0.1
    assert set(moved) == {"matrix", "embedding", "scalar"} | ({"average"} if config.ema_decay else set())
    # dampened first gradients are so small that the scripts' norm + 1e-7 is another one
    limit = 0.02 if config.normuon else 0.001
    for kind, change in moved.items():
        assert float((change - plain_moved[kind]).norm() / plain_moved[kind].norm()) < limit, kind


def trained(variant: StepVariant, config: Config, steps: int, recurrence: bool) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The losses of some steps on the same tokens for every variant, and how far the weights of each kind moved."""
    tokens, before = MadeTokens(config), variant.flat_weights()
    losses = [float(variant.run(tokens.next(), recurrence)) for _ in range(steps)]
    return np.array(losses), {kind: now - before[kind] for kind, now in variant.flat_weights().items()}


def test_kernels_in_the_interpreter_train_like_the_reference() -> None:
    config = load_recipe("sp8192_sdclip").config(**SHALLOW)
    assert "leaky_relu2_mlp=triton" in all_kernels()
    variants = make_variants(config, ["torch", "golf"], CPU)
    (plain, plain_moved), (ours, moved) = (trained(variant, config, 8, True) for variant in variants)
    np.testing.assert_allclose(plain, ours, rtol=1e-3)
    assert not np.array_equal(plain, ours)
    for kind, change in moved.items():
        assert float((change - plain_moved[kind]).norm() / plain_moved[kind].norm()) < 0.001, kind


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


def test_what_a_way_that_loses_the_device_leaves_to_the_others_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def way(name: str) -> StepVariant:
        def step(*_: object) -> torch.Tensor:
            calls.append(name)
            # two calls each in the warm-up, then one in each of three turns
            if "bad" in calls and calls.count("bad") >= 4:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return torch.tensor(5.0)

        return StepVariant(name, "torch", step)

    ways = [way("a"), way("bad"), way("c")]
    errors, problems = measure_steps(ways, made_bench(rounds=5), recurrence=False)
    # the turns begin with a, bad and c
    assert errors == {"a": 0.0, "c": 0.0} and [len(each.times_ms) for each in ways] == [1, 1, 1]
    assert [problem.partition(":")[0] for problem in problems] == ["bad", "c", "a"]
    assert made_bench().row(ways[0], False, 0.0)["n"] == 1


def test_a_way_whose_weights_move_otherwise_has_no_time() -> None:
    def moving(name: str, rate: float, average: float) -> StepVariant:
        weights = {"matrix": [torch.ones(2, 3), torch.zeros(2)], "average": [torch.ones(5)], "scalar": []}

        def step(*_: object) -> torch.Tensor:
            weights["matrix"][0].add_(torch.arange(6.0).view(2, 3), alpha=rate)
            weights["average"][0].add_(average)
            return torch.tensor(5.0)

        return StepVariant(name, "torch", step, weights)

    ways = [moving("a", 0.1, 0.5), moving("b", 0.11, 0.45), moving("c", -0.1, 0.5), moving("d", 0.1, 0.0)]
    ways += [moving("e", 0.05, 0.5), moving("f", float("nan"), 0.5)]
    errors, problems = measure_steps(ways, made_bench(), recurrence=False)
    said = {"c": "matrix -1.00", "d": "average 0.00", "e": "matrix 0.50", "f": "matrix nan"}
    assert problems == [f"{way}: of the movement of a's weights it repeats: {what}" for way, what in said.items()]
    assert list(errors) == ["a", "b"] and [len(way.times_ms) for way in ways] == [2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_share_whose_muon_turns_around_or_has_no_momentum_is_refused(recipe: str) -> None:
    # in bfloat16 as on a GPU; the losses of a warm-up do not show it
    config = load_recipe(recipe).config(**NARROW | {"compute_dtype": "bfloat16"})
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
        assert problem.startswith(said.format("of the movement of published's weights it repeats:"))


def test_each_candidate_has_a_process_that_may_die_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$*" in
  *--kernel\\ muon_step*) kill -SEGV $$;;
  *--kernel\\ qk_norm_rope*) exec sleep 60;;
  *--kernel\\ xsa*) exit 3;;
  *) echo "$*";;
esac
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(bench_step.sys, "executable", str(python))
    monkeypatch.setattr(bench_step, "choose_attention", None)
    kernels = ["muon_step", "leaky_relu2_mlp", "qk_norm_rope", "xsa", "mix_rms_norm"]
    command = ["--tiny", "--device", "cpu", "--recipe", "quickstart", "--limit-s", "1", "--attention", "sdpa"]
    assert bench_step.main([*command, *(f"--kernel={kernel}" for kernel in kernels), "--data", "here"]) == 1
    said = capfd.readouterr().out
    wanted = (
        "-m benchmarks.bench_step --kernel {} --recipe=quickstart --phase=both --attention=sdpa --device=cpu --rounds=2 "
        "--warmup-ms=1.0 --warmup-steps=10 --data=here --tiny"
    )
    for kernel in ("leaky_relu2_mlp", "mix_rms_norm"):
        assert f"== {kernel}=triton\n{wanted.format(kernel)}\n" in said
    failed = ["muon_step=triton: SIGSEGV", "qk_norm_rope=triton: stopped after 1 s", "xsa=triton: exit code 3"]
    assert said.splitlines()[-3:] == [f"FAILED {problem}" for problem in failed]


def test_each_way_but_the_published_one_is_measured_with_each_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(bench_step, "measure_apart", lambda pairs, _: found.append(pairs))
    bench_step.main(["--tiny", "--device", "cpu", "--inductor", "all", "--ways", "published,torch,xsa=triton"])
    bench_step.main(["--tiny", "--device", "cpu", "--each-kernel"])
    switches, kernels = found
    assert switches["torch+pdl"] == ["--ways", "torch", "--inductor", "pdl"] and "xsa=triton+pdl" in switches
    assert len(switches) == 2 * len(SWITCHES) and kernels["muon_step=triton"] == ["--kernel", "muon_step"]
    assert len(kernels) == len(step_kernels())


def test_a_pair_of_which_one_fails_has_no_row_and_one_that_runs_has_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = []

    def make(config: Config, names: list[str], *_: object) -> list[StepVariant]:
        return [made_way(name, 5.0, fails_at=1 if "combo" in name else -1) for name in names]

    bench = made_bench(rounds=3)
    bench.surroundings |= {"gpu": "Made GPU", "commit": "aaaaaaa"}
    monkeypatch.setattr(bench_step, "make_variants", make)
    monkeypatch.setattr(bench.clock, "once_ms", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(Bench, "store", lambda self, rows: stored.append([row["impl"] for row in rows]))
    assert bench_step.measure_pair("torch", "torch+pdl", bench, False)
    assert not bench_step.measure_pair("torch", "torch+combo_kernels", bench, False)
    assert stored == [["torch", "torch+pdl"]]
    printed = capsys.readouterr().out
    assert re.search(r"^torch\+pdl +2\.00 → +2\.00 +\+0\.0%  within the spread ", printed, re.MULTILINE)
    assert "FAILED torch+combo_kernels: RuntimeError: no torch+combo_kernels" in printed


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


def test_a_switch_that_wins_is_offered_with_its_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = made_bench(rounds=3)
    bench.keep, bench.surroundings = True, {"gpu": "Made GPU", "commit": "aaaaaaa"}
    monkeypatch.setattr(Bench, "store", lambda *_: None)
    times = {"torch": 2.0, "torch+pdl": 1.0}
    current = []

    def make(config: Config, names: list[str], *_: object) -> list[StepVariant]:
        return [
            StepVariant(name, "torch", lambda *_, name=name: (current.append(name), torch.tensor(5.0))[1])
            for name in names
        ]

    monkeypatch.setattr(bench_step, "make_variants", make)
    monkeypatch.setattr(bench.clock, "once_ms", lambda run: (run(), times[current[-1]])[1])
    assert bench_step.measure_pair("torch", "torch+pdl", bench, False)
    printed = capsys.readouterr().out
    assert "-50.0%  faster" in printed
    assert "figure='Made GPU, aaaaaaa, quickstart before recurrence: 2.00 to 1.00 ms per step'" in printed


def test_a_kernel_is_switched_with_its_backward_pass() -> None:
    found = step_kernels()
    assert {"leaky_relu2_mlp", "muon_step"} <= set(found)
    assert not any("backward" in name or "window" in name or "int6" in name for name in found)
    with dispatch.forced("torch,leaky_relu2_mlp=triton"):
        assert [dispatch.choose(f"leaky_relu2_mlp{end}").backend for end in ("", "_backward")] == ["triton", "triton"]
        assert dispatch.choose("muon_step").backend == "torch"


def test_without_a_kernel_that_can_run_its_reason_is_said_and_nothing_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--each-kernel", "--tiny", "--device", "cpu", "--recipe", "quickstart"]
    monkeypatch.setattr(bench_step, "choose_attention", None)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "error: --kernel: no kernel of a training step can run here: PyTorch finds no CUDA GPU\n"
    assert bench_step.main(command) == common.NOTHING_TO_RUN
    assert capsys.readouterr().err == said
    # where the operators have several reasons, each is said once
    answers = {"a": {"triton": "no X", "torch": "available"}, "b": {"torch": "available"}, "c": {"triton": "no Y"}}
    answers["d"] = {"triton": "no X"}
    monkeypatch.setattr(dispatch, "describe", lambda: answers)
    assert bench_step.main(command) == common.NOTHING_TO_RUN
    assert "can run here: a, d: no X; c: no Y\n" in capsys.readouterr().err


CUDA = torch.device("cuda")
PROBLEMS = {"a": "", "xsa": "too old a Triton", "c": "", "d": "no tensor cores"}


def test_a_way_that_lacks_a_kernel_on_a_gpu_says_so_in_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ways, "kernel_problems", lambda: PROBLEMS)
    assert ways.named_ways(["published", "golf", "golf-a+pdl", "torch"], CUDA) == [
        "published",
        "golf-xsa-d",
        "golf-a-xsa-d+pdl",
        "torch",
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["golf: a, c", "    without xsa: too old a Triton", "    without d: no tensor cores"]
    assert said[3] == "golf-a+pdl: c"
    # a CPU's rows are not kept, and its interpreter's times mean nothing
    assert ways.named_ways(["golf"], CPU) == ["golf"]
    with pytest.raises(UserError, match="golf-xsa-d twice"):
        ways.named_ways(["golf", "golf-xsa"], CUDA)
    monkeypatch.setattr(ways, "kernel_problems", lambda: dict.fromkeys(PROBLEMS, ""))
    assert ways.named_ways(["golf"], CUDA) == ["golf"] and capsys.readouterr().out.endswith("golf: a, xsa, c, d\n")


def test_golf_without_a_kernel_is_refused_on_a_gpu_and_said_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ways, "kernel_problems", lambda: PROBLEMS)
    with pytest.raises(UserError, match=r"'golf-a-c': no kernel of a training step is left, .* torch: xsa: too old"):
        ways.named_ways(["torch", "golf-a-c"], CUDA)
    monkeypatch.setattr(ways, "kernel_problems", lambda: {"a": "this GPU is sm_80", "b": "this GPU is sm_80"})
    with pytest.raises(UserError, match=r"that it would be torch: this GPU is sm_80; leave it out"):
        ways.named_ways(["golf"], CUDA)
    assert ways.named_ways(["golf"], CPU) == ["golf"]
    assert "golf: no kernel, so it is torch\n    without a: this GPU is sm_80\n" in capsys.readouterr().out


def test_golf_without_an_operator_has_all_other_kernels() -> None:
    with dispatch.forced(ways.backends_of("golf-leaky_relu2_mlp-xsa")):
        left = [f"{op}{end}" for op in ("leaky_relu2_mlp", "xsa") for end in ("", "_backward")]
        assert {dispatch.choose(op).backend for op in left} == {"torch"}
        assert {dispatch.choose(op).backend for op in ("muon_step", "mix_rms_norm_backward")} == {"triton"}
    with pytest.raises(
        UserError, match=r"'golf-no_such': .* golf leaves out no_such, expected some of leaky_relu2_mlp, mix"
    ):
        ways.check_ways(["torch", "golf-no_such"])
    # a backward pass alone is not left out
    with pytest.raises(UserError, match="golf leaves out xsa_backward"):
        ways.check_ways(["golf-xsa_backward"])


def test_tokens_of_shards_follow_each_other(tmp_path: Path) -> None:
    config = load_recipe("quickstart").config(**NARROW)
    tokens = ShardTokens(config, write_tokens(tmp_path))
    first, second = tokens.next(), tokens.next()
    assert first.shape == (2, 33) and np.array_equal(np.concatenate([first, second]).ravel(), np.arange(132) % 300)


def test_a_batch_is_in_pinned_memory_before_the_step_and_arrives_as_the_trainers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.dtype), tensor.clone())[1])
    config = load_recipe("quickstart").config(**NARROW)
    for tokens in (MadeTokens(config), ShardTokens(config, write_tokens(tmp_path))):
        tokens.device, before = CUDA, len(pinned)
        batch = tokens.next()
        assert batch.dtype == np.uint16 and pinned[before:] == [torch.int16]
    assert isinstance(ways.token_source(config, None, CUDA).next(), np.ndarray) and len(pinned) == 3
    (variant,) = make_variants(config, ["torch"], CPU)
    variant.run(batch, False)
    assert len(pinned) == 3
    # of 16 bits all count
    rows = np.array([[1, 40000, 65535], [7, 0, 32768]], dtype=np.uint16)
    ((inputs, targets),) = ways.OneBatch(rows, CPU).next_batch()
    assert inputs.tolist() == [[1, 40000], [7, 0]] and targets.tolist() == [[40000, 65535], [0, 32768]]
    assert inputs.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()


def write_tokens(folder: Path) -> Path:
    write_shard(folder / "fineweb_train_000000.bin", np.arange(200, dtype=np.uint16) % 300)
    return folder


def test_made_tokens_are_the_same_for_every_way_and_inside_the_vocabulary() -> None:
    config = load_recipe("quickstart").config(**NARROW)
    sources = [MadeTokens(config) for _ in range(2)]
    batches = [[source.next() for _ in range(50)] for source in sources]
    assert np.array_equal(*batches) and batches[0][0].shape == (2, 33) and np.max(batches) < 300
    # half of them follow from the token before, and the permutation has few fixed points
    rows = np.concatenate(batches[0])
    follows = sources[0].follower[rows[:, :-1]] == rows[:, 1:]
    assert follows.mean() == pytest.approx(0.5, abs=0.05) and (rows[:, :-1] != rows[:, 1:]).mean() > 0.8


def test_only_the_published_way_has_its_layers_as_the_scripts_have_them() -> None:
    config = load_recipe("sp8192_sdclip").config(**SHALLOW)
    (plain,) = make_variants(config, ["published"], CPU)
    for kind in (Attention, MLP):
        assert {part.as_published for part in plain.step.model.modules() if isinstance(part, kind)} == {True}
        assert {part.as_published for part in GPT(config).modules() if isinstance(part, kind)} == {False}


def autograd_nodes(loss: Tensor) -> Counter[str]:
    """How often each operation with a backward pass stands behind a loss."""
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += {parent for parent, _ in node.next_functions if parent is not None} - set(nodes)
    return Counter(node.name() for node in nodes)


def test_only_the_published_way_has_three_products_and_autograds_own_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    config = load_recipe("sp8192_sdclip").config(**SHALLOW | {"compile": "on"})
    found = {}
    for variant in make_variants(config, ["published", "torch", "golf"], CPU):
        with dispatch.forced(variant.backends), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros(2, config.train_seq_len, dtype=torch.int64)
            nodes = autograd_nodes(compiled.pop(0)(ids, ids, recurrence=True))
        own = {name: count for name, count in nodes.items() if "_WrittenOut" in name or "golf" in name}
        found[variant.name] = nodes["MmBackward0"], own
    # three layers run four times; the values' embedding and the head have a product each, too
    assert found["published"] == (4 * 6 + 2, {})
    assert found["torch"] == (4 * 4 + 2, {"_WrittenOutBackward": 4})
    products, own = found["golf"]
    # those of its MLP and head are in operators
    assert products == 4 * 2 + 1 and "_WrittenOutBackward" not in own
    assert [count for name, count in own.items() if "qk_norm_rope" in name] == [4]


def test_the_published_way_has_none_of_the_compilers_switches_that_the_trainer_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    monkeypatch.setattr(torch, "compile", lambda model, *, options, **_: given.append(options) or model)
    monkeypatch.setattr(loop, "chosen_options", lambda: ({"max_autotune": True}, "won"))
    make_variants(load_recipe("quickstart").config(**NARROW | {"compile": "on"}), ["published", "torch"], CPU)
    assert given == [{}, {"max_autotune": True}]


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
    assert "step MiB: most that a step allocates above what stands between steps" in result.stdout
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
        (
            ["--inductor", "all", "--ways", "published"],
            "--inductor: no switch is set for published: expected torch, golf",
        ),
        (
            ["--tiny", "--profile", "traces", "--each-kernel"],
            "--profile: not with --kernel or --inductor: name the ways",
        ),
        (["--kernel", "no_such"], "--kernel: no operator no_such: expected all, or some of leaky_relu2_mlp"),
        (["--tiny", "--attention", "fa3"], "attention: fa3 cannot run: needs a CUDA GPU; these can: sdpa, math"),
        (["--limit-s", "0"], "--limit-s: expected a whole number from 1"),
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


@pytest.mark.parametrize("bench", [bench_step, bench_loss_curves])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GOLF_BACKEND", "nonsense", r"GOLF_BACKEND=nonsense is set, but each of the ways .* unset it"),
        ("ATTENTION", "no_such", r"attention: expected one of 'auto', .*, got 'no_such'"),
    ],
)
def test_an_environment_that_contradicts_the_ways_is_refused(
    bench: types.ModuleType, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        bench.main(["--tiny", "--device", "cpu", "--ways", "torch,golf"])


@pytest.mark.parametrize("bench", [bench_step, bench_loss_curves])
def test_a_way_named_twice_is_refused(bench: types.ModuleType) -> None:
    with pytest.raises(UserError, match="--ways: torch twice: expected each way once"):
        bench.main(["--tiny", "--device", "cpu", "--ways", "torch,golf,torch"])


def test_attention_is_taken_from_the_environment_or_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(config: Config, *_: object) -> None:
        asked.append(config.attention)
        raise UserError("enough")

    monkeypatch.setenv("ATTENTION", "math")
    monkeypatch.setattr(bench_step, "choose_attention", note)
    for given in ([], ["--attention", "sdpa"]):
        with pytest.raises(SystemExit):
            bench_step.main(["--tiny", "--device", "cpu", "--warmup-ms", "1", "--ways", "torch", *given])
    assert asked == ["math", "sdpa"]


@pytest.mark.parametrize("way", ["", "foo", "torch+no_such", "published+pdl", "xsa=cuda", "no_such=triton"])
def test_a_way_that_cannot_be_taken_is_refused_before_any_is_measured(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with pytest.raises(
        UserError, match=rf"--ways: '{re.escape(way)}': expected published, torch, golf, golf-OPERATOR or op"
    ):
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
        bench.main(["--ways", "torch,golf", "--device", "cpu", "--tiny", flag, str(tmp_path / "file")])

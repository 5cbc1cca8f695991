"""The variants of a training step: the yardstick trains like the trainer, what each is made of, and names that are refused."""

import re
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from step_example import NARROW, SHALLOW
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import bench_loss_curves, bench_step
from benchmarks.measure import step_variants
from benchmarks.measure.published_step import orthogonalize
from benchmarks.measure.step_variants import StepVariant, all_kernels, make_variants, step_kernels
from benchmarks.measure.tokens import MadeTokens, OneBatch, ShardTokens, token_source
from golf_kernels import dispatch, tuned
from golf_kernels.newton_schulz import coefficient_set
from train.common.errors import UserError
from train.config import Config
from train.data.shards import write_shard
from train.model.gpt import GPT
from train.recipes import load_recipe, recipe_names

CPU = torch.device("cpu")


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


def test_all_kernels_have_the_variants_that_tuning_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {"softcapped_cross_entropy": "triton/32MiB", "leaky_relu2_mlp": "torch"}
    decisions = {op: {"call": {"backend": backend, "reason": ""}} for op, backend in backends.items()}
    monkeypatch.setattr(tuned, "load", lambda: tuned.Tuned(Path("tuned.json"), {"decisions": decisions}))
    text = all_kernels(without=["xsa"]).split(",")
    assert {"softcapped_cross_entropy=triton/32MiB", "leaky_relu2_mlp=triton", "mix_rms_norm=triton"} <= set(text)
    assert not any(entry.startswith("xsa=") for entry in text)


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
    triples = coefficient_set("quintic").schedule(5)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(gradient, triples).float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25


def test_a_kernel_is_switched_with_its_backward_pass() -> None:
    found = step_kernels()
    assert {"leaky_relu2_mlp", "muon_step"} <= set(found)
    assert not any("backward" in name or "window" in name or "int6" in name for name in found)
    with dispatch.forced("torch,leaky_relu2_mlp=triton"):
        assert [dispatch.choose(f"leaky_relu2_mlp{end}").backend for end in ("", "_backward")] == ["triton", "triton"]
        assert dispatch.choose("muon_step").backend == "torch"


CUDA = torch.device("cuda")
PROBLEMS = {"a": "", "xsa": "too old a Triton", "c": "", "d": "no tensor cores"}


def test_a_variant_that_lacks_a_kernel_on_a_gpu_says_so_in_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_variants, "kernel_problems", lambda: PROBLEMS)
    assert step_variants.row_names(["published", "golf", "golf-a+optimizer_graph=on", "torch"], CUDA) == [
        "published",
        "golf-xsa-d",
        "golf-a-xsa-d+optimizer_graph=on",
        "torch",
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["golf: a, c", "    without xsa: too old a Triton", "    without d: no tensor cores"]
    assert said[3] == "golf-a+optimizer_graph=on: c"
    # a CPU's rows are not kept, and its interpreter's times mean nothing
    assert step_variants.row_names(["golf"], CPU) == ["golf"]
    with pytest.raises(UserError, match="golf-xsa-d twice"):
        step_variants.row_names(["golf", "golf-xsa"], CUDA)
    monkeypatch.setattr(step_variants, "kernel_problems", lambda: dict.fromkeys(PROBLEMS, ""))
    assert step_variants.row_names(["golf"], CUDA) == ["golf"] and capsys.readouterr().out.endswith(
        "golf: a, xsa, c, d\n"
    )


def test_golf_without_a_kernel_is_refused_on_a_gpu_and_said_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_variants, "kernel_problems", lambda: PROBLEMS)
    with pytest.raises(UserError, match=r"'golf-a-c' has no kernel, so it would be torch: xsa: too old"):
        step_variants.row_names(["torch", "golf-a-c"], CUDA)
    monkeypatch.setattr(step_variants, "kernel_problems", lambda: {"a": "this GPU is sm_80", "b": "this GPU is sm_80"})
    with pytest.raises(UserError, match=r"so it would be torch: this GPU is sm_80: leave it out"):
        step_variants.row_names(["golf"], CUDA)
    assert step_variants.row_names(["golf"], CPU) == ["golf"]
    assert "golf: no kernel, so it is torch\n    without a: this GPU is sm_80\n" in capsys.readouterr().out


def test_golf_without_an_operator_has_all_other_kernels() -> None:
    with dispatch.forced(step_variants.backends_of("golf-leaky_relu2_mlp-xsa")):
        left = [f"{op}{end}" for op in ("leaky_relu2_mlp", "xsa") for end in ("", "_backward")]
        assert {dispatch.choose(op).backend for op in left} == {"torch"}
        assert {dispatch.choose(op).backend for op in ("muon_step", "mix_rms_norm_backward")} == {"triton"}
    with pytest.raises(
        UserError,
        match=r"'golf-no_such': .* golf has no kernel of no_such, only of leaky_relu2_mlp, linear_residual, mix",
    ):
        step_variants.check_names(["torch", "golf-no_such"])
    # a backward pass alone is not left out
    with pytest.raises(UserError, match="golf has no kernel of xsa_backward"):
        step_variants.check_names(["golf-xsa_backward"])


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
    assert isinstance(token_source(config, None, CUDA).next(), np.ndarray) and len(pinned) == 3
    (variant,) = make_variants(config, ["torch"], CPU)
    variant.run(batch, False)
    assert len(pinned) == 3
    # of 16 bits all count
    rows = np.array([[1, 40000, 65535], [7, 0, 32768]], dtype=np.uint16)
    ((inputs, targets),) = OneBatch(rows, CPU).next_batch()
    assert inputs.tolist() == [[1, 40000], [7, 0]] and targets.tolist() == [[40000, 65535], [0, 32768]]
    assert inputs.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()


def write_tokens(folder: Path) -> Path:
    write_shard(folder / "fineweb_train_000000.bin", np.arange(200, dtype=np.uint16) % 300)
    return folder


def test_made_tokens_are_the_same_for_every_variant_and_inside_the_vocabulary() -> None:
    config = load_recipe("quickstart").config(**NARROW)
    sources = [MadeTokens(config) for _ in range(2)]
    batches = [[source.next() for _ in range(50)] for source in sources]
    assert np.array_equal(*batches) and batches[0][0].shape == (2, 33) and np.max(batches) < 300
    # half of them follow from the token before, and the permutation has few fixed points
    rows = np.concatenate(batches[0])
    follows = sources[0].follower[rows[:, :-1]] == rows[:, 1:]
    assert follows.mean() == pytest.approx(0.5, abs=0.05) and (rows[:, :-1] != rows[:, 1:]).mean() > 0.8


def autograd_nodes(loss: Tensor) -> Counter[str]:
    """How often each operation with a backward pass stands behind a loss."""
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += {parent for parent, _ in node.next_functions if parent is not None} - set(nodes)
    return Counter(node.name() for node in nodes)


def test_only_the_published_variant_has_three_products_and_autograds_own_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    config = load_recipe("sp8192_sdclip").config(**SHALLOW | {"compile": "on"})
    found = {}
    for variant in make_variants(config, ["published", "torch", "golf", "golf-xsa"], CPU):
        with dispatch.forced(variant.backends), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros(2, config.train_seq_len, dtype=torch.int64)
            nodes = autograd_nodes(compiled.pop(0)(ids, ids, recurrence=True))
        own = {name: count for name, count in nodes.items() if re.search("_WrittenOut|_Joint|golf", name)}
        found[variant.name] = nodes["MmBackward0"], own
    # three layers run four times; the values' embedding and the head have a product each, too
    assert found["published"] == (4 * 6 + 2, {})
    assert found["torch"] == (4 * 4 + 2, {"_WrittenOutBackward": 4})
    # those of its MLP, head and output projection are in operators
    for name, calls_of_xsa in (("golf", 4), ("golf-xsa", 0)):
        products, own = found[name]
        assert products == 4 * 1 + 1 and "_WrittenOutBackward" not in own
        calls = Counter({name.rpartition("golf_")[2].partition("_default")[0]: count for name, count in own.items()})
        assert own["_JointBackward"] == 4 and "qk_norm_rope" not in calls and calls["xsa"] == calls_of_xsa, own
        assert calls["linear_residual"] == 4, own


def test_a_setting_behind_a_variant_is_that_variants_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given, build = [], step_variants.build_optimizers

    def note(model: GPT, config: Config, **options: object) -> object:
        given.append(config.optimizer_graph)
        return build(model, config.replace(optimizer_graph="off"), **options)

    monkeypatch.setattr(step_variants, "build_optimizers", note)
    config = load_recipe("quickstart").config(**NARROW)
    make_variants(config, ["torch+optimizer_graph=on", "torch", "torch+optimizer_graph=off"], CPU)
    assert given == ["on", "auto", "off"]


def test_the_share_is_an_eighth_of_the_work() -> None:
    config = load_recipe("sp8192_sdclip").config(**NARROW)
    plain, _ = make_variants(config, ["published", "torch"], CPU)
    count = sum(len(bank) for bank in plain.step.muon.banks)
    # 66 matrices of the layers and the value embedding's projection
    assert 67 / 8 - 6 < count < 67 / 8 + 6


@pytest.mark.parametrize("bench", [bench_step, bench_loss_curves])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GOLF_BACKEND", "nonsense", r"GOLF_BACKEND=nonsense is set, but each variant has .* unset it"),
        ("ATTENTION", "no_such", r"attention: expected one of 'auto', .*, got 'no_such'"),
    ],
)
def test_an_environment_that_contradicts_the_variants_is_refused(
    bench: types.ModuleType, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        bench.main(["--tiny", "--device", "cpu", "--variants", "torch,golf"])


@pytest.mark.parametrize("bench", [bench_step, bench_loss_curves])
def test_a_variant_named_twice_is_refused(bench: types.ModuleType) -> None:
    with pytest.raises(UserError, match="--variants: torch twice: expected each variant once"):
        bench.main(["--tiny", "--device", "cpu", "--variants", "torch,golf,torch"])


@pytest.mark.parametrize(
    "name",
    [
        *("", "foo", "torch+", "torch+no_such=1", "torch+optimizer_graph=yes", "published+optimizer_graph=on"),
        *("xsa=cuda", "no_such=triton"),
    ],
)
def test_a_variant_that_cannot_be_taken_is_refused_before_any_is_measured(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with pytest.raises(
        UserError, match=rf"--variants: '{re.escape(name)}': expected published, torch, golf, golf-OPERATOR or OP"
    ):
        bench_loss_curves.main(["--variants", f"torch,{name}", "--device", "cpu", "--out", str(folder)])
    assert not folder.exists()
    with pytest.raises(UserError, match=rf"--variants: '{re.escape(name)}'"):
        make_variants(load_recipe("quickstart").config(), [name], CPU)

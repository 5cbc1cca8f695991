"""The choice of an attention backend: as set, the fastest one, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from golf_kernels import tuned
from train.common.errors import UserError
from train.config import Config
from train.model import attention_backends, attention_choice
from train.model.attention import Attention
from train.model.attention_backends import BACKENDS
from train.model.attention_choice import check_attention, choose_attention, use_attention
from train.model.gpt import GPT

CPU = torch.device("cpu")
ON_CPU = {name for name, backend in BACKENDS.items() if backend.problem(CPU, torch.float64, 8, True) is None}


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - ON_CPU))
def test_a_backend_that_cannot_run_says_why_and_what_can(name: str) -> None:
    with pytest.raises(UserError, match=rf"attention: {name} cannot run: needs a CUDA GPU; these can: sdpa, math"):
        check_attention(Config(attention=name), CPU)


def test_the_fastest_backend_is_taken_and_the_others_are_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_backends, "_library", lambda name, **_: ImportError("No module named 'x'"))
    seconds = {"sdpa": 2.0, "cudnn": 1.25, "flash": 2.5}
    monkeypatch.setattr(attention_choice, "_measure", lambda names, *_: {name: seconds[name] for name in names})
    name, reason = choose_attention(Config(device="cuda"), torch.device("cuda"), 1)
    assert name == "cudnn"
    assert "cudnn 1.250, sdpa 2.000, flash 2.500" in reason and "fa4: No module named 'x': pip install" in reason


def test_packed_rows_are_too_long_for_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_backends, "_library", lambda name, **_: ImportError("No module named 'x'"))
    packed = Config(device="cuda", loader="packed", document_masking=True, rope_scaling="none")
    problems = check_attention(packed, torch.device("cuda"))
    assert {name for name, problem in problems.items() if problem is None} == {"flash"}
    with pytest.raises(
        UserError, match="sdpa cannot run: the document mask of a packed row is too large; these can: flash"
    ):
        check_attention(packed.replace(attention="sdpa"), torch.device("cuda"))


class Event:
    """A fake CUDA event: one millisecond lies between any two."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    synchronize = record

    def elapsed_time(self, end: object) -> float:
        return 1.0


def test_a_backend_that_fails_at_these_shapes_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    config = Config(model_dim=16, num_heads=2, num_kv_heads=1, train_seq_len=8)
    attend = attention_choice.causal_attention

    def failing(*args: object, backend: str, **rest: object) -> torch.Tensor:
        if backend == "cudnn":
            raise RuntimeError("No available kernel. Aborting execution.\nand a long trace")
        return attend(*args, backend="math", **rest)

    monkeypatch.setattr(attention_choice, "causal_attention", failing)
    problems: dict[str, str | None] = {"sdpa": None, "cudnn": None}
    times = attention_choice._measure(list(problems), config, CPU, 1, problems)
    assert times == {"sdpa": 1.0}
    assert problems == {"sdpa": None, "cudnn": "RuntimeError: No available kernel. Aborting execution."}


@pytest.mark.parametrize("error", [AssertionError("head_dim\nand more"), ValueError("head_dim"), TypeError("head_dim")])
def test_any_error_of_a_library_leaves_it_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    attend = attention_choice.causal_attention

    def failing(*args: object, backend: str, **rest: object) -> torch.Tensor:
        if backend == "fa3":
            raise error
        return attend(*args, backend="math", **rest)

    monkeypatch.setattr(attention_choice, "causal_attention", failing)
    problems: dict[str, str | None] = {"sdpa": None, "fa3": None}
    config = Config(model_dim=16, num_heads=2, num_kv_heads=1, train_seq_len=8)
    assert attention_choice._measure(["sdpa", "fa3"], config, CPU, 1, problems) == {"sdpa": 1.0}
    assert problems["fa3"] == f"{type(error).__name__}: head_dim"


def test_a_run_that_compiles_measures_compiled_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    options: list[dict[str, object]] = []

    def compiled(form: object, **given: object) -> object:
        options.append(given)

        # what torch.compile says of a library that is no operator of PyTorch
        def broken(*args: object) -> None:
            raise torch._dynamo.exc.Unsupported("Attempted to call function marked as skipped\n  Explanation")

        return broken if form.keywords["backend"] == "fa3" else form  # type: ignore[attr-defined]

    monkeypatch.setattr(torch, "compile", compiled)
    config = Config(model_dim=16, num_heads=2, num_kv_heads=1, train_seq_len=8, compile="on")
    problems: dict[str, str | None] = {"sdpa": None, "fa3": None}
    assert attention_choice._measure(["sdpa", "fa3"], config, CPU, 1, problems) == {"sdpa": 1.0}
    assert options == [{"dynamic": False, "fullgraph": True}] * 2
    assert problems["fa3"] == "Unsupported: Attempted to call function marked as skipped"


def test_flash_attention_4_runs_as_pytorchs_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: calls.append("own"))
    monkeypatch.setattr(attention_backends, "_active", "")
    for name in ("flash", "fa4", "fa4", "cudnn", "fa3"):
        attention_backends.activate(name)
    assert calls == ["FA4", "own"]
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert "cannot run FlashAttention 4" in str(attention_backends._flash_attention_4())


def test_a_choice_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(names: list[str], *rest: object) -> dict[str, float]:
        rest[-1].update(dict.fromkeys(names, "No available kernel"))
        return {}

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention_choice, "_measure", nothing)
    with pytest.raises(UserError, match=r"sdpa: No available kernel; cudnn: .*ATTENTION=math, which always works"):
        choose_attention(Config(device="cuda"), torch.device("cuda"), 1)


def test_on_a_cpu_pytorch_chooses() -> None:
    assert choose_attention(Config(), CPU, 1).name == "sdpa"
    assert choose_attention(Config(attention="math"), CPU, 1) == ("math", "as set")


@pytest.mark.parametrize(
    ("name", "how"),
    [("fa3", "sequences of different lengths"), ("flash", "sequences of different lengths"), ("cudnn", "a mask")],
)
def test_the_log_says_how_documents_are_kept_apart(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "check_attention", lambda *_: dict.fromkeys(BACKENDS))
    monkeypatch.setattr(attention_choice, "_measure", lambda *_: {name: 1.0})
    cuda = torch.device("cuda")
    for attention in ("auto", name):
        said = choose_attention(Config(attention=attention, document_masking=True), cuda, 1).reason
        assert said.endswith(f"; documents as {how}")
    assert "documents" not in choose_attention(Config(attention=name), cuda, 1).reason


def test_a_tuned_choice_is_taken_for_its_shape_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = (
        Config(device="cuda", model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=8),
        torch.device("cuda"),
    )
    shape = attention_choice.batch_shape(config, 4)
    assert shape.startswith("4x8x2/1x32 ")
    decided = {"backend": "cudnn", "reason": "cudnn 1.250, sdpa 2.000 ms forward + backward"}
    known = tuned.Tuned(Path("x"), {"tuned": "2026-12-01", "attention": {shape: decided}})
    problems: dict[str, str | None] = {"sdpa": None, "cudnn": None}
    monkeypatch.setattr(tuned, "load", lambda: known)
    monkeypatch.setattr(attention_choice, "check_attention", lambda *_: dict(problems))
    monkeypatch.setattr(attention_choice, "_measure", lambda *_: {"sdpa": 1.0})
    assert choose_attention(config, cuda, 4) == ("cudnn", f"{decided['reason']}, tuned 2026-12-01")
    # another shape, another form and a backend that is gone are measured
    assert choose_attention(config, cuda, 5).name == "sdpa"
    assert choose_attention(config.replace(compile="off"), cuda, 4).name == "sdpa"
    problems["cudnn"] = "no such library"
    assert choose_attention(config, cuda, 4).name == "sdpa"


def test_every_layer_gets_the_backend() -> None:
    model = GPT(Config(num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1))
    use_attention(model, "math")
    assert [module.backend for module in model.modules() if isinstance(module, Attention)] == ["math"] * 3

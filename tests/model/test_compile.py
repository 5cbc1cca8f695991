"""Inductor's switches: every name exists, only a figure sets one, and it reaches the compiler in both directions."""

from typing import Any

import pytest
import torch
from torch._inductor import compile_fx
from torch._inductor import config as inductor

from train.config import Config
from train.loop import compiled_loss
from train.model.compile import SWITCHES, Switch, chosen_options, missing_options, parse_switch


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_torch_takes_every_switch_and_none_is_its_default(switch: Switch) -> None:
    assert missing_options(switch.options) == []
    defaults = inductor.get_config_copy()
    assert any(defaults[name] != value for name, value in switch.options.items())
    assert torch.compile(lambda x: x, options=dict(switch.options))
    assert parse_switch(switch.name) == switch


def test_only_a_figure_sets_a_switch() -> None:
    won = Switch("pdl", {"triton.enable_pdl": True}, "", "Made GPU, aaaaaaa: 2.0 to 1.0 ms")
    absent = Switch("gone", {"triton.no_such_thing": True}, "", "Made GPU, aaaaaaa: 2.0 to 1.0 ms")
    assert chosen_options([won._replace(figure="")]) == ({}, "no switch set, none has won a measurement yet")
    options, said = chosen_options([won, absent])
    assert options == {"triton.enable_pdl": True}
    assert said.startswith("pdl (Made GPU, aaaaaaa: 2.0 to 1.0 ms); gone left out, torch ")
    assert said.endswith("has no triton.no_such_thing")


def test_a_switch_reaches_both_directions_of_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = compile_fx.fx_codegen_and_compile

    def look(*given: Any, **rest: Any) -> Any:
        seen.append((rest["is_backward"], inductor.triton.mix_order_reduction))
        return inner(*given, **rest)

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", look)
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    # products alone leave nothing for a C++ compiler to do
    model = torch.nn.Linear(3, 2, bias=False)
    monkeypatch.setattr("train.loop.write_out_references", lambda *_: [])
    loss_of = compiled_loss(model, Config(compile="on"), torch.device("cpu"), {"triton.mix_order_reduction": False})
    loss_of(torch.ones(4, 3)).backward(torch.ones(4, 2))
    assert set(seen) == {(False, False), (True, False)}
    assert inductor.triton.mix_order_reduction is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such", "no_such' is no switch: expected all, NAME=VALUE, or one of mix_order_reduction_off"),
        ("no.such=1", "has no switch no.such"),
        ("triton.enable_pdl=yes", "triton.enable_pdl: expected True or False, got 'yes'"),
        ("combo_kernel_max_num_args=x", "expected a value like 250, got 'x'"),
        ("triton.mix_order_reduction_split_size=1", "only switches that hold a number or a text"),
    ],
)
def test_a_switch_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        parse_switch(text)


def test_an_option_is_read_in_its_own_type() -> None:
    assert parse_switch("triton.mix_order_reduction=False").options == {"triton.mix_order_reduction": False}
    assert parse_switch("combo_kernel_max_num_args=7").options == {"combo_kernel_max_num_args": 7}
    assert parse_switch("max_autotune_gemm_backends=ATEN").options == {"max_autotune_gemm_backends": "ATEN"}

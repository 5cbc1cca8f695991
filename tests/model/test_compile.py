"""Formulas written out equal their operators, and a compiled graph calls only operators that have a kernel."""

from __future__ import annotations

import pytest
import torch
from model_systems import SYSTEMS, narrow_config, random_ids, random_model

from golf_kernels import dispatch
from train.model.compile import without_kernel, write_out
from train.model.gpt import GPT

OPERATORS = frozenset({"leaky_relu2_mlp", "mix_rms_norm", "qk_norm_rope", "softcapped_cross_entropy", "xsa"})
CPU = torch.device("cpu")


def loss_and_gradients(model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    loss = model(ids, targets, recurrence=bool(model.config.recur_layers))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_written_out_forms_equal_the_operators(system: str) -> None:
    model = random_model(narrow_config(system))
    ids = random_ids(model.config)
    targets = ids.roll(-1, 1)
    with_operators = loss_and_gradients(model, ids, targets)
    assert without_kernel(CPU) >= OPERATORS
    write_out(model, without_kernel(CPU))
    for ours, plain in zip(with_operators, loss_and_gradients(model, ids, targets), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_written_out_forms_equal_the_operators_where_an_evaluation_shares_and_skips(system: str) -> None:
    model = random_model(narrow_config(system)).eval()
    text = random_ids(model.config, rows=1, length=21)[0]

    def hidden() -> list[torch.Tensor]:
        options = {"recurrence": bool(model.config.recur_layers), "rows_from": 9}
        found = [model.hidden(text[None], **options)]
        if model.overlap_problem is None:
            found.append(model.overlapping_hidden(text, windows=3, stride=4, **options))
        return found

    with torch.no_grad():
        with_operators = hidden()
        write_out(model, OPERATORS)
        torch.testing.assert_close(with_operators, hidden(), rtol=1e-9, atol=1e-12)


def operators_in_graph(model: GPT, ids: torch.Tensor) -> set[str]:
    found: set[str] = set()

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(model, dynamic=False, fullgraph=True, backend=look)(ids, ids, recurrence=False)
    return {name for name in found if "golf" in name}


def test_a_compiled_model_has_an_operator_only_where_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(narrow_config("sp8192"))
    ids = random_ids(model.config)
    assert {name.split(".")[1] for name in operators_in_graph(model, ids)} == OPERATORS
    # the same code, compiled again for a model that calls other forms
    write_out(model, without_kernel(CPU))
    assert operators_in_graph(model, ids) == set()


@pytest.mark.parametrize("asked_for", sorted(OPERATORS - {"softcapped_cross_entropy"} | {"linear_residual"}))
def test_a_kernel_that_is_asked_for_stays_an_operator(asked_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(narrow_config("sp8192"))
    choose = dispatch.choose
    triton = dispatch.Choice("triton", "asked for")
    monkeypatch.setattr(dispatch, "choose", lambda op, **kwargs: triton if op == asked_for else choose(op, **kwargs))
    assert without_kernel(CPU) & OPERATORS == OPERATORS - {asked_for}
    write_out(model, without_kernel(CPU))
    monkeypatch.undo()
    assert {name.split(".")[1] for name in operators_in_graph(model, random_ids(model.config))} == {asked_for}

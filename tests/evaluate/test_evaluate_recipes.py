"""The evaluation of every recipe's model, pruned to the scored rows, against full logits one window at a time."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import math

import pytest
import scoring_example
import torch
from host_traffic import NoHostTraffic
from model_systems import CASES, SHALLOW, SYSTEMS, narrow_config, random_ids, random_model
from plain_evaluation import plain_score

from train.evaluate.scoring import _Scorer, evaluate_model
from train.model.gpt import GPT
from train.model.linear import observe_inputs
from train.recipes import load_recipe

# the package's name of this module is the function
nll_module = importlib.import_module("golf_kernels.window_nll")
make_text = functools.partial(scoring_example.make_text, vocab_size=259)


def narrow_model(system: str) -> GPT:
    """A narrow copy of a system in float32, every part of which speaks."""
    model = random_model(narrow_config(system, qat=False)).float()
    model.compute_dtype = torch.float32
    return model.eval()


@pytest.mark.parametrize(
    ("count", "seq_len", "stride", "rule"),
    [
        # every token a window of its own
        (60, 24, 1, "once"),
        # the last windows are partial
        (270, 96, 64, "once"),
        (270, 96, 64, "overlap_tail"),
        (270, 96, 64, "full_windows"),
        (100, 32, 32, "once"),
        (100, 32, 0, "once"),
        # shorter than a window
        (20, 32, 8, "once"),
        (20, 32, 8, "overlap_tail"),
    ],
)
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_pruned_evaluation_equals_the_plain_one(system: str, count: int, seq_len: int, stride: int, rule: str) -> None:
    tokens, sizes = make_text(count)
    model = narrow_model(system)
    nats, scored, size = plain_score(model, tokens, sizes, seq_len, stride, rule, model.config.logit_softcap)
    found = evaluate_model(model, tokens, sizes, model.config, seq_len=seq_len, stride=stride, rule=rule, batch_seqs=7)
    assert (found.tokens, found.bytes) == (scored, size)
    if stride in (0, seq_len):
        assert found.layer0 == "off (windows do not overlap)"
    elif system in ("sp1024", "sp4096", "frontier"):
        assert found.layer0.startswith("off (smear gate and bigrams read the previous token")
    else:
        assert found.layer0 == "on"
    assert found.val_loss == pytest.approx(nats / scored, rel=1e-6)
    assert found.val_bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"bigram_vocab_size": 0, "trigram": False}], ids=["as it is", "no bigrams"])
def test_pruned_evaluation_of_quickstart_equals_the_plain_one(changes: dict[str, object]) -> None:
    # it is narrow already; the window and the stride are its own
    config = load_recipe("quickstart").config(device="cpu", embed_dtype="float32", **changes)
    model = random_model(config).float().eval()
    model.compute_dtype = torch.float32
    tokens, sizes = make_text(150)
    found = evaluate_model(model, tokens, sizes, config)
    options = (config.window, config.eval_stride, config.eval_rule, config.logit_softcap)
    nats, scored, size = plain_score(model, tokens, sizes, *options)
    # bigrams read the token before the window
    assert 0 < config.eval_stride < config.window and (found.layer0 == "on") == bool(changes)
    assert (found.tokens, found.bytes) == (scored, size)
    assert found.val_loss == pytest.approx(nats / scored, rel=1e-6)


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_cuda_graph_can_hold_a_batch(system: str, masking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # which only a CPU's targets go through
    monkeypatch.setattr(nll_module, "check_targets", lambda *_: None)
    add, seen = _Scorer._add_batch, collections.Counter()

    def add_batch(scorer: _Scorer, windows: torch.Tensor, rows_from: int) -> None:
        seen[rows_from] += 1
        # the first batch of a shape is not captured: it fills what is kept for the others
        with NoHostTraffic() if seen[rows_from] > 1 else contextlib.nullcontext():
            add(scorer, windows, rows_from)

    monkeypatch.setattr(_Scorer, "_add_batch", add_batch)
    tokens, sizes = make_text(100)
    model = random_model(narrow_config(system, document_masking=masking, qat=False)).eval()
    evaluate_model(model, tokens, sizes, model.config, seq_len=32, stride=8, rule="once", batch_seqs=4)
    assert seen == {0: 1, 24: 3}


def test_a_compiled_evaluation_scores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    calls: list[dict[str, object]] = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: (calls.append(how), compile_(f, backend="eager", **how))[1])
    tokens, sizes = make_text(300)
    model = random_model(narrow_config("sp8192", **SHALLOW["sp8192"])).eval()
    options = {"seq_len": 64, "stride": 16, "batch_seqs": 4}
    wanted = evaluate_model(model, tokens, sizes, model.config.replace(compile="off"), **options)
    assert calls == [] and not model.blocks[0].mlp.written_out
    found = evaluate_model(model, tokens, sizes, model.config.replace(compile="on"), **options)
    assert calls == [{"dynamic": False, "fullgraph": True}] * 2
    # the operator has no kernel here, so the compiler gets the formula
    assert "leaky_relu2_mlp" in model.blocks[0].mlp.written_out
    assert found.val_loss == pytest.approx(wanted.val_loss, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("system", ["sp4096", "sp8192"])
def test_compiled_and_replayed_evaluation_on_a_gpu_equals_the_cpu(system: str) -> None:
    torch._dynamo.reset()
    tokens, sizes = make_text(700)
    model = random_model(narrow_config(system, **SHALLOW[system])).float().eval()
    model.compute_dtype = torch.float32
    # enough batches for a graph that is replayed, and a last one that is padded
    options = {"seq_len": 96, "stride": 16, "batch_seqs": 7}
    wanted = evaluate_model(model, tokens, sizes, model.config, **options)
    found = evaluate_model(model.cuda(), tokens, sizes, model.config, **options)
    assert (found.tokens, found.bytes) == (wanted.tokens, wanted.bytes)
    assert found.val_loss == pytest.approx(wanted.val_loss, rel=1e-5)


@pytest.mark.parametrize("rows_from", [1, 7, 12])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize(("system", "recurrence"), CASES)
@torch.no_grad()
def test_last_rows_alone_equal_the_last_rows_of_all(
    system: str, recurrence: bool, masking: bool, rows_from: int
) -> None:
    config = narrow_config(system, document_masking=masking)
    model, ids = random_model(config), random_ids(config)
    whole = model.hidden(ids, recurrence=recurrence)
    rows = model.hidden(ids, recurrence=recurrence, rows_from=rows_from)
    torch.testing.assert_close(rows, whole[:, rows_from:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("system", sorted(SYSTEMS))
@torch.no_grad()
def test_last_layer_multiplies_nothing_for_the_other_rows_but_keys_and_values(system: str) -> None:
    config = narrow_config(system)
    model, ids = random_model(config), random_ids(config)
    rows: dict[str, int] = {}
    with observe_inputs(model, lambda name, x: rows.__setitem__(name, x.shape[1])):
        model.hidden(ids, recurrence=True, rows_from=10)
    last = f"blocks.{config.num_layers - 1}"
    pruned = {f"{last}.attention.query", f"{last}.attention.output", f"{last}.mlp.up", f"{last}.mlp.down"}
    assert {name for name, count in rows.items() if count == 3} == pruned | {"embedding.weight"}
    assert {count for name, count in rows.items() if name not in pruned | {"embedding.weight"}} == {13}


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize(("system", "recurrence"), CASES)
@torch.no_grad()
def test_windows_that_share_layer_0_equal_windows_alone(system: str, recurrence: bool, masking: bool) -> None:
    config = narrow_config(
        system, document_masking=masking, ve_layers=(0, 9, 10) if SYSTEMS[system].get("ve_dim") else ()
    )
    model, text = random_model(config), random_ids(config, rows=1, length=24)[0]
    options = {"recurrence": recurrence, "rows_from": 11}
    if system in ("sp1024", "sp4096", "frontier"):
        with pytest.raises(RuntimeError, match="cannot share layer 0: smear gate and bigrams"):
            model.overlapping_hidden(text, windows=4, stride=3, **options)
        return
    rows: list[int] = []
    with observe_inputs(
        model, lambda name, x: rows.append(x.shape[1]) if name.startswith("blocks.0.attention.") else None
    ):
        found = model.overlapping_hidden(text, windows=4, stride=3, **options)
    # queries, keys and values of the text, the output projection of each window; a repeated layer 0 has its own
    assert rows[:4] == [24, 24, 24, 15]
    expected = model.hidden(text.unfold(0, 15, 3), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_head_gates_and_routed_lanes_share_and_skip_rows() -> None:
    config = narrow_config(
        "sp8192", head_gate=True, parallel_start_layer=8, parallel_form="routed", num_loops=2, skip_rows=8
    )
    model, text = random_model(config), random_ids(config, rows=1, length=24)[0]
    windows = text.unfold(0, 15, 3)
    whole = model.hidden(windows, recurrence=True)[:, 11:]
    options = {"recurrence": True, "rows_from": 11}
    torch.testing.assert_close(model.hidden(windows, **options), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model.overlapping_hidden(text, windows=4, stride=3, **options), whole, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_pruned_model_compiles_into_one_graph(system: str) -> None:
    torch._dynamo.reset()
    model = random_model(narrow_config(system, **SHALLOW[system], qat=False))
    ids = random_ids(model.config)
    compiled = torch.compile(model.hidden, dynamic=False, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model.hidden(ids, recurrence=True, rows_from=10)
        found = compiled(ids, recurrence=True, rows_from=10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if model.overlap_problem is None:
        options = {"windows": 2, "stride": 3, "recurrence": True, "rows_from": 7}
        compiled = torch.compile(model.overlapping_hidden, dynamic=False, fullgraph=True, backend="eager")
        with torch.no_grad():
            shared = model.overlapping_hidden(ids[0], **options)
            torch.testing.assert_close(compiled(ids[0], **options), shared, rtol=0, atol=1e-12)

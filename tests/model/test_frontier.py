"""The model of #2014 and #2135 against numbers of their scripts, and against straight-line code from the formulas.

`tests/fixtures/frontier_training.json` has what the scripts (A = #2135, B = #2014) computed from closed-form inputs, in float32 (f32), and
what the formulas give in float64 (f64).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from frontier_truth import assign, collect, forward, small_ids, small_tensors
from model_systems import narrow_config, random_model
from torch import Tensor

from train.artifact.storage import MODEL_FIELDS
from train.describe import describe, describe_text
from train.model.documents import Documents
from train.model.gpt import GPT
from train.model.order import make_plan, split_order
from train.model.rope import rotary_table
from train.recipes import load_recipe

ORACLES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures/frontier_training.json").read_text(encoding="utf-8")
)
CASES = ORACLES["1_model"]["cases"]
HEADS = {"num_heads": 4, "num_kv_heads": 2, "mlp_mult": 4.0, "train_seq_len": 24, "embed_dtype": "float32"}


def small_model(dtype: torch.dtype, **changes: object) -> GPT:
    model = GPT(narrow_config("frontier", **HEADS, **changes)).to(dtype)
    assign(model, small_tensors())
    model.compute_dtype = dtype
    return model


def hidden(model: GPT, ids: Tensor, pieces: Sequence[int] | None, *, loops: bool) -> Tensor:
    """The head's input, with attention inside pieces that begin at these positions; None: no pieces."""
    shared, documents = model.embed(ids), None
    if pieces is not None:
        documents = Documents(torch.isin(torch.arange(ids.shape[1]), torch.tensor(pieces)).expand_as(ids))
    inputs = shared.inputs._replace(documents=documents)
    return model.hidden_of(shared._replace(inputs=inputs), recurrence=loops)


def capped(model: GPT, hidden: Tensor) -> Tensor:
    return 30 * torch.tanh(hidden @ model.head_weight.T / 30)


def logit_rows(rows: list[dict[str, Any]], key: str) -> Any:
    """(index of the logits, expected value) of a case's rows."""
    return [
        ((row.get("row", 0), row["position"], int(token)), value[key])
        for row in rows
        for token, value in row["values"].items()
    ]


def near(found: Tensor, expected: list[float], atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['documents']}, {c['loops']}, {c['smear_bos_mask']}")
def test_the_scripts_numbers(case: dict[str, Any]) -> None:
    text = small_ids(case["bos_positions"])
    assert text[:24].tolist() == case["ids"] and int(text[24]) == case["last_target"]
    model = small_model(torch.float32, smear_gate_bos_fix=case["smear_bos_mask"])
    normed: list[Tensor] = []
    lanes: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, arguments: normed.append(arguments[0]))
    run_routed = model.blocks[8].run_routed
    model.blocks[8].run_routed = lambda *a, **k: lanes.append(run_routed(*a, **k)) or lanes[-1]  # type: ignore[method-assign]
    last = hidden(model, text[None, :24], case["piece_starts"], loops=case["loops"])
    loss = model.head(last.flatten(0, 1), model.head_weight, text[1:])
    if "loss" in case:
        near(loss.detach(), case["loss"]["f32"], 1e-5)
    logits = capped(model, last.detach())
    for index, expected in logit_rows(case["logits"], "f32"):
        near(logits[index], expected, 1e-5)
    x0 = model.embed(text[None, :24]).inputs.x0[0]
    for row in case["smeared_normed_embedding"]:
        near(x0[row["position"], :4].detach(), row["f32"], 1e-6)
    for row in case["after_layer_8"]:
        for lane in (0, 1):
            near(lanes[0][lane][0, row["position"], :4].detach(), row[f"lane{lane}_f32"], 1e-5)
    plan = model.recurrent_plan if case["loops"] else model.plan
    for row in case["head_gates"]:
        assert plan[row["run"]].layer == row["layer"]
        rows = normed[row["run"]][0, row["position"], :12]
        near(torch.sigmoid(0.5 * model.blocks[row["layer"]].attention.gate @ rows).detach(), row["f32"], 1e-6)
    loss.backward()
    gradients = collect({name: parameter.grad for name, parameter in model.named_parameters()}, 11)
    for name, expected in case["grad_l2_norms_f32"].items():
        near(gradients[name].norm(), expected["norm"], 0, 1e-5)
        near(gradients[name].flatten()[:3], expected["first3"], 1e-5 * expected["norm"])
    assert model.softcaps.grad is None
    if not case["loops"]:
        # a zero, not nothing: the optimizer still decays these rows
        assert not gradients["skip_weights"][5:].any() and gradients["skip_weights"][:5].any(dim=1).all()


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize(
    ("bos", "pieces"), [([0], [0]), ([0, 9, 17], [0, 9, 17]), ([0, 9, 17], [0, 6, 9, 15, 17, 23])], ids=str
)
@torch.no_grad()
def test_the_formulas_in_float64(bos: list[int], pieces: list[int], loops: bool) -> None:
    ids = small_ids(bos)[:24]
    for mask in (False, True):
        # the closed-form weights, whose float64 logits are known, then random ones
        model = small_model(torch.float64, smear_gate_bos_fix=mask)
        tensors = small_tensors()
        expected = forward(tensors, ids, loops=loops, bos_mask=mask, pieces=pieces)["logits"]
        for case in CASES:
            if (case["bos_positions"], case["piece_starts"], case["loops"]) == (bos, pieces, loops) and (
                case["smear_bos_mask"] == mask or len(bos) == 1
            ):
                for (_, position, token), value in logit_rows(case["logits"], "f64"):
                    near(expected[position, token], value, 6e-9)
        near(capped(model, hidden(model, ids[None], pieces, loops=loops))[0], expected.tolist(), 1e-10)
    model = random_model(narrow_config("frontier", **HEADS), seed=len(pieces)).eval()
    tensors = collect(dict(model.named_parameters()), 11)
    expected = forward(tensors, ids, loops=loops, bos_mask=True, pieces=pieces)["logits"]
    assert expected.std() > 0.1
    found = model.logits(ids[None], recurrence=loops) if bos == pieces else None
    if found is None:
        found = capped(model, hidden(model, ids[None], pieces, loops=loops))
    near(found[0], expected.tolist(), 1e-10)


@pytest.mark.parametrize("case", ORACLES["1c_no_document_mask"], ids=lambda c: f"{c['loops']}, {c['smear_bos_mask']}")
@torch.no_grad()
def test_two_rows_without_pieces(case: dict[str, Any]) -> None:
    ids = torch.stack([small_ids([0, 9, 17]), small_ids([5, 12], 30)])[:, :24]
    assert ids.tolist() == case["rows"]
    model = small_model(torch.float32, smear_gate_bos_fix=case["smear_bos_mask"], document_masking=False)
    logits = model.logits(ids, recurrence=case["loops"])
    for index, expected in logit_rows(case["logits"], "f32"):
        near(logits[index], expected, 1e-5)


@pytest.mark.parametrize(("loops", "key"), [(False, "loops_off"), (True, "loops_on")])
def test_runs_and_skips(loops: bool, key: str) -> None:
    config, expected = load_recipe("sp8192_frontier").config(), ORACLES["2_order"][key]
    encoder, decoder = split_order(config, recurrence=loops)
    assert (list(encoder), list(decoder)) == (expected["encoder_runs"], expected["decoder_runs"])
    plan = make_plan(config, recurrence=loops)
    pairs = {step.skip[0]: (plan[step.skip[1]].layer, step.layer) for step in plan if step.skip is not None}
    assert len(pairs) == (8 if loops else 5)
    for pair in expected["skip_pairs"]:
        assert pairs[pair["row"]] == (pair["source_layer"], pair["target_layer"])
    # the skips of the lanes are alive
    assert {step.layer for step in plan if step.skip is not None} >= {8, 9}


def test_describe_prints_counts_and_runs() -> None:
    recipe = load_recipe("sp8192_frontier")
    facts = describe(recipe.config(), recipe.published)
    assert facts["parameters"] == ORACLES["2_order"]["parameters_full_size"]["B"] == 35_945_673
    counts = {tensor["name"]: tensor["parameters"] for tensor in facts["tensors"]}
    assert counts["softcaps"] == 2 and facts["state_bytes"] == 135_394_084
    text = describe_text(facts)
    assert "encoder (0 1 2 3 4), decoder (5 6 7 8 9 10): 284.7 MFLOP per token" in text
    assert "encoder (0 1 2 3 4 5 3 4), decoder (5 3 4 5 6 7 8 9 10): 426.2 MFLOP per token" in text


def test_the_rotary_table() -> None:
    oracle, cpu = ORACLES["3_rotary"], torch.device("cpu")
    config = load_recipe("sp8192_frontier").config(device="cpu")
    for row in oracle["table_float32"]:
        table = rotary_table(101, 16, 1e4, kind=config.rotary_table, dtype=torch.float32, device=cpu)
        for found, key in zip(table, ("cos", "sin"), strict=True):
            # the script's angles are float32
            near(found[row["position"], 0], row[key], 1e-5)
    cosine, sine = rotary_table(5001, 16, 1e4, kind=config.rotary_table, dtype=torch.bfloat16, device=cpu)
    for row in oracle["table_cast_to_bfloat16"]:
        for found, key in ((cosine, "cos"), (sine, "sin")):
            near(found[row["position"], 0], row[key], 0, 2**-8)


def test_the_base_is_the_same_at_every_length() -> None:
    model = small_model(torch.float64)
    assert model.config.rope_train_seq_len == 8
    long = model.embed(torch.ones(1, 20000, dtype=torch.int64)).inputs.rotary
    for part, short in zip(long, model.embed(torch.ones(1, 24, dtype=torch.int64)).inputs.rotary, strict=True):
        assert torch.equal(part[:24], short)
    # an artifact keeps what the model needs
    assert {"rope_scaling", "smear_gate_bos_fix", "smear_gate"} <= set(MODEL_FIELDS)


@pytest.mark.parametrize(("script", "name"), [("A", "sp8192_ngram_tilt"), ("B", "sp8192_frontier")])
def test_initial_values(script: str, name: str) -> None:
    expected, recipe = ORACLES["9_initial_values"][script], load_recipe(name)
    torch.manual_seed(0)
    changes = {"model_dim": 64, "rope_dims": 4, "vocab_size": 259, "device": "cpu"}
    model = GPT(recipe.config(**changes))
    p = collect(dict(model.named_parameters()), 11)
    constants = {
        "q_gain": "q_gain", "attn_scale": "attn_scale", "lambda_resid": "lane_residual", "lambda_post": "lane_post", "skip_weights": "skip_weight",
        "skip_gates": "skip_gate", "attn_gate": "head_gate_max", "smear_w": "smear_w_max", "smear_lambda": "smear_lambda", "o": "W_o_max", "down": "down_max",
    }  # fmt: skip
    for tensor, key in constants.items():
        assert p[tensor].unique().tolist() == [expected[key]], tensor
    assert p["resid_mix"].unique(dim=2).flatten(1).unique(dim=0).flatten().tolist() == expected["resid_mix"]
    assert model.softcaps.tolist() == expected["softcaps"] and not model.softcaps.requires_grad
    for tensor in ("q", "k", "up"):
        assert torch.equal(p[tensor], p[tensor].bfloat16().float())
    for matrix, transposed in (("q", False), ("k", False), ("up", True)):
        for weight in p[matrix].detach():
            product = weight.T @ weight if transposed else weight @ weight.T
            assert (product - torch.eye(len(product))).abs().max() < 0.004
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.embedding.weight.float().std().item() == pytest.approx(0.005, rel=0.05)


@torch.no_grad()
def test_the_loss_of_the_whole_model_begins_at_ln_vocab() -> None:
    torch.manual_seed(0)
    model = GPT(load_recipe("sp8192_frontier").config(device="cpu"))
    ids = torch.randint(8192, (1, 257))
    ids[0, [0, 100]] = 1
    for loops in (False, True):
        loss = model.loss(ids[:, :-1], ids[:, 1:], recurrence=loops)
        assert float(loss) == pytest.approx(math.log(8192), abs=0.02)

from __future__ import annotations

import math

import pytest
import torch
from model_systems import CASES, SHALLOW, SYSTEMS, block_matrices, narrow_config, random_ids, random_model
from torch._dynamo.testing import CompileCounterWithBackend

from golf_kernels import cpu
from train.config import Config
from train.model.gpt import GPT, resolve_compute_dtype


@pytest.mark.parametrize("system", sorted(SYSTEMS))
@pytest.mark.parametrize("recurrence", [False, True])
def test_first_loss_is_the_logarithm_of_the_vocabulary(system: str, recurrence: bool) -> None:
    vocab_size = SYSTEMS[system]["vocab_size"]
    config = narrow_config(system, vocab_size=vocab_size)
    torch.manual_seed(0)
    model = GPT(config)
    ids, targets = (torch.randint(0, vocab_size, (8, 64)) for _ in range(2))
    loss = model.loss(ids, targets, recurrence=recurrence)
    assert loss.dtype == torch.float32
    # the tolerance that holds for all published logs
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.012)


def test_first_loss_of_a_published_width() -> None:
    torch.manual_seed(0)
    model = GPT(Config(num_layers=1, vocab_size=8192))
    ids, targets = (torch.randint(0, 8192, (2, 256)) for _ in range(2))
    assert model.loss(ids, targets, recurrence=False).item() == pytest.approx(9.0109, abs=0.012)


@pytest.mark.parametrize(("system", "recurrence"), CASES)
def test_gradients_equal_finite_differences(system: str, recurrence: bool) -> None:
    # the quantized forward of sp2048 has steps; its straight-through gradient has its own test
    config = narrow_config(system, **SHALLOW[system], qat=False)
    model, ids, targets = random_model(config), random_ids(config, 1, 9), random_ids(config, 1, 9, seed=2)
    model.loss(ids, targets, recurrence=recurrence).backward()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight.add_(direction, alpha=1e-6)
            above = model.loss(ids, targets, recurrence=recurrence)
            weight.sub_(direction, alpha=2e-6)
            below = model.loss(ids, targets, recurrence=recurrence)
            weight.add_(direction, alpha=1e-6)
        slope = ((above - below) / 2e-6).item()
        # the difference quotient itself is good to about 1e-16 / 1e-6 of a loss near 6, and to its third derivative
        assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=2e-8), name


@pytest.mark.parametrize(("recurrence", "dead"), [(False, [3, 4]), (True, [4])])
def test_skips_into_lanes_get_no_gradient(recurrence: bool, dead: list[int]) -> None:
    config = narrow_config("sp8192")
    model, ids = random_model(config), random_ids(config)
    model.loss(ids, ids.roll(-1, 1), recurrence=recurrence).backward()
    for weight in (model.skips.weights, model.skips.gates):
        silent = [row for row in range(5) if weight.grad[row].count_nonzero() == 0]
        assert silent == dead


def test_recur_scales_are_counted_saved_used_and_never_trained() -> None:
    config = narrow_config("sp4096")
    model, ids = random_model(config), random_ids(config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(ids, ids.roll(-1, 1), recurrence=True).backward()
        optimizer.step()
    assert "recur_scales" in model.state_dict()
    assert model.recur_scales.grad is None and torch.equal(model.recur_scales, torch.full((2, 32), 0.5).double())
    before = model.logits(ids, recurrence=True)
    model.recur_scales.data[1] = 7.0
    assert torch.equal(model.logits(ids, recurrence=True), before)
    model.recur_scales.data[0] = 0.0
    assert torch.equal(model.logits(ids, recurrence=True), model.logits(ids, recurrence=False))


def test_blend_without_saved_scales_is_half() -> None:
    config = narrow_config("sp4096")
    model = random_model(config)
    state = model.state_dict()
    state.pop("recur_scales")
    plain = random_model(config.replace(recur_scale_params=0))
    plain.load_state_dict(state)
    ids = random_ids(config)
    torch.testing.assert_close(
        plain.logits(ids, recurrence=True), model.logits(ids, recurrence=True), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("system", "recurrence"), CASES)
@torch.no_grad()
def test_no_position_sees_a_later_token(system: str, recurrence: bool) -> None:
    config = narrow_config(system)
    model, ids = random_model(config), random_ids(config)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 5) % config.vocab_size
    before, after = model.logits(ids, recurrence=recurrence), model.logits(changed, recurrence=recurrence)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("smear_gate", ["published", "document"])
@pytest.mark.parametrize("system", ["sp4096", "sp8192"])
@torch.no_grad()
def test_masked_documents_equal_documents_alone(system: str, smear_gate: str) -> None:
    # a rounded table knows more than distances
    changes = {"document_masking": True, "smear_gate": smear_gate, "rope_train_seq_len": 64, "rotary_table": "exact"}
    config = narrow_config(system, **changes)
    model = random_model(config)
    first, second = [1, 40, 41, 42], [1, 50, 51, 52, 53, 54]
    together = model.logits(torch.tensor([first + second]), recurrence=True)
    # rotary embeddings know distances alone, so a document's place in the row does not matter
    apart = [model.logits(torch.tensor([tokens]), recurrence=True) for tokens in (first, second)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=0, atol=1e-10)
    unmasked = random_model(config.replace(document_masking=False)).logits(
        torch.tensor([first + second]), recurrence=True
    )
    assert (unmasked - together)[:, 4:].abs().max() > 1e-3


def test_document_smear_alone_leaves_attention_open() -> None:
    config = narrow_config("sp8192", smear_gate="document")
    model = random_model(config)
    assert model.embed(random_ids(config)).inputs.documents is None
    x0 = model.embed(torch.tensor([[7, 8, 1, 9]])).inputs.x0
    begins = model.embed(torch.tensor([[1, 9]])).inputs.x0
    torch.testing.assert_close(x0[:, 2:], begins, rtol=0, atol=1e-14)


# one core: more only wait for each other at these widths


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_compiles_into_one_whole_graph_per_state_of_recurrence(system: str) -> None:
    torch._dynamo.reset()
    config = narrow_config(system, **SHALLOW[system])
    model, ids = random_model(config), random_ids(config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    states = (False, True) if config.recur_layers else (False,)
    for recurrence in (*states, *states):
        model.zero_grad()
        expected = model(ids, ids.roll(-1, 1), recurrence=recurrence)
        expected.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        model.zero_grad()
        found = compiled(ids, ids.roll(-1, 1), recurrence=recurrence)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-9, atol=1e-12)
    assert counter.frame_count == len(states)


def test_quantized_training_is_in_the_compiled_graph() -> None:
    torch._dynamo.reset()
    config = narrow_config("sp2048", num_layers=1)
    model, ids = random_model(config), random_ids(config)
    plain = random_model(config.replace(qat=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    quantized = compiled(ids, ids, recurrence=False)
    torch.testing.assert_close(quantized, model(ids, ids, recurrence=False), rtol=0, atol=1e-12)
    assert (quantized - plain(ids, ids, recurrence=False)).abs() > 1e-4
    quantized.backward()
    assert all(weight.grad.abs().max() > 0 for weight in block_matrices(model).values())


@pytest.mark.parametrize(("system", "recurrence"), CASES)
def test_bfloat16_runs_throughout_and_stays_near_float32(system: str, recurrence: bool) -> None:
    config = narrow_config(system)
    torch.manual_seed(0)
    model = GPT(config)
    model.compute_dtype = torch.bfloat16
    for weight in block_matrices(model).values():
        torch.nn.init.normal_(weight, std=0.1)
    ids, seen = random_ids(config), []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda _, args, output: seen.append({args[0].dtype, output.dtype}))
        block.mlp.register_forward_hook(lambda _, args, output: seen.append({args[0].dtype, output.dtype}))
    hidden = model.hidden(ids, recurrence=recurrence)
    assert hidden.dtype == torch.bfloat16 and model.head_weight.dtype == torch.bfloat16
    assert seen == [{torch.bfloat16}] * len(seen) and len(seen) >= 2 * config.num_layers
    loss = model.loss(ids, ids.roll(-1, 1), recurrence=recurrence)
    loss.backward()
    model.compute_dtype = torch.float32
    # bfloat16 keeps 8 bits; a loss near 5.6 from logits near zero is far better than that
    assert loss.item() == pytest.approx(model.loss(ids, ids.roll(-1, 1), recurrence=recurrence).item(), abs=0.02)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad.dtype == weight.dtype and weight.grad.isfinite().all(), name


def test_masters_are_float32_and_tables_have_their_dtype() -> None:
    tables = {"embedding.weight", "ve.embedding"}
    for dtype in (torch.bfloat16, torch.float32):
        config = narrow_config("sp8192", embed_dtype=str(dtype).removeprefix("torch."))
        for name, weight in GPT(config).named_parameters():
            assert weight.dtype == (dtype if name in tables else torch.float32), name


@pytest.mark.parametrize("fast", [False, True])
def test_compute_dtype_follows_the_device_and_the_width(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: fast)
    for width in (64, 128, 512):
        assert resolve_compute_dtype(Config(device="cuda", model_dim=width)) == torch.bfloat16
        wanted = torch.bfloat16 if fast and width >= 128 else torch.float32
        assert resolve_compute_dtype(Config(device="cpu", model_dim=width)) == wanted


def test_equal_seeds_make_equal_models() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(GPT(narrow_config("sp8192")).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])

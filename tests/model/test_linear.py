from __future__ import annotations

import pytest
import torch
from model_systems import SYSTEMS, block_matrices, narrow_config, random_ids, random_model

from train.model.linear import joint_linear, linear, observe_inputs, observing
from train.model.norm import rms_norm

# one core: more only wait for each other at these widths


def observed(system: str, *, recurrence: bool) -> tuple[list[tuple[str, torch.Tensor]], torch.Tensor]:
    config = narrow_config(system)
    model, ids, calls = random_model(config).eval(), random_ids(config), []
    with observe_inputs(model, lambda name, x: calls.append((name, x))):
        hidden = model.hidden(ids, recurrence=recurrence)
    return calls, hidden


def test_weight_is_cast_to_the_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 8, generator=generator), torch.randn(5, 8, generator=generator)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.1)):
        found = linear(x.to(dtype), weight)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=0, atol=tolerance)


def scaled(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, upstream: torch.Tensor, *, folded: bool):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, scale)]
    x, weight, scale = leaves
    y = linear(x, weight, scale=scale) if folded else scale.to(x.dtype) * linear(x, weight)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_scale_joins_the_weight_and_errs_no_more_than_one_after_the_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 67, width, generator=generator).to(dtype) for width in (32, 24))
    # masters are float32 and are rounded at use, so the truth is the one of unrounded masters
    weight, scale = (torch.randn(*size, generator=generator) for size in ((24, 32), (24,)))
    masters = [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (weight, scale)]
    y = scale.double() * (x.double() @ weight.double().T)
    through = (upstream.double() * scale.double()).flatten(0, 1)
    summed = (upstream.double() * (x.double() @ weight.double().T)).sum((0, 1))
    want = [y, upstream.double() * scale.double() @ weight.double(), through.T @ x.double().flatten(0, 1), summed]
    found, plain = (
        [float((g.double() - w).norm() / w.norm()) for g, w in zip(results, want, strict=True)]
        for results in (scaled(x, *masters, upstream, folded=folded) for folded in (True, False))
    )
    limits = [1e-14] * 4 if dtype == torch.float64 else plain
    assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (found, plain)


def joined(x: torch.Tensor, weights: list[torch.Tensor], upstream: list[torch.Tensor], *, joint: bool):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *weights)]
    rows = [len(weight) for weight in leaves[1:]]
    parts = (
        joint_linear(leaves[0], leaves[1:]).split(rows, -1)
        if joint
        else [linear(leaves[0], weight) for weight in leaves[1:]]
    )
    return [part.detach() for part in parts] + list(torch.autograd.grad(parts, leaves, upstream))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_product_of_several_weights_is_each_of_them_and_errs_no_more(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (24, 8, 16)
    x, *upstream = (torch.randn(3, 67, width, generator=generator).to(dtype) for width in (32, *rows))
    weights = [torch.randn(count, 32, generator=generator) for count in rows]
    masters = [weight.to(torch.promote_types(dtype, torch.float32)) for weight in weights]
    wide = [tensor.double() for tensor in (x, *weights, *upstream)]
    want = [wide[0] @ weight.T for weight in wide[1:4]]
    want.append(sum(up @ weight for up, weight in zip(wide[4:], wide[1:4], strict=True)))
    want += [up.flatten(0, 1).T @ wide[0].flatten(0, 1) for up in wide[4:]]
    found, plain = (
        [float((g.double() - w).norm() / w.norm()) for g, w in zip(results, want, strict=True)]
        for results in (joined(x, masters, upstream, joint=joint) for joint in (True, False))
    )
    limits = [1e-14] * 7 if dtype == torch.float64 else [1.001 * error for error in plain]
    assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (found, plain)
    # the gradient of x is rounded once instead of five times
    assert dtype == torch.float64 or found[3] < 0.9 * plain[3]


def test_a_scale_keeps_nothing_of_the_size_of_the_result() -> None:
    x, weight, scale = torch.randn(50, 8), torch.randn(6, 8).requires_grad_(), torch.randn(6).requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        linear(x, weight, scale=scale)
    assert (50, 8) in kept and (50, 6) not in kept


def test_every_matrix_is_seen_once_per_run_of_its_layer() -> None:
    calls, _ = observed("sp8192", recurrence=True)
    names = [name for name, _ in calls]
    model = random_model(narrow_config("sp8192"))
    expected = {*block_matrices(model), "ve.proj", "embedding.weight"}
    assert set(names) == expected and len(block_matrices(model)) == 66
    repeated = {name for name in names if names.count(name) == 2}
    assert repeated == {name for name in block_matrices(model) if name.split(".")[1] in ("3", "4", "5")}
    assert {names.count(name) for name in expected - repeated} == {1}


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_observed_inputs_have_the_width_of_their_matrix_and_the_result_is_the_same(system: str) -> None:
    config = narrow_config(system)
    calls, hidden = observed(system, recurrence=True)
    model = random_model(config).eval()
    parameters = dict(model.named_parameters())
    for name, x in calls:
        assert x.shape == (2, 13, parameters[name].shape[1]) and not x.requires_grad
    torch.testing.assert_close(hidden, model.hidden(random_ids(config), recurrence=True), rtol=0, atol=1e-12)
    assert torch.equal(calls[-1][1], hidden) and calls[-1][0] == "embedding.weight"


def test_inputs_are_the_ones_that_the_products_use() -> None:
    config = narrow_config("baseline")
    calls, _ = observed("baseline", recurrence=False)
    model, ids = random_model(config), random_ids(config)
    seen = dict(calls)
    query, key, value = (seen[f"blocks.0.attention.{name}"] for name in ("query", "key", "value"))
    assert query is key or query.data_ptr() == key.data_ptr() == value.data_ptr()
    x0 = rms_norm(model.embedding.weight[ids])
    mix = model.blocks[0].resid_mix
    torch.testing.assert_close(query, rms_norm((mix[0] + mix[1]) * x0), rtol=0, atol=1e-12)
    hidden = seen["blocks.0.mlp.up"] @ model.blocks[0].mlp.up.T
    torch.testing.assert_close(seen["blocks.0.mlp.down"], hidden.clamp_min(0) ** 2, rtol=0, atol=1e-12)


def test_observation_ends_with_its_context_and_is_not_nested() -> None:
    model = random_model(narrow_config("baseline", num_layers=2))
    calls: list[str] = []
    with observe_inputs(model, lambda name, _: calls.append(name)):
        assert observing()
        with pytest.raises(RuntimeError, match="already"), observe_inputs(model, lambda *_: None):
            pass
        # another model's matrices are not reported
        random_model(narrow_config("baseline", num_layers=2)).hidden(torch.tensor([[1, 2]]), recurrence=False)
    assert calls == [] and not observing()
    with pytest.raises(KeyError), observe_inputs(model, lambda *_: None):
        raise KeyError
    assert not observing()

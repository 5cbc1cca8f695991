"""XSA and its analytic backward, against autograd of the plain formula in float64."""

import pytest
import torch
from operator_truth import assert_compiles, errors, exactly, random
from torch._subclasses.fake_tensor import FakeTensorMode
from xsa_truth import LEAVES, errors_of_both, formula, heads, run

from golf_kernels import dispatch
from golf_kernels.xsa import EPS, xsa


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "xsa=torch")


@pytest.mark.parametrize(
    "sizes", [(2, 5, 4, 2, 6), (1, 1, 1, 1, 2), (3, 7, 6, 3, 5), (2, 33, 8, 4, 64), (1, 9, 8, 8, 128), (2, 3, 8, 1, 1)]
)
def test_results_and_gradients_in_float64(sizes):
    tensors, dy = heads(*sizes)
    got, want = (run(function, tensors, dy) for function in (xsa, formula))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-13)


def test_a_value_serves_the_heads_beside_each_other():
    tensors, _ = heads(1, 1, 4, 2, 2)
    tensors["value"] = torch.tensor([[[[3.0, 0.0], [0.0, -0.1]]]], dtype=torch.float64)
    left = xsa(**tensors)[0, 0]
    assert not left[:2, 0].count_nonzero() and torch.equal(left[:2, 1], tensors["output"][0, 0, :2, 1])
    assert not left[2:, 1].count_nonzero() and torch.equal(left[2:, 0], tensors["output"][0, 0, 2:, 0])


def test_nothing_is_left_along_the_value_and_no_gradient_either():
    tensors, dy = heads(2, 11, 6, 2, 16)
    got = run(xsa, tensors, dy)
    repeated = tensors["value"].repeat_interleave(3, dim=2)
    for along in ((got["y"] * repeated).sum(-1), (got["output"] * repeated).sum(-1)):
        assert along.abs().max() < 1e-13
    # y does not change with the length of the value
    assert (got["value"] * tensors["value"]).sum(-1).abs().max() < 1e-13


def test_gradcheck():
    tensors, _ = heads(1, 3, 4, 2, 3)
    assert torch.autograd.gradcheck(xsa, tuple(tensors.values()))


@pytest.mark.parametrize("scale", [0.0, 1e-14, 9e-13, 1.1e-12, 1e-6])
def test_short_values_are_as_normalize_has_them(scale):
    tensors, dy = heads(1, 4, 4, 2, 6)
    value = tensors["value"].detach()
    tensors["value"] = (scale * value / value.norm(dim=-1, keepdim=True)).requires_grad_()
    got, want = (run(function, tensors, dy) for function in (xsa, formula))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12 / max(scale, EPS) * (name == "value"))
    if not scale:
        assert torch.equal(got["y"], tensors["output"]) and not got["value"].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_large_and_broken_rows(dtype):
    tensors, dy = heads(2, 5, 4, 2, 16, dtype)
    value, output = (tensors[name].detach().clone() for name in ("value", "output"))
    value[0, 0] = 0
    value[0, 1] *= 3e4 / value[0, 1].abs().max()
    value[0, 2, 0, 3] = float("nan")
    output[0, 3, 3, 5] = float("nan")
    tensors = {"output": output.requires_grad_(), "value": value.requires_grad_()}
    got, want = run(xsa, tensors, dy), run(formula, exactly(tensors), dy.double())
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=8e-3, atol=1e-2, equal_nan=True)
    assert torch.equal(got["y"][0, 0], output[0, 0]) and not got["value"][0, 0].count_nonzero()
    assert got["y"][0, 2].isnan().all(dim=-1).tolist() == [True, True, False, False]
    assert got["value"][0, 3].isnan().all(dim=-1).tolist() == [False, True] and not got["output"][0, 3].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2)])
def test_empty(shape):
    tensors, dy = heads(*shape)
    got = run(xsa, tensors, dy)
    assert [got[name].shape for name in ("y", *LEAVES)] == [(*shape[:3], 6), (*shape[:3], 6), (*shape[:2], 2, 6)]
    assert all(not tensor.count_nonzero() for tensor in got.values())


def test_strides_and_values_from_some_position_on_do_not_matter():
    joint = random(2, 9, 2 * 12 + 5, seed=3)
    tensors = {
        "output": random(2, 4, 5, 6, seed=4).transpose(1, 2),
        "value": joint[:, 4:, 5:].unflatten(-1, (2, 12))[..., ::2],
    }
    tensors = {name: view.detach().requires_grad_() for name, view in tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in tensors.values())
    # as the gradients of a sum and of an attention with heads first arrive
    for dy in (random(1, 1, 1, 6, seed=5).expand(2, 5, 4, 6), random(2, 4, 5, 6, seed=6).transpose(1, 2)):
        got, want = (run(function, tensors, dy) for function in (xsa, formula))
        assert all(tensor.is_contiguous() for tensor in got.values())
        assert all(error < 1e-13 for error in errors(got, want).values())


@pytest.mark.parametrize("sizes", [(2, 50, 8, 4, 64), (1, 50, 8, 8, 64), (1, 50, 4, 2, 128)])
def test_float32_is_close_to_float64(sizes):
    found, _ = errors_of_both(*heads(*sizes, dtype=torch.float32))
    assert all(error < 2e-7 for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 99, 8, 4, 64), (1, 99, 8, 8, 64), (1, 99, 4, 2, 128)])
def test_errs_no_more_than_the_plain_chain(dtype, sizes):
    found, plain = errors_of_both(*heads(*sizes, dtype=dtype))
    assert all(found[name] <= plain[name] for name in plain), (found, plain)
    # one rounding of each result
    assert all(error < 0.5 * torch.finfo(dtype).eps for error in found.values()), found


def test_an_output_along_its_value_leaves_rounding_alone():
    value = random(1, 40, 2, 64, seed=1)
    output = (3 * value.repeat_interleave(2, dim=2)).bfloat16()
    left = xsa(output, value.bfloat16())
    assert left.norm() < 1e-2 * output.norm()
    assert left.norm() < formula(output, value.bfloat16()).norm()


def test_only_the_inputs_are_kept():
    tensors, _ = heads(dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        xsa(**tensors)
    assert [t.data_ptr() for t in kept] == [tensors[name].data_ptr() for name in LEAVES]


def test_one_gradient_alone():
    tensors, dy = heads()
    want = run(formula, tensors, dy)
    for name in LEAVES:
        alone = {other: tensor if other == name else tensor.detach() for other, tensor in tensors.items()}
        found = torch.autograd.grad(xsa(**alone), alone[name], dy)[0]
        assert torch.allclose(found, want[name], rtol=1e-12, atol=1e-13)


def test_the_gradient_of_the_value_adds_to_what_attention_passes_it():
    tensors, dy = heads()

    def attended(function):
        value = tensors["value"]
        mixed = torch.tril(torch.ones(5, 5).double()).matmul(value.flatten(2)).view_as(value)
        return function(tensors["output"] + mixed.repeat_interleave(2, dim=2), value)

    got, want = (torch.autograd.grad(attended(f), list(tensors.values()), dy) for f in (xsa, formula))
    assert all(torch.allclose(g, w, rtol=1e-12, atol=1e-13) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 5, 24)}, r"output: expected shape \(B, T, H, D\)"),
        ({"output": torch.zeros(2, 5, 4, 6, dtype=torch.int64)}, "output: expected .* floating dtype"),
        ({"output": torch.zeros(2, 5, 4, 0)}, "output: expected shape"),
        ({"value": torch.zeros(2, 4, 2, 6)}, r"value: expected shape \(2, 5, H_kv, 6\).*, found \(2, 4, 2, 6\)"),
        ({"value": torch.zeros(2, 5, 12)}, r"value: expected shape .* found \(2, 5, 12\)"),
        ({"value": torch.zeros(2, 5, 2, 8)}, "value: expected shape"),
        ({"value": torch.zeros(2, 5, 3, 6)}, "H_kv a divisor of its 4 heads"),
        ({"value": torch.zeros(2, 5, 8, 6)}, "H_kv a divisor of its 4 heads"),
        ({"value": torch.zeros(2, 5, 0, 6)}, "H_kv a divisor of its 4 heads"),
        ({"value": torch.zeros(2, 5, 2, 6).double()}, "value: expected torch.float32 on cpu like output"),
        ({"value": torch.zeros(2, 5, 2, 6, device="meta")}, "value: .* found torch.float32 on meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    tensors, _ = heads(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        xsa(**tensors | change)


def test_second_derivatives_are_refused():
    tensors, _ = heads()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(xsa(**tensors).sum(), tensors["output"], create_graph=True)


def test_opcheck():
    tensors, dy = heads(dtype=torch.float32)
    torch.library.opcheck(torch.ops.golf.xsa.default, tuple(tensors.values()))
    # heads first, and dimensions first
    views = (
        random(2, 4, 5, 6, dtype=torch.float32).transpose(1, 2),
        random(6, 2, 5, 2, dtype=torch.float32).movedim(0, -1),
    )
    torch.library.opcheck(torch.ops.golf.xsa.default, views)
    torch.library.opcheck(torch.ops.golf.xsa_backward.default, (dy, *views))


def test_compiles_as_one_graph():
    tensors, dy = heads()
    assert_compiles(lambda f: run(f, tensors, dy), xsa, backend="aot_eager")


def test_fake_tensors_on_cuda():
    # autograd itself needs a real CUDA build, so the backward operator is called by hand
    with FakeTensorMode():
        output = torch.empty(2, 8, 5, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        value = torch.empty(2, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
        y = torch.ops.golf.xsa(output, value)
        found = (y, *torch.ops.golf.xsa_backward(y, output, value))
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in (output, output, value)]
        assert all(t.device.type == "cuda" and t.is_contiguous() for t in found)


def test_a_kernel_runs_only_when_forced(monkeypatch):
    monkeypatch.delenv("GOLF_BACKEND")
    for op in ("xsa", "xsa_backward"):
        choice = dispatch.choose(op, device="cuda")
        assert choice == ("torch", "triton: not chosen: python -m golf_kernels tune")

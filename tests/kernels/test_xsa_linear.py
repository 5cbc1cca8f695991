"""XSA with the linear layer behind it and its analytic backward, against autograd of the plain formula in float64."""

import pytest
import torch
import xsa_truth
from operator_truth import assert_compiles, errors, random
from torch._subclasses.fake_tensor import FakeTensorMode
from xsa_linear_truth import LEAVES, call, errors_of_both, formula, run

from golf_kernels import dispatch
from golf_kernels.xsa_linear import xsa_linear


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "xsa_linear=torch")


@pytest.mark.parametrize(
    "sizes",
    [(2, 5, 4, 2, 6, 8), (1, 1, 1, 1, 2, 1), (3, 7, 6, 3, 5, 11), (2, 33, 8, 4, 64, 40), (1, 9, 8, 8, 32, 7)],
)
def test_results_and_gradients_in_float64(sizes):
    tensors, dy = call(*sizes)
    got, want = (run(function, tensors, dy) for function in (xsa_linear, formula))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-13)
        assert got[name].is_contiguous()


def test_gradcheck():
    tensors, _ = call(1, 3, 4, 2, 3, 5)
    assert torch.autograd.gradcheck(xsa_linear, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 99, 8, 4, 64, 512), (1, 99, 8, 8, 32, 256)])
def test_errs_no_more_than_the_plain_chain(dtype, sizes):
    found, plain = errors_of_both(*call(*sizes, dtype=dtype))
    assert all(found[name] <= plain[name] for name in plain), (found, plain)


def test_zero_and_broken_rows_stay_where_they_are():
    tensors, dy = call(2, 5, 4, 2, 16, 8, torch.float32)
    value, output = (tensors[name].detach().clone() for name in ("value", "output"))
    value[0, 0] = 0
    value[0, 2, 0, 3] = output[0, 3, 3, 5] = float("nan")
    got = run(xsa_linear, {"output": output, "value": value, "weight": tensors["weight"].detach()} | {
        name: tensor.requires_grad_() for name, tensor in (("output", output), ("value", value))
    } | {"weight": tensors["weight"]}, dy)  # fmt: skip
    assert (
        got["y"].isnan().all(dim=-1).nonzero().tolist()
        == [[0, 2], [0, 3]]
        == got["y"].isnan().any(-1).nonzero().tolist()
    )
    assert not got["value"][0, 0].count_nonzero()
    torch.testing.assert_close(got["y"][0, 0], output.detach()[0, 0].flatten() @ tensors["weight"].detach().T)


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2)])
@pytest.mark.parametrize("columns", [8, 0])
def test_empty(shape, columns):
    tensors, dy = call(*shape, columns=columns)
    got = run(xsa_linear, tensors, dy)
    assert got["y"].shape == (*shape[:2], columns)
    assert all(got[name].shape == tensors[name].shape for name in LEAVES)
    assert all(not tensor.count_nonzero() for tensor in got.values())


def test_strides_do_not_matter():
    joint = random(2, 9, 2 * 12 + 5, seed=3)
    tensors = {
        "output": random(2, 4, 5, 6, seed=4).transpose(1, 2),
        "value": joint[:, 4:, 5:].unflatten(-1, (2, 12))[..., ::2],
        "weight": random(24, 8, seed=7).T,
    }
    tensors = {name: view.detach().requires_grad_() for name, view in tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in tensors.values())
    # as the gradients of a sum and of a transposed result arrive
    for dy in (random(1, 1, 8, seed=5).expand(2, 5, 8), random(8, 5, 2, seed=6).transpose(0, 2)):
        got, want = (run(function, tensors, dy) for function in (xsa_linear, formula))
        assert all(tensor.is_contiguous() for tensor in got.values())
        assert all(error < 1e-13 for error in errors(got, want).values())


def test_only_the_inputs_are_kept():
    tensors, _ = call(dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        xsa_linear(**tensors)
    assert [t.data_ptr() for t in kept] == [tensors[name].data_ptr() for name in LEAVES]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 5, 24)}, r"output: expected shape \(B, T, H, D\)"),
        ({"value": torch.zeros(2, 5, 3, 6)}, "H_kv a divisor of its 4 heads"),
        ({"weight": torch.zeros(8, 6)}, r"weight: expected shape \(N, 24\).*\(4, 6\), found \(8, 6\)"),
        ({"weight": torch.zeros(24)}, r"weight: expected shape \(N, 24\)"),
        ({"weight": torch.zeros(8, 24).double()}, "weight: expected torch.float32 on cpu like output"),
        ({"weight": torch.zeros(8, 24, device="meta")}, "weight: .* found torch.float32 on meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    tensors, _ = call(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        xsa_linear(**tensors | change)


def test_second_derivatives_are_refused():
    tensors, _ = call()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(xsa_linear(**tensors).sum(), tensors["output"], create_graph=True)


def test_opcheck():
    tensors, dy = call(dtype=torch.float32)
    torch.library.opcheck(torch.ops.golf.xsa_linear.default, tuple(tensors.values()))
    views = (
        random(2, 4, 5, 6, dtype=torch.float32).transpose(1, 2),
        random(6, 2, 5, 2, dtype=torch.float32).movedim(0, -1),
        random(24, 8, dtype=torch.float32).T,
    )
    torch.library.opcheck(torch.ops.golf.xsa_linear.default, views)
    torch.library.opcheck(torch.ops.golf.xsa_linear_backward.default, (dy, *views))


def test_compiles_as_one_graph():
    tensors, dy = call()
    assert_compiles(lambda f: run(f, tensors, dy), xsa_linear, backend="aot_eager")


def test_fake_tensors_on_cuda():
    # autograd itself needs a real CUDA build, so the backward operator is called by hand
    with FakeTensorMode():
        output = torch.empty(2, 8, 5, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        value = torch.empty(2, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(40, 512, device="cuda", dtype=torch.bfloat16)
        y = torch.ops.golf.xsa_linear(output, value, weight)
        found = torch.ops.golf.xsa_linear_backward(y, output, value, weight)
        assert y.shape == (2, 5, 40) and [t.shape for t in found] == [t.shape for t in (output, value, weight)]
        assert all(t.device.type == "cuda" and t.dtype == y.dtype and t.is_contiguous() for t in (y, *found))


def test_a_kernel_runs_only_when_forced_and_not_by_the_name_of_xsa(monkeypatch):
    for forced in ("", "xsa=triton"):
        monkeypatch.setenv("GOLF_BACKEND", forced)
        # a machine that has what xsa's kernels need
        monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
        for op in ("xsa_linear", "xsa_linear_backward"):
            choice = dispatch.choose(op, device="cuda")
            assert choice == ("torch", "triton: only when forced: not yet measured in a training step")


def test_is_xsa_and_a_product():
    tensors, _ = call(dtype=torch.float64)
    removed = xsa_truth.formula(tensors["output"], tensors["value"])
    identity = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(xsa_linear(tensors["output"], tensors["value"], identity), removed.flatten(2))

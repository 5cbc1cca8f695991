"""QK-norm, rotation and gain, and their analytic backward, against autograd of the plain formula in float64."""

import pytest
import torch
from operator_truth import assert_compiles, errors, exactly, random
from qk_norm_rope_truth import EPS, LEAVES, errors_of_both, formula, heads, run, truth, upstream
from torch._subclasses.fake_tensor import FakeTensorMode

from golf_kernels import dispatch
from golf_kernels.qk_norm_rope import qk_norm_rope, written_out


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "qk_norm_rope=torch")


@pytest.mark.parametrize("rotary", [0, 2, 4, 6])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_results_and_gradients_in_float64(rotary, eps):
    tensors = heads(rotary=rotary)
    found = errors(*(run(f, tensors, upstream(tensors), eps) for f in (qk_norm_rope, formula)))
    assert all(error < 1e-13 for error in found.values()), found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotary", [0, 4, 6])
def test_written_out_for_a_compiler_it_is_the_same(rotary, compiled):
    function = torch.compile(written_out, backend="aot_eager", fullgraph=True) if compiled else written_out
    tensors = heads(rotary=rotary)
    found = errors(*(run(f, tensors, upstream(tensors), 0.3) for f in (function, formula)))
    assert all(error < 1e-13 for error in found.values()), found


def test_written_out_has_no_second_derivative_that_is_wrong():
    tensors = heads()
    first = torch.autograd.grad(written_out(**tensors, eps=0.3)[0].square().sum(), tensors["q"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 2, 2), (3, 7, 5, 1, 10, 6), (2, 33, 8, 4, 64, 16), (1, 4, 2, 6, 3, 2)])
def test_shapes(sizes):
    tensors = heads(*sizes)
    found = errors(*(run(f, tensors, upstream(tensors)) for f in (qk_norm_rope, formula)))
    assert all(error < 1e-12 for error in found.values()), found


def test_tables_that_were_rounded_turn_and_stretch_and_are_inverted_exactly():
    tensors = heads(dim=8, rotary=6)
    for name in ("cosine", "sine"):
        tensors[name] = tensors[name].bfloat16().double()
    assert (tensors["cosine"].square() + tensors["sine"].square() - 1).abs().max() > 1e-3
    found = errors(*(run(f, tensors, upstream(tensors)) for f in (qk_norm_rope, formula)))
    assert all(error < 1e-13 for error in found.values()), found


@pytest.mark.parametrize("gain", [None, 0.0])
def test_gradcheck(gain):
    tensors = heads(batch=1, length=3)
    if gain is not None:
        tensors["gain"] = torch.tensor([gain, -gain, gain, 2.0], dtype=torch.float64).requires_grad_()

    def function(q, k, gain):
        return qk_norm_rope(**tensors | {"q": q, "k": k, "gain": gain}, eps=1e-2)

    assert torch.autograd.gradcheck(function, tuple(tensors[name] for name in LEAVES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gain_of_zero_has_its_gradient_and_can_leave(dtype):
    tensors = heads(length=40, dim=16, dtype=dtype)
    tensors["gain"] = torch.tensor([0.0, -0.0, 1e-30, -1e-30]).requires_grad_()
    got = run(qk_norm_rope, tensors, upstream(tensors))
    want = truth(tensors)
    # float16 has no exponents left: 2^-12 is as near as it comes
    room = 2.0**-12 if dtype == torch.float16 else 2.0**-60
    assert got["q_hat"].abs().max() <= 4 * room and got["q"].abs().max() <= 50 * room
    rounding = max(torch.finfo(dtype).eps, 1e-6 if tensors["gain"].dtype == torch.float32 else 0)
    assert want["gain"].abs().min() > 1 and errors(got, want)["gain"] < rounding


def test_a_softmax_cannot_tell_the_floor_from_zero():
    tensors = heads(length=9, dim=16, dtype=torch.float32)
    tensors["gain"] = torch.zeros(4)
    queries, keys = qk_norm_rope(**tensors, eps=EPS)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys.repeat_interleave(2, dim=2))
    assert torch.equal(scores.softmax(-1), torch.full_like(scores, 1 / 9))


def test_the_same_vector_has_the_same_product_before_and_after_the_rotation():
    # what the backward pass rests on: gain · dgain = ⟨dq̂, q̂⟩, summed over positions
    tensors = heads(length=11, dim=8, rotary=8)
    dq, dk = upstream(tensors)
    got = run(qk_norm_rope, tensors, [dq, dk])
    assert torch.allclose(tensors["gain"] * got["gain"], (dq * got["q_hat"]).sum(dim=(0, 1, 3)), rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2), (2, 5, 4, 0)])
def test_empty(shape):
    tensors = heads(*shape)
    got = run(qk_norm_rope, tensors, upstream(tensors))
    want = run(formula, tensors, upstream(tensors))
    assert all(
        torch.allclose(got[name], want[name], rtol=1e-12) and got[name].shape == want[name].shape for name in want
    )


def test_strides_and_a_table_from_some_position_on_do_not_matter():
    tensors = heads(batch=2, length=6, dim=8)
    product = random(2, 6, 4 * 8 + 2 * 8 + 2 * 8, seed=7)
    views = {
        "q": product[..., :32].unflatten(-1, (4, 8)),
        "k": product[..., 32:48].unflatten(-1, (2, 8)).transpose(0, 1).contiguous().transpose(0, 1),
        "cosine": torch.cat([tensors["sine"], tensors["cosine"]])[6:],
        "sine": torch.cat([tensors["sine"]] * 2, dim=2)[:, :, :2],
        "gain": tensors["gain"].detach().repeat(2)[::2],
    }
    views = {name: view.detach().requires_grad_(name in LEAVES) for name, view in views.items()}
    # as the gradients of a sum and of an attention with heads first arrive
    gradients = [random(1, 1, 1, 8, seed=9).expand(2, 6, 4, 8), random(2, 2, 6, 8, seed=10).transpose(1, 2)]
    found = errors(*(run(f, views, gradients) for f in (qk_norm_rope, formula)))
    assert all(error < 1e-13 for error in found.values()), found


def test_float32_is_close_to_float64():
    tensors = heads(length=50, dim=64, rotary=16, dtype=torch.float32)
    found, _ = errors_of_both(tensors)
    assert all(error < 1e-6 for error in found.values()), found


@pytest.mark.parametrize("rotary", [16, 64])
def test_bfloat16_errs_no_more_than_the_plain_chain(rotary):
    tensors = heads(length=200, dim=64, rotary=rotary, dtype=torch.bfloat16)
    found, plain = errors_of_both(tensors)
    assert all(found[name] <= plain[name] for name in plain), (found, plain)


def test_a_wide_gain_counts_rounded_and_its_gradient_is_not_rounded():
    tensors = heads(length=100, dim=16, dtype=torch.bfloat16)
    wide = tensors | {"gain": torch.tensor([1.001, 2.3, -0.7, 5.0]).requires_grad_()}
    narrow = tensors | {"gain": wide["gain"].detach().bfloat16().requires_grad_()}
    got, rounded = (run(qk_norm_rope, t, upstream(tensors)) for t in (wide, narrow))
    assert all(torch.equal(got[name], rounded[name]) for name in ("q_hat", "k_hat", "q", "k"))
    assert got["gain"].dtype == torch.float32 and torch.equal(got["gain"].bfloat16(), rounded["gain"])
    want = run(formula, exactly(narrow), [g.double() for g in upstream(tensors)])
    assert errors(got, want)["gain"] < errors(rounded, want)["gain"]


def test_large_small_and_broken_rows():
    tensors = heads(length=5, dim=8)
    q = tensors["q"].detach().clone()
    q[0, 0] *= 1e15
    q[0, 1] *= 1e-15
    q[0, 2] = 0
    q[0, 3, 1, 5] = float("nan")
    tensors["q"] = q.requires_grad_()
    got, want = (run(f, tensors, upstream(tensors)) for f in (qk_norm_rope, formula))
    assert got["q_hat"][0, 3, 1].isnan().all() and got["q"][0, 3, 1].isnan().all()
    assert got["gain"].isnan().tolist() == [False, True, False, False]
    assert torch.equal(got["q_hat"][0, 2], torch.zeros(4, 8).double())
    for name in ("q_hat", "q"):
        keep = torch.ones(2, 5, 4, dtype=torch.bool)
        keep[0, 3, 1] = False
        for at in keep.nonzero().tolist():
            found, exact = got[name][tuple(at)], want[name][tuple(at)]
            assert (found - exact).norm() <= 1e-9 * tensors["gain"].abs().max() + 1e-12 * exact.norm(), (name, at)


def test_only_what_backward_needs_is_kept():
    tensors = heads(dim=8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q_hat, k_hat = qk_norm_rope(**tensors, eps=EPS)
    shapes = [(2, 5, 4, 8), (2, 5, 2, 8), (5, 1, 2), (5, 1, 2), (4,), (2, 5, 6)]
    assert sorted(tuple(t.shape) for t in kept) == sorted(shapes)
    assert not torch.ops.golf.qk_norm_rope(*tensors.values(), EPS)[2].requires_grad
    # the large ones are the results themselves
    addresses = {t.data_ptr() for t in kept if t.ndim == 4 and t.shape[-1] == 8}
    assert addresses == {q_hat.data_ptr(), k_hat.data_ptr()}


def test_a_result_that_nothing_uses():
    tensors = heads()
    keys = qk_norm_rope(**tensors, eps=EPS)[1]
    dq, dk, dgain = torch.autograd.grad(keys.square().sum(), [tensors[name] for name in LEAVES], allow_unused=True)
    want = torch.autograd.grad(formula(**tensors, eps=EPS)[1].square().sum(), tensors["k"])[0]
    assert torch.allclose(dk, want, atol=1e-12) and all(not g.count_nonzero() for g in (dq, dgain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 24)}, r"q: expected shape \(B, T, H, D\)"),
        ({"q": torch.zeros(2, 5, 4, 6, dtype=torch.int64)}, "q: expected .* floating dtype"),
        ({"q": torch.zeros(2, 5, 4, 0)}, "q: expected shape"),
        ({"k": torch.zeros(2, 4, 2, 6)}, r"k: expected shape \(2, 5, H_kv, 6\) like q, found \(2, 4, 2, 6\)"),
        ({"k": torch.zeros(2, 5, 2, 8)}, "k: expected shape"),
        ({"k": torch.zeros(2, 5, 2, 6).double()}, "k: expected torch.float32 on cpu like q, found torch.float64"),
        ({"cosine": torch.zeros(6, 1, 2)}, r"cosine: expected shape \(5, 1, r/2\) with r <= 6"),
        ({"cosine": torch.zeros(5, 1, 4)}, "cosine: expected shape"),
        ({"sine": torch.zeros(5, 1, 1)}, r"sine: expected shape \(5, 1, 2\)"),
        ({"sine": torch.zeros(5, 1, 2).double()}, "sine: expected torch.float32 on cpu"),
        ({"gain": torch.zeros(2)}, r"gain: expected shape \(4,\), found \(2,\)"),
        ({"gain": torch.zeros(4).bfloat16()}, "gain: expected torch.float32 on cpu like q, found torch.bfloat16"),
    ],
)
def test_bad_input_is_refused(change, message):
    tensors = heads(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**tensors | change, eps=EPS)


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        qk_norm_rope(**heads(), eps=eps)


def test_second_derivatives_and_gradients_of_tables_are_refused():
    tensors = heads()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(qk_norm_rope(**tensors, eps=EPS)[0].sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient for cosine and sine"):
        qk_norm_rope(**tensors | {"sine": tensors["sine"].requires_grad_()}, eps=EPS)


def test_opcheck():
    tensors = heads(dtype=torch.float32)
    torch.library.opcheck(torch.ops.golf.qk_norm_rope.default, (*tensors.values(), EPS))
    heads_first = random(2, 4, 5, 6, dtype=torch.float32).transpose(1, 2)
    torch.library.opcheck(torch.ops.golf.qk_norm_rope.default, (heads_first, *list(tensors.values())[1:], EPS))
    plain = [t.detach() for t in tensors.values()]
    q_hat, k_hat, rstd = torch.ops.golf.qk_norm_rope(*plain, EPS)
    backward = (*upstream(tensors), q_hat, k_hat, *plain[2:], rstd)
    torch.library.opcheck(torch.ops.golf.qk_norm_rope_backward.default, backward)


def test_compiles_as_one_graph():
    tensors = heads()
    assert_compiles(lambda f: run(f, tensors, upstream(tensors)), qk_norm_rope, backend="aot_eager")


def test_fake_tensors_on_cuda():
    # autograd itself needs a real CUDA build, so the backward operator is called by hand
    with FakeTensorMode():
        shapes = ((2, 5, 8, 64), (2, 5, 4, 64), (5, 1, 8), (5, 1, 8))
        inputs = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        gain = torch.empty(8, device="cuda")
        q_hat, k_hat, rstd = torch.ops.golf.qk_norm_rope(*inputs, gain, EPS)
        assert rstd.shape == (2, 5, 12) and rstd.dtype == torch.float32
        found = torch.ops.golf.qk_norm_rope_backward(q_hat, k_hat, q_hat, k_hat, *inputs[2:], gain, rstd)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in (*inputs[:2], gain)]
        assert all(t.device.type == "cuda" and t.is_contiguous() for t in (q_hat, k_hat, rstd, *found))


def test_a_kernel_runs_only_when_forced(monkeypatch):
    monkeypatch.delenv("GOLF_BACKEND")
    for op in ("qk_norm_rope", "qk_norm_rope_backward"):
        choice = dispatch.choose(op, device="cuda")
        assert choice == ("torch", "triton: not chosen: python -m golf_kernels tune")

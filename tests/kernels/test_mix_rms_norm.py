"""The residual mix and its norm, and their analytic backward, against autograd of the plain formula in float64."""

import pytest
import torch
from mix_rms_norm_truth import EPS, LEAVES, errors_of_both, formula, run, streams, upstream
from operator_truth import assert_compiles, errors, exactly, random
from torch._subclasses.fake_tensor import FakeTensorMode

from golf_kernels import dispatch
from golf_kernels.mix_rms_norm import mix_rms_norm


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "mix_rms_norm=torch")


@pytest.mark.parametrize("sizes", [(2, 5, 8), (1, 1, 1), (3, 1, 7), (2, 33, 512)])
@pytest.mark.parametrize(("eps", "gain"), [(0.0, 1.0), (0.3, 0.25)])
def test_results_and_gradients_in_float64(sizes, eps, gain):
    tensors = streams(*sizes)
    found, want = (run(f, tensors, upstream(tensors), eps, gain) for f in (mix_rms_norm, formula))
    # a single number of any size has the norm 1, so that all of its gradient cancels
    scale = {name: max(float(w.norm()), 1e-3) for name, w in want.items()}
    assert all(float((found[name] - want[name]).norm()) < 1e-12 * scale[name] for name in want)


def test_gradcheck():
    tensors = streams(2, 3, 5)

    def function(x, x0, mix):
        return mix_rms_norm(x, x0, mix, eps=1e-2, gain=0.7)

    assert torch.autograd.gradcheck(function, tuple(tensors[name] for name in LEAVES))


def test_one_stream_twice_has_both_gradients():
    # the first layer mixes the embedding with itself
    x, mix = random(2, 5, 8).requires_grad_(), random(2, 8, seed=2).requires_grad_()
    gradients = [random(2, 5, 8, seed=seed) for seed in (9, 10)]
    found, want = (
        torch.autograd.grad(f(x, x, mix, eps=EPS, gain=1.0), (x, mix), gradients) for f in (mix_rms_norm, formula)
    )
    assert all(torch.allclose(f, w, rtol=1e-12, atol=1e-13) for f, w in zip(found, want, strict=True))


def test_float32_is_close_to_float64():
    tensors = streams(2, 50, 512, torch.float32)
    found, _ = errors_of_both(tensors)
    assert all(error < 1e-6 for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [48, 512])
def test_half_precision_errs_no_more_than_the_plain_chain(dtype, width):
    tensors = streams(2, 200, width, dtype)
    found, plain = errors_of_both(tensors)
    assert all(found[name] <= plain[name] for name in plain), (found, plain)


def test_both_results_are_rounded_once():
    tensors = streams(2, 50, 48, torch.bfloat16)
    for result, exact in zip(
        mix_rms_norm(**tensors, eps=EPS, gain=0.7), formula(**exactly(tensors), eps=EPS, gain=0.7), strict=True
    ):
        assert (result == exact.bfloat16()).double().mean() > 0.999


def test_a_wide_mix_counts_rounded_and_its_gradient_is_not_rounded():
    tensors = streams(2, 100, 16, torch.bfloat16)
    wide = tensors | {"mix": random(2, 16, seed=2, dtype=torch.float32).requires_grad_()}
    narrow = tensors | {"mix": wide["mix"].detach().bfloat16().requires_grad_()}
    got, rounded = (run(mix_rms_norm, t, upstream(tensors)) for t in (wide, narrow))
    assert all(torch.equal(got[name], rounded[name]) for name in ("h", "n", "dx", "dx0"))
    assert got["dmix"].dtype == torch.float32 and torch.equal(got["dmix"].bfloat16(), rounded["dmix"])
    want = run(formula, exactly(narrow), [g.double() for g in upstream(tensors)])
    assert errors(got, want)["dmix"] < 1e-5 < errors(rounded, want)["dmix"]


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 0, 1)])
def test_empty(shape):
    tensors = streams(*shape)
    got, want = (run(f, tensors, upstream(tensors)) for f in (mix_rms_norm, formula))
    assert all(torch.equal(got[name], want[name]) and got[name].shape == want[name].shape for name in want)
    assert not got["dmix"].count_nonzero()


def test_zero_large_small_and_broken_rows():
    tensors = streams(2, 5, 8)
    for name in ("x", "x0"):
        stream = tensors[name].detach().clone()
        for position, factor in enumerate((1e15, 1e-15, 0.0)):
            stream[0, position] *= factor
        tensors[name] = stream.requires_grad_()
    tensors["x"].data[0, 3, 5] = float("nan")
    got, want = (run(f, tensors, upstream(tensors)) for f in (mix_rms_norm, formula))
    assert got["n"][0, 3].isnan().all() and got["dx"][0, 3].isnan().all() and got["dx0"][0, 3].isnan().all()
    assert got["h"][0, 3].isnan().tolist() == [False] * 5 + [True] + [False] * 2
    assert got["dmix"].isnan().all() and want["dmix"].isnan().all()
    assert not got["h"][0, 2].count_nonzero() and not got["n"][0, 2].count_nonzero()
    for name in ("h", "n", "dx", "dx0"):
        keep = torch.ones(2, 5, dtype=torch.bool)
        keep[0, 3] = False
        for row, exact in zip(got[name][keep], want[name][keep], strict=True):
            assert (row - exact).norm() <= 1e-12 * exact.norm(), name


def test_strides_do_not_matter():
    # windows that overlap in one text, and heads that were first once
    text = random(20, 8, seed=5)
    views = {"x": random(4, 8, 3, seed=6).transpose(1, 2).transpose(0, 1), "x0": text.unfold(0, 4, 2)[:3].mT}
    views |= {"mix": random(8, 2, seed=7).mT}
    views = {name: view.detach().requires_grad_() for name, view in views.items()}
    gradients = [random(1, 1, 8, seed=9).expand(3, 4, 8), random(8, 4, 3, seed=10).permute(2, 1, 0)]
    found, want = (run(f, views, gradients) for f in (mix_rms_norm, formula))
    assert all(error < 1e-13 for error in errors(found, want).values())
    assert all(result.is_contiguous() for result in mix_rms_norm(**views, eps=EPS))


def test_nothing_but_the_inputs_is_kept():
    tensors = streams(2, 5, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix_rms_norm(**tensors, eps=EPS)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors.values()}


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nothing_uses(used):
    tensors = streams(2, 5, 8)
    found, want = (
        torch.autograd.grad(f(**tensors, eps=EPS, gain=0.5)[used].square().sum(), [tensors[name] for name in LEAVES])
        for f in (mix_rms_norm, formula)
    )
    assert all(torch.allclose(f, w, rtol=1e-12, atol=1e-12) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8)}, r"x: expected shape \(B, T, d\) .* found \(5, 8\)"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int64)}, "x: expected .* floating dtype"),
        ({"x": torch.zeros(2, 5, 0)}, "x: expected shape"),
        ({"x0": torch.zeros(1, 5, 8)}, r"x0: expected shape \(2, 5, 8\), found \(1, 5, 8\)"),
        ({"x0": torch.zeros(2, 5, 8).double()}, "x0: expected torch.float32 on cpu like x, found torch.float64"),
        ({"mix": torch.zeros(8)}, r"mix: expected shape \(2, 8\), found \(8,\)"),
        ({"mix": torch.zeros(2, 8).bfloat16()}, "mix: expected torch.float32 on cpu like x, found torch.bfloat16"),
        ({"mix": torch.zeros(2, 8, device="meta")}, "mix: expected .* on cpu like x, found torch.float32 on meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mix_rms_norm(**streams(2, 5, 8, torch.float32) | change, eps=EPS)


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        mix_rms_norm(**streams(2, 5, 8), eps=eps)


def test_second_derivatives_are_refused():
    tensors = streams(2, 5, 8)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(mix_rms_norm(**tensors, eps=EPS)[1].sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    tensors = streams(2, 5, 8, dtype)
    tensors["mix"] = tensors["mix"].detach().float().requires_grad_()
    torch.library.opcheck(torch.ops.golf.mix_rms_norm.default, (*tensors.values(), EPS, 0.5))
    turned = random(5, 2, 8, dtype=dtype).transpose(0, 1)
    torch.library.opcheck(torch.ops.golf.mix_rms_norm.default, (turned, turned, tensors["mix"], EPS, 1.0))
    plain = [t.detach() for t in tensors.values()]
    torch.library.opcheck(torch.ops.golf.mix_rms_norm_backward.default, (*upstream(tensors), *plain, EPS, 0.5))


def test_compiles_as_one_graph():
    tensors = streams(2, 5, 8)
    assert_compiles(lambda f: run(f, tensors, upstream(tensors)), mix_rms_norm, backend="aot_eager")


def test_fake_tensors_on_cuda():
    # autograd itself needs a real CUDA build, so the backward operator is called by hand
    with FakeTensorMode():
        x, x0 = (torch.empty(2, 5, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        mix = torch.empty(2, 512, device="cuda")
        h, n = torch.ops.golf.mix_rms_norm(x, x0, mix, EPS, 1.0)
        found = torch.ops.golf.mix_rms_norm_backward(h, n, x, x0, mix, EPS, 1.0)
        assert [(t.shape, t.dtype) for t in (h, n, *found)] == [(t.shape, t.dtype) for t in (x, x, x, x0, mix)]
        assert all(t.device.type == "cuda" and t.is_contiguous() for t in (h, n, *found))


def test_a_kernel_runs_only_when_forced(monkeypatch):
    monkeypatch.delenv("GOLF_BACKEND")
    for op in ("mix_rms_norm", "mix_rms_norm_backward"):
        choice = dispatch.choose(op, device="cuda")
        assert choice == ("torch", "triton: not chosen: python -m golf_kernels tune")

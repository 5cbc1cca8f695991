"""The Triton kernels of QK-norm, rotation and gain against float64: on a Hopper GPU, else in Triton's interpreter."""

import functools

import operator_truth
import pytest
import qk_norm_rope_truth
import torch
from operator_truth import DEVICE, ON_GPU, assert_compiles, assert_graph_replays, errors, exactly, within
from operator_truth import ELEMENTWISE_DTYPES as DTYPES
from qk_norm_rope_truth import EPS, LEAVES, errors_of_both, formula, run, truth, upstream

from golf_kernels import dispatch
from golf_kernels.qk_norm_rope import qk_norm_rope
from train.model.rope import rotary_table

random = functools.partial(operator_truth.random, device=DEVICE)
heads = functools.partial(qk_norm_rope_truth.heads, device=DEVICE)

pytestmark = pytest.mark.skipif(dispatch.triton_problem() is not None, reason=str(dispatch.triton_problem()))


@pytest.fixture(autouse=True)
def triton_only(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "qk_norm_rope=triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [0, 16, 64])
def test_errs_no_more_than_the_plain_chain(dtype, rotary):
    found, plain = errors_of_both(heads(2, 67, 8, 4, 64, rotary, dtype))
    # a key that does not turn is rounded once by the plain chain, whose backward pass then reads the exact one
    plain["k"] *= 1.0 if rotary else 1.05
    assert within(found, plain, dtype), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 2, 2), (3, 7, 5, 1, 10, 6), (1, 9, 6, 3, 80, 40), (2, 3, 32, 8, 256, 256), (1, 4, 2, 6, 3, 2)],
)
def test_shapes(dtype, sizes):
    tensors = heads(*sizes, dtype)
    want = truth(tensors)
    found = errors(run(qk_norm_rope, tensors, upstream(tensors)), want)
    limits = dict.fromkeys(want, 2 * torch.finfo(dtype).eps)
    # two numbers of one direction leave a gradient that is all cancellation
    if sizes[4] == 2:
        limits |= {"q": float("inf"), "k": float("inf")}
    assert all(found[name] <= limits[name] for name in want), found


@pytest.mark.parametrize("kind", ["exact", "bf16", "bf16_frequencies"])
def test_takes_the_models_rotary_tables(kind):
    tensors = heads(1, 300, 2, 1, 16, 8, torch.float32)
    # a cosine and sine that are rounded to bfloat16 are up to 4e-3 away from the unit circle
    table = rotary_table(300, 8, 1e4, kind=kind, dtype=torch.float32, device=torch.device(DEVICE))
    tensors["cosine"], tensors["sine"] = table
    found, plain = errors_of_both(tensors)
    assert within(found, plain, torch.float32), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gain_of_zero_has_its_gradient(dtype):
    tensors = heads(2, 40, 4, 2, 16, 8, dtype)
    small = 1e-6 if dtype == torch.float16 else 1e-30
    tensors["gain"] = torch.tensor([0.0, -0.0, small, -small], device=DEVICE).requires_grad_()
    got = run(qk_norm_rope, tensors, upstream(tensors))
    want = truth(tensors)
    assert errors(got, want)["gain"] < max(torch.finfo(dtype).eps, 1e-6)
    assert got["q_hat"].abs().max() <= 4 * (2.0**-12 if dtype == torch.float16 else 2.0**-60)
    ones = exactly(tensors) | {"gain": torch.ones(4, device=DEVICE, dtype=torch.float64)}
    along = (got["q_hat"].double() * formula(**ones, eps=EPS)[0]).sum(dim=(0, 1, 3))
    assert along.sign().tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_large_small_and_broken_rows(dtype):
    tensors = heads(2, 5, 4, 2, 16, 8, dtype)
    q = tensors["q"].detach().clone()
    large, small = (3e4, 1e-3) if dtype == torch.float16 else (1e15, 1e-15)
    q[0, 0] *= large / q[0, 0].abs().max()
    q[0, 1] *= small / q[0, 1].abs().max()
    q[0, 2] = 0
    q[0, 3, 1, 5] = float("nan")
    tensors["q"] = q.requires_grad_()
    got, plain = (run(f, tensors, upstream(tensors)) for f in (qk_norm_rope, formula))
    want = truth(tensors)
    assert got["q_hat"][0, 3, 1].isnan().all() and got["q"][0, 3, 1].isnan().all()
    assert got["gain"].isnan().tolist() == [False, True, False, False]
    assert not got["q_hat"][0, 2].count_nonzero() and not got["k"].isnan().any()
    for name in ("q_hat", "q"):
        for position in (0, 1, 4):
            exact = want[name][0, position]
            room = max(2 * torch.finfo(dtype).eps, 1e-6) * float(exact.norm())
            # what underflows is rounded to a step of the smallest numbers, in the plain chain too
            usual = float((plain[name][0, position].double() - exact).norm())
            assert float((got[name][0, position].double() - exact).norm()) <= max(room, usual), (name, position)


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2), (2, 5, 4, 0), (2, 5, 0, 0)])
def test_empty(shape):
    tensors = heads(*shape, 8, 4, torch.float32)
    got, want = (run(f, tensors, upstream(tensors)) for f in (qk_norm_rope, formula))
    for name in want:
        assert got[name].shape == want[name].shape and torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_strides_and_a_table_from_some_position_on_do_not_matter():
    dtype = DTYPES[0]
    product = random(2, 6, 4 * 8 + 2 * 8 + 2 * 8, seed=7, dtype=dtype)
    tables = heads(1, 12, 1, 1, 8, 4, dtype)
    views = {
        "q": product[..., :32].unflatten(-1, (4, 8)),
        "k": product[..., 32:48].unflatten(-1, (2, 8)).transpose(0, 3).contiguous().transpose(0, 3),
        "cosine": tables["cosine"][6:],
        "sine": torch.cat([tables["sine"]] * 2, dim=2)[6:, :, :2],
        "gain": random(8, seed=3, dtype=dtype)[::2],
    }
    views = {name: view.detach().requires_grad_(name in LEAVES) for name, view in views.items()}
    laid = {
        n: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_(n in LEAVES) for n, v in views.items()
    }
    # as the gradients of a sum and of an attention with heads first arrive
    summed = random(1, 1, 1, 8, seed=9, dtype=dtype).expand(2, 6, 4, 8)
    gradients = [summed, random(2, 2, 6, 8, seed=10, dtype=dtype).transpose(1, 2)]
    got, want = (run(qk_norm_rope, t, g) for t, g in ((views, gradients), (laid, [g.contiguous() for g in gradients])))
    assert all(torch.equal(got[name], want[name]) for name in want)
    found = errors(got, run(formula, exactly(views), [g.double() for g in gradients]))
    assert all(error < 2 * torch.finfo(dtype).eps for error in found.values()), found


def test_tables_that_were_rounded_are_inverted_exactly():
    tensors = heads(1, 13, 4, 2, 16, 16, torch.float32)
    tensors |= {name: tensors[name].bfloat16().float() for name in ("cosine", "sine")}
    found, _ = errors_of_both(tensors)
    assert all(error < 1e-6 for error in found.values()), found


def test_results_repeat_bit_by_bit():
    tensors = heads(1, 37, 8, 4, 64, 16, DTYPES[0])
    first, second = (run(qk_norm_rope, tensors, upstream(tensors)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gain_in_float32_counts_rounded():
    tensors = heads(1, 33, 4, 2, 16, 8, torch.float16)
    wide = tensors | {"gain": torch.tensor([1.0001, 2.3, -0.7, 5.0], device=DEVICE).requires_grad_()}
    narrow = tensors | {"gain": wide["gain"].detach().half().requires_grad_()}
    got, rounded = (run(qk_norm_rope, t, upstream(tensors)) for t in (wide, narrow))
    assert all(torch.equal(got[name], rounded[name]) for name in ("q_hat", "k_hat", "q", "k"))
    assert got["gain"].dtype == torch.float32 and torch.equal(got["gain"].half(), rounded["gain"])


def test_both_backends_keep_the_same():
    tensors = [t.detach() for t in heads(2, 21, 4, 2, 16, 8, torch.float32).values()]
    kernels, reference = (dispatch.run_on(backend, "qk_norm_rope", *tensors, EPS) for backend in ("triton", "torch"))
    assert all(torch.allclose(k, r, rtol=1e-5, atol=1e-6) for k, r in zip(kernels, reference, strict=True))
    assert [t.stride() for t in kernels] == [t.stride() for t in reference]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queries": 65}, "at most 64 heads of 128 dimensions or 32 of 256, found 65 of 8"),
        ({"dim": 258}, "at most 64 heads of 128 dimensions or 32 of 256, found 2 of 258"),
        ({"queries": 33, "dim": 130}, "at most 64 heads of 128 dimensions or 32 of 256, found 33 of 130"),
        ({"dtype": torch.float64}, "q is torch.float64, the Triton kernels take"),
        pytest.param(
            {"dtype": torch.bfloat16},
            "q is torch.bfloat16",
            marks=pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, reason):
    sizes = {"batch": 1, "length": 3, "queries": 2, "keys": 1, "dim": 8, "rotary": 4, "dtype": DTYPES[0]}
    with pytest.raises(dispatch.BackendError, match=reason):
        qk_norm_rope(**heads(**sizes | change), eps=EPS)
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        qk_norm_rope(**heads(**sizes), eps=-1.0)


def full_size(rotary):
    tensors = heads(48, 2048, 8, 4, 64, rotary, torch.bfloat16)
    tensors["gain"] = tensors["gain"].detach().float().requires_grad_()
    return tensors


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [16, 64])
def test_full_size(rotary):
    tensors = full_size(rotary)
    found, plain = errors_of_both(tensors)
    assert within(found, plain, torch.bfloat16), (found, plain)
    first, second = (run(qk_norm_rope, tensors, upstream(tensors)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_keeps_only_its_results():
    tensors = full_size(16)
    before = torch.cuda.memory_allocated()
    results = qk_norm_rope(**tensors, eps=EPS)
    kept = torch.cuda.memory_allocated() - before
    assert kept < 1.04 * sum(t.numel() * t.element_size() for t in results)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs():
    tensors = heads(2, 1030, 8, 4, 64, 16, torch.bfloat16)
    gradients = upstream(tensors)
    assert_graph_replays(lambda: run(qk_norm_rope, tensors, gradients), (tensors["q"], tensors["k"], *gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode):
    tensors = heads(3, 257, 8, 4, 64, 16, torch.bfloat16)
    assert_compiles(lambda f: run(f, tensors, upstream(tensors)), qk_norm_rope, mode=mode)

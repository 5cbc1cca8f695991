"""The Triton kernels of the residual mix and its norm against float64: on a Hopper GPU, else in Triton's interpreter."""

import functools

import mix_rms_norm_truth
import operator_truth
import pytest
import torch
from mix_rms_norm_truth import EPS, errors_of_both, formula, run, truth, upstream
from operator_truth import DEVICE, ON_GPU, assert_compiles, assert_graph_replays, errors, exactly, within
from operator_truth import ELEMENTWISE_DTYPES as DTYPES

from golf_kernels import dispatch
from golf_kernels.mix_rms_norm import mix_rms_norm

random = functools.partial(operator_truth.random, device=DEVICE)
streams = functools.partial(mix_rms_norm_truth.streams, device=DEVICE)

pytestmark = pytest.mark.skipif(dispatch.triton_problem() is not None, reason=str(dispatch.triton_problem()))


@pytest.fixture(autouse=True)
def triton_only(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "mix_rms_norm=triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 512])
def test_errs_no_more_than_the_plain_chain(dtype, width):
    found, plain = errors_of_both(streams(2, 67, width, dtype=dtype))
    assert within(found, plain, dtype), (found, plain)


def test_bfloat16_errs_no_more_than_the_plain_chain_at_the_width_of_the_recipes(true_bfloat16):
    tensors = streams(1, 130, 512, dtype=torch.bfloat16)
    tensors["mix"] = tensors["mix"].detach().float().requires_grad_()
    exact = exactly(tensors | {"mix": tensors["mix"].detach().bfloat16().requires_grad_()})
    want = run(formula, exact, [g.double() for g in upstream(tensors)])
    arguments = [*(t.detach() for t in tensors.values()), EPS, 0.5]
    # without the fixture no kernel would be let near bfloat16 on a CPU
    results = dispatch.run_on("triton", "mix_rms_norm", *arguments)
    gradients = dispatch.run_on("triton", "mix_rms_norm_backward", *upstream(tensors), *arguments)
    found = errors(dict(zip(want, [*results, *gradients], strict=True)), want)
    plain = errors(run(formula, tensors, upstream(tensors)), want)
    assert within(found, plain, torch.bfloat16), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_both_results_are_rounded_once(dtype):
    tensors = streams(2, 50, 48, dtype=dtype)
    for result, exact in zip(
        mix_rms_norm(**tensors, eps=EPS, gain=0.7), formula(**exactly(tensors), eps=EPS, gain=0.7), strict=True
    ):
        assert (result == exact.to(dtype)).double().mean() > 0.998


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 2), (3, 7, 5), (1, 65, 1), (2, 3, 333), (1, 2, 4096), (5, 129, 16)])
def test_shapes(dtype, sizes):
    found, plain = errors_of_both(streams(*sizes, dtype=dtype))
    # few numbers, of which the plain chain may by chance round none; one or two leave a gradient that is all cancellation
    room = 2 * torch.finfo(dtype).eps * (1 if sizes[2] > 2 else 100)
    assert all(found[name] <= max(plain[name], room) for name in plain), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_large_small_and_broken_rows(dtype):
    tensors = streams(2, 5, 16, dtype=dtype)
    large, small = (1e4, 1e-3) if dtype == torch.float16 else (1e15, 1e-15)
    for name in ("x", "x0"):
        stream = tensors[name].detach().clone()
        for position, factor in enumerate((large, small, 0.0)):
            stream[0, position] *= factor / stream[0, position].abs().max()
        tensors[name] = stream.requires_grad_()
    tensors["x"].data[0, 3, 5] = float("nan")
    got, plain = (run(f, tensors, upstream(tensors)) for f in (mix_rms_norm, formula))
    want = truth(tensors)
    assert got["n"][0, 3].isnan().all() and got["dx"][0, 3].isnan().all() and got["dmix"].isnan().all()
    assert not got["h"][0, 2].count_nonzero() and not got["n"][0, 2].count_nonzero()
    for name in ("h", "n", "dx", "dx0"):
        assert got[name].isnan().sum() == want[name].isnan().sum()
        for position in (0, 1, 2, 4):
            exact = want[name][0, position]
            room = max(2 * torch.finfo(dtype).eps, 1e-6) * float(exact.norm())
            # what underflows is rounded to a step of the smallest numbers, in the plain chain too
            usual = float((plain[name][0, position].double() - exact).norm())
            assert float((got[name][0, position].double() - exact).norm()) <= max(room, usual), (name, position)


def test_a_part_of_a_block_adds_nothing_without_an_epsilon():
    # rows that are not there have a norm of zero
    tensors = streams(1, 67, 8, dtype=torch.float32)
    got, want = (run(f, tensors, upstream(tensors), eps=0.0) for f in (mix_rms_norm, formula))
    assert all(torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-5) for name in want)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_empty(shape):
    tensors = streams(*shape, dtype=torch.float32)
    got, want = (run(f, tensors, upstream(tensors)) for f in (mix_rms_norm, formula))
    assert all(torch.equal(got[name], want[name]) and got[name].shape == want[name].shape for name in want)


def test_strides_do_not_matter():
    dtype = DTYPES[0]
    # windows that overlap in one text, and a width that is not the innermost
    text = random(20, 8, seed=5, dtype=dtype)
    views = {
        "x": random(8, 4, 3, seed=6, dtype=dtype).permute(2, 1, 0),
        "x0": text.unfold(0, 4, 2)[:3].mT,
    }
    views |= {"mix": random(8, 2, seed=7, dtype=dtype).mT}
    views = {name: view.detach().requires_grad_() for name, view in views.items()}
    summed = random(1, 1, 8, seed=9, dtype=dtype).expand(3, 4, 8)
    gradients = [summed, random(4, 3, 8, seed=10, dtype=dtype).transpose(0, 1)]
    laid = {name: view.detach().contiguous().requires_grad_() for name, view in views.items()}
    got, want = (run(mix_rms_norm, t, g) for t, g in ((views, gradients), (laid, [g.contiguous() for g in gradients])))
    assert all(torch.equal(got[name], want[name]) for name in want)
    found = errors(got, run(formula, exactly(views), [g.double() for g in gradients]))
    assert all(error < 2 * torch.finfo(dtype).eps for error in found.values()), found


def test_results_repeat_bit_by_bit():
    tensors = streams(1, 197, 64, dtype=DTYPES[0])
    first, second = (run(mix_rms_norm, tensors, upstream(tensors)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_mix_in_float32_counts_rounded():
    tensors = streams(1, 33, 16, dtype=torch.float16)
    wide = tensors | {"mix": random(2, 16, seed=2, dtype=torch.float32).requires_grad_()}
    narrow = tensors | {"mix": wide["mix"].detach().half().requires_grad_()}
    got, rounded = (run(mix_rms_norm, t, upstream(tensors)) for t in (wide, narrow))
    assert all(torch.equal(got[name], rounded[name]) for name in ("h", "n", "dx", "dx0"))
    assert got["dmix"].dtype == torch.float32 and torch.equal(got["dmix"].half(), rounded["dmix"])


def test_both_backends_give_the_same():
    tensors = [t.detach() for t in streams(2, 21, 24, dtype=torch.float32).values()]
    kernels, reference = (
        dispatch.run_on(backend, "mix_rms_norm", *tensors, EPS, 0.5) for backend in ("triton", "torch")
    )
    assert all(torch.allclose(k, r, rtol=1e-5, atol=1e-6) for k, r in zip(kernels, reference, strict=True))
    assert [t.stride() for t in kernels] == [t.stride() for t in reference]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 4097}, "a width of at most 4096, found 4097"),
        ({"dtype": torch.float64}, "x is torch.float64, the Triton kernels take"),
        pytest.param(
            {"dtype": torch.bfloat16},
            "x is torch.bfloat16",
            marks=pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, reason):
    sizes = {"width": 8, "dtype": DTYPES[0]} | change
    with pytest.raises(dispatch.BackendError, match=reason):
        mix_rms_norm(**streams(1, 3, sizes["width"], dtype=sizes["dtype"]), eps=EPS)
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        mix_rms_norm(**streams(1, 3, 8, dtype=DTYPES[0]), eps=-1.0)


def full_size():
    tensors = streams(48, 2048, 512, dtype=torch.bfloat16)
    tensors["mix"] = tensors["mix"].detach().float().requires_grad_()
    return tensors


@pytest.mark.gpu
def test_full_size():
    tensors = full_size()
    # both chains round the mix, so its truth is the rounded one
    exact = exactly(tensors | {"mix": tensors["mix"].detach().bfloat16().requires_grad_()})
    want = run(formula, exact, [g.double() for g in upstream(tensors)])
    found, plain = (errors(run(f, tensors, upstream(tensors)), want) for f in (mix_rms_norm, formula))
    assert within(found, plain, torch.bfloat16), (found, plain)
    first, second = (run(mix_rms_norm, tensors, upstream(tensors)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_keeps_only_its_results():
    tensors = full_size()
    before = torch.cuda.memory_allocated()
    results = mix_rms_norm(**tensors, eps=EPS)
    kept = torch.cuda.memory_allocated() - before
    assert kept == sum(t.numel() * t.element_size() for t in results)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    # the last row begins behind 2^31 numbers
    x = torch.randn(1, 525_000, 4096, device=DEVICE, dtype=torch.bfloat16)
    mix = random(2, 4096, seed=2, dtype=torch.float32)
    h, n = mix_rms_norm(x, x, mix, eps=EPS)
    want = mix_rms_norm(x[:, -3:], x[:, -3:], mix, eps=EPS)
    assert torch.equal(h[:, -3:], want[0]) and torch.equal(n[:, -3:], want[1])


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs():
    tensors = streams(2, 1030, 512, dtype=torch.bfloat16)
    gradients = upstream(tensors)
    assert_graph_replays(lambda: run(mix_rms_norm, tensors, gradients), (tensors["x"], tensors["x0"], *gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode):
    tensors = streams(3, 257, 512, dtype=torch.bfloat16)
    assert_compiles(lambda f: run(f, tensors, upstream(tensors)), mix_rms_norm, mode=mode)

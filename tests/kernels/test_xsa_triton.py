"""The Triton kernels of XSA against float64: on a Hopper GPU, else in Triton's interpreter."""

import functools

import operator_truth
import pytest
import torch
import xsa_truth
from operator_truth import DEVICE, ON_GPU, assert_compiles, assert_graph_replays, errors, exactly, within
from operator_truth import ELEMENTWISE_DTYPES as DTYPES
from xsa_truth import LEAVES, errors_of_both, formula, run

from golf_kernels import dispatch
from golf_kernels.xsa import xsa

random = functools.partial(operator_truth.random, device=DEVICE)
heads = functools.partial(xsa_truth.heads, device=DEVICE)

pytestmark = pytest.mark.skipif(dispatch.triton_problem() is not None, reason=str(dispatch.triton_problem()))


@pytest.fixture(autouse=True)
def triton_only(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "xsa=triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 67, 8, 4, 64), (1, 67, 8, 8, 64), (1, 67, 4, 1, 128)])
def test_errs_no_more_than_the_plain_chain(dtype, sizes):
    found, plain = errors_of_both(*heads(*sizes, dtype))
    assert within(found, plain, dtype, 2e-7), (found, plain)


@pytest.mark.parametrize("sizes", [(1, 67, 8, 4, 64), (1, 67, 8, 8, 64)])
def test_bfloat16_errs_no_more_than_the_plain_chain(sizes, true_bfloat16):
    tensors, dy = heads(*sizes, torch.bfloat16)
    output, value = (tensor.detach() for tensor in tensors.values())
    # by name, since a call refuses what the interpreter rounds otherwise
    y = dispatch.run_on("triton", "xsa", output, value)
    gradients = dispatch.run_on("triton", "xsa_backward", dy, output, value)
    want = run(formula, exactly(tensors), dy.double())
    found = errors(dict(zip(("y", *LEAVES), (y, *gradients), strict=True)), want)
    plain = errors(run(formula, tensors, dy), want)
    assert all(found[name] <= plain[name] for name in want) and all(e < 2**-9 for e in found.values()), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 2), (3, 7, 5, 5, 10), (1, 9, 6, 3, 80), (2, 3, 16, 1, 256), (1, 5, 9, 3, 7)]
)
def test_shapes(dtype, sizes):
    tensors, dy = heads(*sizes, dtype)
    found, _ = errors_of_both(tensors, dy)
    # one rounding of each result; two numbers without one direction are all cancellation
    assert all(
        error < (2 if sizes[-1] == 2 else 0.5) * max(torch.finfo(dtype).eps, 4e-7) for error in found.values()
    ), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_zero_large_and_broken_rows(dtype):
    tensors, dy = heads(2, 5, 4, 2, 16, dtype)
    value, output = (tensors[name].detach().clone() for name in ("value", "output"))
    value[0, 0] = 0
    value[0, 1] *= 3e4 / value[0, 1].abs().max()
    value[0, 2, 0, 3] = float("nan")
    output[0, 3, 3, 5] = float("nan")
    # float16 has nothing between zero and what normalize takes for short
    value[0, 4] *= 0 if dtype == torch.float16 else 1e-13 / value[0, 4].float().norm()
    tensors = {"output": output.requires_grad_(), "value": value.requires_grad_()}
    got, want = run(xsa, tensors, dy), run(formula, exactly(tensors), dy.double())
    room = 4 * max(torch.finfo(dtype).eps, 1e-6)
    for name in want:
        largest = torch.nan_to_num(want[name]).abs().amax(dim=(2, 3), keepdim=True)
        wrong = (got[name].double() - want[name]).abs() / largest.clamp_min(1)
        assert torch.equal(wrong.isnan(), want[name].isnan()) and torch.nan_to_num(wrong).max() < room, name
    assert torch.equal(got["y"][0, 0], output[0, 0]) and not got["value"][0, 0].count_nonzero()
    assert got["y"][0, 2].isnan().all(dim=-1).tolist() == [True, True, False, False]
    assert got["value"][0, 3].isnan().all(dim=-1).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2)])
def test_empty(shape):
    got = run(xsa, *heads(*shape, 8, torch.float32))
    assert [got[name].shape for name in ("y", *LEAVES)] == [(*shape[:3], 8), (*shape[:3], 8), (*shape[:2], 2, 8)]
    assert all(not tensor.count_nonzero() for tensor in got.values())


def test_strides_and_values_from_some_position_on_do_not_matter():
    dtype = DTYPES[0]
    joint = random(2, 9, 2 * 12 + 5, seed=3, dtype=dtype)
    views = {
        "output": random(6, 4, 5, 2, seed=4, dtype=dtype).transpose(0, 3).transpose(1, 2),
        "value": joint[:, 4:, 5:].unflatten(-1, (2, 12))[..., ::2],
    }
    views = {name: view.detach().requires_grad_() for name, view in views.items()}
    laid = {n: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for n, v in views.items()}
    # as the gradients of a sum and of an attention with heads first arrive
    summed = random(1, 1, 1, 6, seed=5, dtype=dtype).expand(2, 5, 4, 6)
    for dy in (summed, random(2, 4, 5, 12, seed=6, dtype=dtype).transpose(1, 2)[..., ::2]):
        got, want = run(xsa, views, dy), run(xsa, laid, dy.contiguous())
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert all(
            error < torch.finfo(dtype).eps for error in errors(got, run(formula, exactly(views), dy.double())).values()
        )


def test_results_repeat_bit_by_bit():
    tensors, dy = heads(1, 37, 8, 4, 64, DTYPES[0])
    first, second = (run(xsa, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_both_backends_agree():
    tensors, dy = heads(2, 21, 4, 2, 16, torch.float32)
    inputs = [t.detach().transpose(0, 1) for t in tensors.values()]
    for op, arguments in (("xsa", inputs), ("xsa_backward", [dy.transpose(0, 1), *inputs])):
        kernels, reference = (dispatch.run_on(backend, op, *arguments) for backend in ("triton", "torch"))
        kernels, reference = ((t,) if op == "xsa" else t for t in (kernels, reference))
        assert all(torch.allclose(k, r, rtol=1e-5, atol=1e-6) for k, r in zip(kernels, reference, strict=True))
        assert [t.stride() for t in kernels] == [t.stride() for t in reference]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queries": 17}, "at most 16 heads of at most 256 dimensions to a value, found 17 of 8"),
        ({"dim": 257}, "at most 16 heads of at most 256 dimensions to a value, found 2 of 257"),
        ({"dtype": torch.float64}, "output is torch.float64, the Triton kernels take"),
        pytest.param(
            {"dtype": torch.bfloat16},
            "output is torch.bfloat16",
            marks=pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, reason):
    sizes = {"batch": 1, "length": 3, "queries": 2, "values": 1, "dim": 8, "dtype": DTYPES[0]}
    tensors, _ = heads(**sizes | change)
    with pytest.raises(dispatch.BackendError, match=reason):
        xsa(**tensors)


def test_more_values_than_the_kernels_count_are_refused():
    many = torch.zeros(1, device=DEVICE).expand(2**28, 1, 5, 1)
    with pytest.raises(dispatch.BackendError, match=r"count up to 2\^30 values, found 1342177280"):
        xsa(many, many)


def test_bad_input_is_refused():
    tensors, _ = heads(1, 3, 4, 2, 8, torch.float32)
    for value in (torch.zeros(1, 3, 3, 8), torch.zeros(1, 3, 0, 8), torch.zeros(1, 3, 8)):
        with pytest.raises(ValueError, match="value: expected shape"):
            xsa(tensors["output"], value.to(DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_full_size(kv_heads):
    tensors, dy = heads(48, 2048, 8, kv_heads, 64, torch.bfloat16)
    found, plain = errors_of_both(tensors, dy)
    assert all(found[name] <= plain[name] for name in plain), (found, plain)
    first, second = (run(xsa, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    # 2.2e9 numbers; the last position is compared with the same one alone
    output = torch.zeros(1, 2_100_000, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    value = torch.zeros(1, 2_100_000, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    for seed, tensor in enumerate((output, value)):
        tensor[:, -1] = random(*tensor[:, -1].shape, seed=seed, dtype=torch.bfloat16)
    assert torch.equal(xsa(output, value)[:, -1:], xsa(output[:, -1:], value[:, -1:]))
    found = torch.ops.golf.xsa_backward(output, output, value)
    alone = torch.ops.golf.xsa_backward(*(tensor[:, -1:] for tensor in (output, output, value)))
    assert all(torch.equal(far[:, -1:], near) for far, near in zip(found, alone, strict=True))


@pytest.mark.gpu
def test_nothing_is_kept_beside_the_inputs():
    tensors, _ = heads(4, 2048, 8, 4, 64, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    y = xsa(**tensors)
    assert torch.cuda.memory_allocated() - before < 1.01 * y.numel() * y.element_size()


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs():
    tensors, dy = heads(2, 1030, 8, 4, 64, torch.bfloat16)
    assert_graph_replays(lambda: run(xsa, tensors, dy), (*tensors.values(), dy))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode):
    tensors, dy = heads(3, 257, 8, 4, 64, torch.bfloat16)
    assert_compiles(lambda f: run(f, tensors, dy), xsa, mode=mode)

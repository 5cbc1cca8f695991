"""The Triton kernels of XSA and the linear layer behind it against float64: on a Hopper GPU, else in Triton's interpreter."""

import functools

import operator_truth
import pytest
import torch
import xsa_linear_truth
from operator_truth import DEVICE, ON_GPU, assert_compiles, assert_graph_replays, errors, exactly, within
from operator_truth import PRODUCT_DTYPES as DTYPES
from xsa_linear_truth import LEAVES, errors_of_both, formula, run

from golf_kernels import dispatch
from golf_kernels.xsa_linear import xsa_linear

random = functools.partial(operator_truth.random, device=DEVICE)
call = functools.partial(xsa_linear_truth.call, device=DEVICE)

pytestmark = pytest.mark.skipif(dispatch.triton_problem() is not None, reason=str(dispatch.triton_problem()))


@pytest.fixture(autouse=True)
def triton_only(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "xsa_linear=triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 133, 8, 4, 64, 264), (1, 67, 8, 8, 64, 512), (1, 130, 8, 1, 16, 40), (1, 67, 1, 1, 128, 136)]
)
def test_errs_no_more_than_the_plain_chain(dtype, sizes):
    found, plain = errors_of_both(*call(*sizes, dtype))
    assert within(found, plain, dtype), (found, plain)


@pytest.mark.parametrize("sizes", [(1, 67, 8, 4, 64, 64), (1, 67, 8, 8, 64, 64)])
def test_bfloat16_errs_no_more_than_the_plain_chain(sizes, true_bfloat16):
    tensors, dy = call(*sizes, torch.bfloat16)
    inputs = [tensor.detach() for tensor in tensors.values()]
    # by name, since a call refuses what the interpreter rounds otherwise
    y = dispatch.run_on("triton", "xsa_linear", *inputs)
    gradients = dispatch.run_on("triton", "xsa_linear_backward", dy, *inputs)
    want = run(formula, exactly(tensors), dy.double())
    found = errors(dict(zip(("y", *LEAVES), (y, *gradients), strict=True)), want)
    plain = errors(run(formula, tensors, dy), want)
    assert all(found[name] <= plain[name] for name in want), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 2, 2, 16, 8), (5, 7, 6, 3, 32, 24), (2, 129, 4, 2, 16, 256), (1, 3, 4, 1, 32, 8)]
)
def test_shapes(dtype, sizes):
    found, _ = errors_of_both(*call(*sizes, dtype))
    # one rounding of each result, and one of z before the products
    assert all(error < max(torch.finfo(dtype).eps, 1e-6) for error in found.values()), found


def test_z_is_rounded_before_the_product_as_apart(true_bfloat16):
    tensors, _ = call(2, 37, 8, 4, 64, 64, DTYPES[0])
    output, value, weight = (tensor.detach() for tensor in tensors.values())
    z = dispatch.run_on("triton", "xsa", output, value).flatten(2)
    # of the same numbers products differ by the order of their sums alone
    exact = z.double() @ weight.double().T
    found = dispatch.run_on("triton", "xsa_linear", output, value, weight).double()
    assert (found - exact).norm() < 0.5 * torch.finfo(DTYPES[0]).eps * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_zero_and_broken_rows(dtype):
    tensors, dy = call(2, 5, 4, 2, 16, 8, dtype)
    value, output = (tensors[name].detach().clone() for name in ("value", "output"))
    value[0, 0] = 0
    value[0, 1] *= 3e4 / value[0, 1].abs().max()
    value[0, 2, 0, 3] = float("nan")
    output[0, 3, 3, 5] = float("nan")
    # float16 has nothing between zero and what normalize takes for short
    value[0, 4] *= 0 if dtype == torch.float16 else 1e-13 / value[0, 4].float().norm()
    tensors |= {"output": output.requires_grad_(), "value": value.requires_grad_()}
    got, want = run(xsa_linear, tensors, dy), run(formula, exactly(tensors), dy.double())
    room = 8 * max(torch.finfo(dtype).eps, 1e-6)
    for name in ("y", "output", "value"):
        rest = tuple(range(2, want[name].ndim))
        largest = torch.nan_to_num(want[name]).abs().amax(dim=rest, keepdim=True)
        wrong = (got[name].double() - want[name]).abs() / largest.clamp_min(1)
        assert torch.equal(wrong.isnan(), want[name].isnan()) and torch.nan_to_num(wrong).max() < room, name
    assert not got["value"][0, 0].count_nonzero() and got["weight"].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 0, 2)])
@pytest.mark.parametrize("columns", [8, 0])
def test_empty(shape, columns):
    tensors, dy = call(*shape, 16, columns, DTYPES[1])
    got = run(xsa_linear, tensors, dy)
    assert got["y"].shape == (*shape[:2], columns)
    assert all(got[name].shape == tensors[name].shape for name in LEAVES)
    assert all(not tensor.count_nonzero() for tensor in got.values())


def test_strides_do_not_matter_and_rows_that_tma_takes_are_not_copied(monkeypatch):
    from golf_kernels import xsa_linear_triton

    dtype, copied = DTYPES[0], []
    laid_out = xsa_linear_triton._laid_out
    monkeypatch.setattr(
        xsa_linear_triton, "_laid_out", lambda t: (found := laid_out(t), copied.append(found is not t))[0]
    )
    joint = random(2, 9, 3 * 32 + 32, seed=3, dtype=dtype)
    heads_first = random(2, 4, 5, 16, seed=4, dtype=dtype).transpose(1, 2)
    own = joint[:, 4:, 96:].unflatten(-1, (2, 16))
    odd = random(2, 9, 2 * 32 + 5, seed=5, dtype=dtype)[:, 4:, 5:].unflatten(-1, (2, 32))[..., ::2]
    weight, dy = random(8, 64, seed=7, dtype=dtype), random(2, 5, 8, seed=8, dtype=dtype)
    for output, value, w, copies in (
        (heads_first, own, weight, [False] * 7),
        (heads_first, odd, weight, [False, True, False, False, False, True, False]),
        (random(16, 4, 5, 2, seed=9, dtype=dtype).transpose(0, 3).transpose(1, 2), own, random(64, 8, seed=6, dtype=dtype).T,
         [True, False, True, False, True, False, True]),
    ):  # fmt: skip
        views = {"output": output, "value": value, "weight": w}
        views = {name: view.detach().requires_grad_() for name, view in views.items()}
        laid = {n: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for n, v in views.items()}
        copied.clear()
        got = run(xsa_linear, views, dy)
        assert copied == copies
        want = run(xsa_linear, laid, dy)
        assert all(torch.equal(got[name], want[name]) and got[name].is_contiguous() for name in want)
        true = run(formula, exactly(views), dy.double())
        assert all(error < torch.finfo(dtype).eps for error in errors(got, true).values())
    # as the gradients of a sum and of a transposed result arrive
    for other in (
        random(1, 1, 8, seed=5, dtype=dtype).expand(2, 5, 8),
        random(8, 5, 2, seed=6, dtype=dtype).transpose(0, 2),
    ):
        copied.clear()
        got = run(xsa_linear, laid, other)
        assert copied == [False, False, False, True, False, False, False]
        want = run(xsa_linear, laid, other.contiguous())
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_results_repeat_bit_by_bit():
    tensors, dy = call(1, 37, 8, 4, 64, 64, DTYPES[0])
    first, second = (run(xsa_linear, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"queries": 3},
            "1, 2, 4 or 8 heads to a value, of 16, 32, 64 or 128 dimensions, 128 in all at most, found 3 of 16",
        ),
        ({"queries": 16}, "found 16 of 16"),
        ({"dim": 8}, "found 1 of 8"),
        ({"dim": 48}, "found 1 of 48"),
        ({"dim": 256}, "found 1 of 256"),
        ({"columns": 12}, "rows of weight in multiples of 8, found 12"),
        ({"dtype": torch.float64}, "output is torch.float64, its kernels take"),
        pytest.param(
            {"dtype": torch.bfloat16},
            "output is torch.bfloat16",
            marks=pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, reason):
    sizes = {"batch": 1, "length": 3, "queries": 1, "values": 1, "dim": 16, "columns": 8, "dtype": DTYPES[0]}
    tensors, dy = call(**sizes | change)
    with pytest.raises(dispatch.BackendError, match=reason):
        xsa_linear(**tensors)
    inputs = [tensor.detach() for tensor in tensors.values()]
    with pytest.raises(dispatch.BackendError, match=reason):
        torch.ops.golf.xsa_linear_backward(dy, *inputs)


def test_bad_input_is_refused():
    tensors, _ = call(1, 3, 4, 2, 16, 8, DTYPES[0])
    for name, wrong in (
        ("value", torch.zeros(1, 3, 3, 16)),
        ("value", torch.zeros(1, 3, 0, 16)),
        ("weight", torch.zeros(8, 48)),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            xsa_linear(**tensors | {name: wrong.to(DEVICE, DTYPES[0])})


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_full_size(kv_heads):
    tensors, dy = call(48, 2048, 8, kv_heads, 64, 512, torch.bfloat16)
    found, plain = errors_of_both(tensors, dy)
    assert all(found[name] <= plain[name] for name in plain), (found, plain)
    first, second = (run(xsa_linear, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("y", "output", "value"))


@pytest.mark.gpu
def test_every_configuration_that_ships():
    for heads, kv_heads, dim in ((4, 4, 128), (8, 4, 32), (8, 2, 32), (8, 1, 16), (4, 2, 16), (4, 4, 16)):
        found, plain = errors_of_both(*call(3, 333, heads, kv_heads, dim, 72, torch.bfloat16))
        assert all(found[name] <= plain[name] for name in plain), (heads, kv_heads, dim, found, plain)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    # 2.2e9 numbers; the last positions are compared with the same ones alone
    output = torch.zeros(1, 2_100_000, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    value = torch.zeros(1, 2_100_000, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = random(8, 1024, seed=2, dtype=torch.bfloat16)
    for seed, tensor in enumerate((output, value)):
        tensor[:, -1] = random(*tensor[:, -1].shape, seed=seed, dtype=torch.bfloat16)
    y = xsa_linear(output, value, weight)
    assert torch.equal(y[:, -1:], xsa_linear(output[:, -1:], value[:, -1:], weight))
    found = torch.ops.golf.xsa_linear_backward(y, output, value, weight)
    alone = torch.ops.golf.xsa_linear_backward(*(t[:, -1:] for t in (y, output, value)), weight)
    assert all(torch.equal(far[:, -1:], near) for far, near in zip(found[:2], alone[:2], strict=True))


@pytest.mark.gpu
def test_nothing_is_kept_beside_the_inputs():
    tensors, _ = call(4, 2048, 8, 4, 64, 512, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    y = xsa_linear(**tensors)
    assert torch.cuda.memory_allocated() - before < 1.01 * y.numel() * y.element_size()


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs():
    tensors, dy = call(2, 1030, 8, 4, 64, 512, torch.bfloat16)
    assert_graph_replays(lambda: run(xsa_linear, tensors, dy), (*tensors.values(), dy))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode):
    tensors, dy = call(3, 257, 8, 4, 64, 512, torch.bfloat16)
    assert_compiles(lambda f: run(f, tensors, dy), xsa_linear, mode=mode)

"""The LeakyReLU² MLP and its analytic backward against autograd of the plain formula in float64."""

import collections
import itertools

import numpy as np
import pytest
import torch
from host_traffic import NoHostTraffic
from leaky_relu2_mlp_truth import NAMES, formula, run
from operator_truth import errors, exactly, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import dispatch
from golf_kernels.leaky_relu2_mlp import leaky_relu2_mlp


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    # the name covers the backward operator too
    monkeypatch.setenv("GOLF_BACKEND", "leaky_relu2_mlp=torch")


def block(rows=(7,), d=6, hidden=13, dtype=torch.float64, residual=True, scale=True, seed=0):
    """Random tensors of one MLP by name, all requiring gradients."""
    shapes = {"x": (*rows, d), "w_up": (hidden, d), "w_down": (d, hidden), "residual": (*rows, d), "scale": (d,)}
    tensors = {name: random(*shapes[name], seed=seed + i, dtype=dtype) for i, name in enumerate(NAMES)}
    tensors["residual"] = tensors["residual"] if residual else None
    tensors["scale"] = tensors["scale"] if scale else None
    return {name: None if t is None else t.requires_grad_() for name, t in tensors.items()}


OPTIONS = list(itertools.product((0.0, 0.3, 0.5), (None, 1e-2), (False, True), (False, True)))


@pytest.mark.parametrize(("slope", "norm_eps", "residual", "scale"), OPTIONS)
def test_result_and_gradients_in_float64(slope, norm_eps, residual, scale):
    options = {"slope": slope, "norm_eps": norm_eps, "gain": 0.7}
    tensors = block(residual=residual, scale=scale)
    dy = random(7, 6, seed=9)
    found = errors(run(leaky_relu2_mlp, tensors, dy, **options), run(formula, tensors, dy, **options))
    assert all(error < 1e-13 for error in found.values()), found


@pytest.mark.parametrize("norm_eps", [None, 1e-2])
def test_the_stream_as_its_own_residual(norm_eps):
    tensors = block(rows=(3, 4), residual=False)
    dy = random(3, 4, 6, seed=9)

    def through(function):
        return run(lambda x, **rest: function(x, residual=x, norm_eps=norm_eps, **rest), tensors, dy)

    found = errors(through(leaky_relu2_mlp), through(formula))
    assert all(error < 1e-13 for error in found.values()), found
    # autograd has nothing left to add up
    y = leaky_relu2_mlp(**tensors | {"residual": tensors["x"]})
    node = y.grad_fn.next_functions[0][0]
    assert sum(source is not None for source, _ in node.next_functions) == 4


@pytest.mark.parametrize(("slope", "norm_eps"), [(0.0, None), (0.5, 1e-3)])
def test_gradcheck(slope, norm_eps):
    def function(x, w_up, w_down, residual, scale):
        options = {"slope": slope, "norm_eps": norm_eps, "gain": 1.3, "residual": residual, "scale": scale}
        return leaky_relu2_mlp(x, w_up, w_down, **options)

    assert torch.autograd.gradcheck(function, tuple(block(rows=(3,), d=4, hidden=5).values()))


@pytest.mark.parametrize(
    ("rows", "d", "hidden"), [((1,), 5, 3), ((2, 3), 8, 64), ((33,), 16, 17), ((5,), 1, 1), ((4,), 3, 8)]
)
def test_shapes(rows, d, hidden):
    tensors = block(rows, d, hidden)
    dy = random(*rows, d, seed=9)
    found = errors(run(leaky_relu2_mlp, tensors, dy, norm_eps=1e-2), run(formula, tensors, dy, norm_eps=1e-2))
    assert all(error < 1e-12 for error in found.values()), found


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_no_rows(norm_eps):
    tensors = block(rows=(2, 0))
    got = run(leaky_relu2_mlp, tensors, random(2, 0, 6), norm_eps=norm_eps)
    assert got["y"].shape == got["x"].shape == (2, 0, 6)
    assert all(torch.equal(got[name], torch.zeros_like(tensors[name])) for name in ("w_up", "w_down", "scale"))


def test_strides_do_not_matter():
    tensors = block(rows=(4, 5), d=6, hidden=12)
    views = {
        "x": tensors["x"].detach().transpose(0, 1).contiguous().transpose(0, 1),
        "w_up": tensors["w_up"].detach().T.contiguous().T,
        "w_down": tensors["w_down"].detach().repeat(2, 2)[::2, ::2],
        "residual": tensors["residual"].detach().flip(0),
        "scale": tensors["scale"].detach()[:1].expand(6),
    }
    views = {name: view.requires_grad_() for name, view in views.items()}
    # expanded, as the gradient of a sum arrives
    dy = random(1, 1, 1, seed=9).expand(4, 5, 6)
    found = errors(run(leaky_relu2_mlp, views, dy, norm_eps=1e-2), run(formula, views, dy, norm_eps=1e-2))
    assert all(error < 1e-13 for error in found.values()), found


def test_float32_is_close_to_float64():
    tensors = block((50,), 32, 96, dtype=torch.float32)
    dy = random(50, 32, seed=9, dtype=torch.float32)
    want = run(formula, exactly(tensors), dy.double(), norm_eps=1e-6)
    found = errors(run(leaky_relu2_mlp, tensors, dy, norm_eps=1e-6), want)
    assert all(error < 2e-6 for error in found.values()), found


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_bfloat16_errs_no_more_than_the_plain_chain(slope):
    options = {"slope": slope, "norm_eps": 1e-6}
    found, plain, bias = collections.Counter(), collections.Counter(), []
    # many blocks, as the error of one `scale` is that of a few numbers
    for seed in range(0, 160, 10):
        tensors = block((192,), 64, 256, dtype=torch.bfloat16, seed=seed)
        dy = random(192, 64, seed=seed + 9, dtype=torch.bfloat16)
        want = run(formula, exactly(tensors), dy.double(), **options)
        got = run(leaky_relu2_mlp, tensors, dy, **options)
        found.update(errors(got, want))
        plain.update(errors(run(formula, tensors, dy, **options), want))
        bias.append(float((got["y"].double() - want["y"]).mean() / want["y"].abs().mean()))
    assert found["residual"] == plain["residual"] == 0.0
    assert all(found[name] <= 1.02 * plain[name] for name in ("y", "x", "w_up", "w_down")), (found, plain)
    assert found["scale"] <= 1.05 * plain["scale"], (found, plain)
    assert abs(sum(bias) / len(bias)) < 5e-4


def test_large_small_and_broken_rows():
    tensors = block((5,), residual=False)
    x = tensors["x"].detach().clone()
    x[0] *= 1e15
    x[1] *= 1e-15
    x[2] = 0
    x[3, 1] = float("nan")
    y = leaky_relu2_mlp(x, tensors["w_up"], tensors["w_down"], norm_eps=1e-6)
    want = formula(x, tensors["w_up"], tensors["w_down"], norm_eps=1e-6)
    assert y[3].isnan().all() and torch.equal(y[2], torch.zeros(6).double())
    rows = [0, 1, 4]
    assert torch.allclose(y[rows], want[rows], rtol=1e-10, atol=0)


class SavesSeen(TorchDispatchMode):
    """The `save` argument of every forward call."""

    def __init__(self):
        super().__init__()
        self.saves = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.golf.leaky_relu2_mlp.default:
            self.saves.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_only_what_backward_needs_is_kept():
    tensors = block((7,), 6, 13, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        leaky_relu2_mlp(**tensors, norm_eps=1e-6)
    inputs = [(torch.float32, shape) for shape in ((7, 6), (13, 6), (6, 13), (6,))]
    extra = [(torch.float32, (7, 13)), (torch.uint8, (7, 2)), (torch.float32, (7,))]
    assert sorted(map(str, kept)) == sorted(map(str, inputs + extra))
    with SavesSeen() as seen:
        leaky_relu2_mlp(**tensors)
        with torch.no_grad():
            leaky_relu2_mlp(**tensors)
        leaky_relu2_mlp(**{name: tensor.detach() for name, tensor in tensors.items()})
    assert seen.saves == [True, False, False]


@pytest.mark.parametrize(("slope", "norm_eps"), [(0.0, None), (0.5, None), (0.5, 1e-6)])
@pytest.mark.parametrize("save", [False, True])
def test_saved_outputs(save, slope, norm_eps):
    x, w_up, w_down, *_ = (tensor.detach() for tensor in block((5,), 6, 19).values())
    _, post, sign, rstd = torch.ops.golf.leaky_relu2_mlp(x, w_up, w_down, None, None, slope, norm_eps, 1.0, False, save)
    n = x if norm_eps is None else x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm_eps)
    pre = n @ w_up.T
    assert post.numel() == (pre.numel() if save else 0)
    assert rstd.numel() == (5 if save and norm_eps else 0)
    if save and slope:
        bits = np.packbits((pre > 0).numpy(), axis=1, bitorder="little")
        assert np.array_equal(sign.numpy(), bits)
        assert torch.allclose(post, torch.where(pre > 0, pre, slope * pre) ** 2, rtol=1e-12)
    else:
        assert sign.numel() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": 1.0}, "slope: expected 0 <= slope < 1 .*found 1.0"),
        ({"slope": -0.1}, "slope: expected"),
        ({"slope": float("nan")}, "slope: expected"),
        ({"norm_eps": -1.0}, "norm_eps: expected a number >= 0"),
        ({"x": torch.zeros(7, 6, dtype=torch.int64)}, "x: expected shape .* floating dtype"),
        ({"x": torch.tensor(1.0), "residual": None}, "x: expected shape"),
        ({"x": torch.zeros(3, 0), "residual": None}, r"x: expected shape .* found \(3, 0\)"),
        ({"w_up": torch.tensor(1.0)}, r"w_up: expected shape \(h, 6\) with h > 0, found \(\)"),
        ({"w_up": torch.zeros(0, 6), "w_down": torch.zeros(6, 0)}, r"w_up: expected shape \(h, 6\) with h > 0"),
        ({"w_up": torch.zeros(13, 5)}, r"w_up: expected shape \(13, 6\), found \(13, 5\)"),
        ({"w_down": torch.zeros(13, 6)}, r"w_down: expected shape \(6, 13\), found \(13, 6\)"),
        ({"w_down": torch.zeros(6, 13, dtype=torch.bfloat16)}, "w_down: expected torch.float32 on cpu like x"),
        ({"residual": torch.zeros(6)}, r"residual: expected shape \(7, 6\)"),
        ({"scale": torch.zeros(7)}, r"scale: expected shape \(6,\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    tensors = block(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        leaky_relu2_mlp(**{**tensors, **change})


def test_a_second_derivative_and_an_unsaved_backward_are_refused():
    tensors = block()
    y = leaky_relu2_mlp(**tensors)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)
    x, w_up, w_down, residual, scale = tensors.values()
    with pytest.raises(RuntimeError, match="save is False"):
        torch.ops.golf.leaky_relu2_mlp(x, w_up, w_down, residual, scale, 0.5, None, 1.0, False, False)


@pytest.mark.parametrize(("slope", "norm_eps"), [(0.0, None), (0.5, 1e-6)])
def test_opcheck(slope, norm_eps):
    x, w_up, w_down, residual, scale = block(dtype=torch.float32).values()
    forward = (x, w_up, w_down, residual, scale, slope, norm_eps, 1.1, False, True)
    torch.library.opcheck(torch.ops.golf.leaky_relu2_mlp.default, forward)
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in forward)
    torch.library.opcheck(torch.ops.golf.leaky_relu2_mlp.default, (*plain[:3], None, None, *plain[5:8], True, False))
    saved = torch.ops.golf.leaky_relu2_mlp(*plain)[1:]
    backward = (
        random(7, 6, seed=9, dtype=torch.float32),
        *plain[:3],
        plain[4],
        *saved,
        slope,
        norm_eps is not None,
        1.1,
        False,
    )
    torch.library.opcheck(torch.ops.golf.leaky_relu2_mlp_backward.default, backward)


def test_a_cuda_graph_can_hold_both_passes():
    x, w_up, w_down, residual, scale = (tensor.detach() for tensor in block(dtype=torch.float32).values())
    with NoHostTraffic():
        options = (0.5, 1e-6, 1.1, False, True)
        y, *saved = dispatch.run_on("torch", "leaky_relu2_mlp", x, w_up, w_down, residual, scale, *options)
        dispatch.run_on("torch", "leaky_relu2_mlp_backward", y, x, w_up, w_down, scale, *saved, 0.5, True, 1.1, False)


def test_compiles_as_one_graph():
    compiled = torch.compile(leaky_relu2_mlp, fullgraph=True, backend="aot_eager")
    tensors = block((2, 5))
    dy = random(2, 5, 6, seed=9)
    got, want = (run(f, tensors, dy, norm_eps=1e-6) for f in (compiled, leaky_relu2_mlp))
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.no_grad():
        assert torch.equal(compiled(**tensors, norm_eps=1e-6), want["y"])


def test_fake_tensors_on_cuda():
    # autograd itself needs a real CUDA build, so the backward operator is called by hand
    shapes = ((15, 64), (128, 64), (64, 128), (15, 64), (64,))
    with FakeTensorMode():
        x, w_up, w_down, residual, scale = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
        y = leaky_relu2_mlp(x.view(3, 5, 64), w_up, w_down, norm_eps=1e-6, scale=scale)
        assert y.shape == (3, 5, 64) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
        y, *saved = torch.ops.golf.leaky_relu2_mlp(x, w_up, w_down, residual, scale, 0.5, 1e-6, 1.0, False, True)
        assert [(tuple(t.shape), t.dtype) for t in saved] == [
            ((15, 128), torch.bfloat16),
            ((15, 16), torch.uint8),
            ((15,), torch.float32),
        ]
        arguments = (torch.empty_like(y), x, w_up, w_down, scale, *saved, 0.5, True, 1.0, False)
        gradients = torch.ops.golf.leaky_relu2_mlp_backward(*arguments)
        assert [tuple(g.shape) for g in gradients] == [shapes[0], shapes[1], shapes[2], shapes[4]]
        assert all(g.device.type == "cuda" and g.dtype == torch.bfloat16 for g in gradients)

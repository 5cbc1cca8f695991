"""Softcapped cross-entropy and its gradients against autograd of the plain formula in float64."""

import importlib
import math
import weakref

import pytest
import torch
from host_traffic import NoHostTraffic
from operator_truth import random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import dispatch

# the package's name of this module is the function
module = importlib.import_module("golf_kernels.softcapped_cross_entropy")
softcapped_cross_entropy = module.softcapped_cross_entropy


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    monkeypatch.setenv("GOLF_BACKEND", "softcapped_cross_entropy=torch")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows of 37 logits, so that a chunk boundary and a short last chunk are on the way."""
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * 37 * 3 + 8, "cuda": 1 << 28})
    assert module.chunk_rows(torch.device("cpu"), 37) == 3


def head(rows=11, d=5, vocabulary=37, dtype=torch.float64, ignored=()):
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    if rows > 1:
        # both ends of the vocabulary
        targets[0], targets[1] = 0, vocabulary - 1
    targets[list(ignored)] = -100
    hidden = random(rows, d, seed=0, dtype=dtype).requires_grad_()
    return hidden, random(vocabulary, d, seed=1, dtype=dtype).requires_grad_(), targets


def formula(hidden, weight, targets, *, softcap=30.0, reduction="mean", ignore_index=-100, z_loss=0.0):
    """The loss written down straight; products in the dtype of the inputs, the loss in float32 at least."""
    logits = hidden @ weight.T
    logits = logits.float() if logits.dtype != torch.float64 else logits
    z = softcap * torch.tanh(logits / softcap)
    lse = z.exp().sum(1).log()
    kept = (targets != ignore_index).nonzero().flatten()
    per_row = lse[kept] - z[kept, targets[kept].long()] + z_loss * lse[kept] ** 2
    return per_row.sum() / (len(kept) if reduction == "mean" else 1)


def run(function, hidden, weight, targets, upstream=1.0, **options):
    loss = function(hidden, weight, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, [hidden, weight])]


def errors(got, want):
    return [float((g.double() - w.double()).norm() / w.double().norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("ignored", [(), (1, 2, 5, 10)])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_loss_and_gradients_in_float64(small_chunks, softcap, reduction, z_loss, ignored):
    tensors = head(ignored=ignored)
    options = {"softcap": softcap, "reduction": reduction, "z_loss": z_loss}
    # an upstream gradient that is no power of two
    got, want = (run(f, *tensors, upstream=0.37, **options) for f in (softcapped_cross_entropy, formula))
    assert got[0].dtype == torch.float64 and max(errors(got, want)) < 1e-13


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck(z_loss):
    hidden, weight, targets = head(rows=4, d=3, vocabulary=5, ignored=(2,))

    def function(hidden, weight):
        return softcapped_cross_entropy(hidden, weight, targets, softcap=3.0, z_loss=z_loss)

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize(("rows", "d", "vocabulary"), [(1, 1, 1), (1, 7, 2), (130, 16, 1025), (3, 4, 8192)])
def test_shapes(rows, d, vocabulary):
    tensors = head(rows, d, vocabulary)
    got, want = (run(f, *tensors) for f in (softcapped_cross_entropy, formula))
    # one token alone has loss and gradients of exactly zero
    if vocabulary == 1:
        assert all(torch.equal(g, torch.zeros_like(g)) for g in got)
    else:
        assert max(errors(got, want)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_target_dtype_and_own_ignore_index(dtype):
    hidden, weight, targets = head()
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = weight.detach().repeat(2, 2)[::2, ::2].requires_grad_()
    # an index inside the vocabulary is ignored as well
    targets = targets.repeat_interleave(2)[::2].to(dtype)
    options = {"ignore_index": int(targets[3])}
    got, want = (run(f, hidden, weight, targets, **options) for f in (softcapped_cross_entropy, formula))
    assert max(errors(got, want)) < 1e-13


def test_logits_at_the_cap():
    hidden, weight, targets = head()
    hidden = (hidden.detach() * 1e4).requires_grad_()
    got, want = (run(f, hidden, weight, targets) for f in (softcapped_cross_entropy, formula))
    assert abs(float(got[0] - want[0])) < 1e-12 and float(got[0]) > 10
    assert all(gradient.isfinite().all() for gradient in got[1:])
    single = softcapped_cross_entropy(hidden.float(), weight.float(), targets, softcap=1e-3)
    assert float(single.detach()) == pytest.approx(math.log(37), abs=3e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows_and_nothing_but_ignored_rows(reduction):
    for tensors in (head(rows=0), head(rows=4, ignored=(0, 1, 2, 3))):
        got = run(softcapped_cross_entropy, *tensors, reduction=reduction, z_loss=0.1)
        assert all(torch.equal(result, torch.zeros_like(result)) for result in got)
        assert [g.shape for g in got[1:]] == [tensors[0].shape, tensors[1].shape]


def test_an_ignored_row_may_hold_anything():
    hidden, weight, targets = head(ignored=(4,))
    broken = hidden.detach().clone()
    broken[4] = float("nan")
    broken.requires_grad_()
    loss = softcapped_cross_entropy(broken, weight, targets)
    assert torch.equal(loss, softcapped_cross_entropy(hidden, weight, targets))
    (gradient,) = torch.autograd.grad(loss, broken)
    assert torch.equal(gradient[4], torch.zeros(5).double()) and gradient.isfinite().all()


def test_nan_is_not_hidden():
    hidden, weight, targets = head()
    broken = hidden.detach().clone()
    broken[3, 2] = float("nan")
    assert softcapped_cross_entropy(broken, weight, targets).isnan()


def test_float32_is_close_to_float64():
    tensors = head(rows=65, d=32, vocabulary=1025, dtype=torch.float32)
    exact = (*(t.detach().double().requires_grad_() for t in tensors[:2]), tensors[2])
    got = run(softcapped_cross_entropy, *tensors)
    assert got[0].dtype == torch.float32 and max(errors(got, run(formula, *exact))) < 2e-6


@pytest.mark.parametrize("vocabulary", [515, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_bfloat16_errs_no_more_than_the_plain_chain(vocabulary, upstream, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * vocabulary * 100})
    tensors = head(rows=260, d=64, vocabulary=vocabulary, dtype=torch.bfloat16)
    exact = (*(t.detach().double().requires_grad_() for t in tensors[:2]), tensors[2])
    want = run(formula, *exact, upstream=upstream)
    got = run(softcapped_cross_entropy, *tensors, upstream=upstream)
    plain = errors(run(formula, *tensors, upstream=upstream), want)
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.bfloat16
    assert all(a <= b for a, b in zip(errors(got, want), plain, strict=True)), (errors(got, want), plain)


def test_the_upstream_gradient_keeps_its_precision():
    hidden, weight, targets = head(rows=64, d=32, vocabulary=99, dtype=torch.bfloat16)
    third, whole = (run(softcapped_cross_entropy, hidden, weight, targets, upstream=u) for u in (1 / 3, 1.0))
    ratio = third[1].double().norm() / whole[1].double().norm()
    # one third rounded to bfloat16 would be off by 1.3e-3
    assert float(ratio) == pytest.approx(1 / 3, rel=5e-4)


class Calls(TorchDispatchMode):
    """Which gradients each call asks for, and the largest tensor made on the way."""

    def __init__(self):
        super().__init__()
        self.needs = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.golf.softcapped_cross_entropy.default:
            self.needs.append(tuple(args[-2:]))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_only_the_gradients_needed_are_computed():
    hidden, weight, targets = head()
    with Calls() as calls:
        softcapped_cross_entropy(hidden, weight, targets)
        softcapped_cross_entropy(hidden.detach(), weight, targets)
        softcapped_cross_entropy(hidden, weight.detach(), targets)
        with torch.no_grad():
            softcapped_cross_entropy(hidden, weight, targets)
    assert calls.needs == [(True, True), (False, True), (True, False), (False, False)]
    _, d_hidden, d_weight = torch.ops.golf.softcapped_cross_entropy(
        hidden.detach(), weight.detach(), targets, 30.0, True, -100, 0.0, False, False
    )
    assert d_hidden.numel() == d_weight.numel() == 0


@pytest.mark.parametrize("needs", [(True, True), (False, False)])
def test_the_whole_logits_never_exist(small_chunks, needs):
    hidden, weight, targets = (t.detach() for t in head(rows=60))
    with Calls() as calls:
        dispatch.run_on("torch", "softcapped_cross_entropy", hidden, weight, targets, 30.0, True, -100, 0.0, *needs)
    # the largest tensors are the gradient of hidden, or the weight
    assert calls.largest == (60 * 5 if needs[0] else 37 * 5)


class Memory(TorchDispatchMode):
    """Most bytes of tensors that were alive at once, those given apart."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(result is given for given in [*args, *(kwargs or {}).values()]):
            storage = result.untyped_storage()
            key = id(result)
            # a view has the memory of another
            self.alive[key] = (storage.data_ptr(), storage.nbytes())
            weakref.finalize(result, self.alive.pop, key)
            self.peak = max(self.peak, sum(dict(self.alive.values()).values()))
        return result


@pytest.mark.parametrize("needs", [(True, True), (False, False)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(4096, 1024), (2048, 8192), (8192, 2048)])
def test_memory_is_bounded_whatever_the_rows_and_the_vocabulary(rows, vocabulary, needs):
    hidden, weight, targets = (t.detach() for t in head(rows, 4, vocabulary, torch.float32))
    with Memory() as memory:
        dispatch.run_on("torch", "softcapped_cross_entropy", hidden, weight, targets, 30.0, True, -100, 0.0, *needs)
    chunk = module.CHUNK_BYTES["cpu"]
    # three arrays of a chunk's 16 MiB, and vectors; the logits alone are 16 or 64 MiB
    assert 2 * chunk <= memory.peak <= 3.1 * chunk


@pytest.mark.parametrize("needs", [(True, True), (False, False)])
def test_nothing_waits_for_the_device(small_chunks, monkeypatch, needs):
    # which only a CPU's targets go through
    monkeypatch.setattr(module, "check_targets", lambda *_: None)
    hidden, weight, targets = (t.detach() for t in head(ignored=(3,)))
    with NoHostTraffic():
        dispatch.run_on("torch", "softcapped_cross_entropy", hidden, weight, targets, 30.0, True, -100, 0.1, *needs)


def test_the_same_call_gives_the_same_bits(small_chunks):
    tensors = head(rows=64, dtype=torch.float32)
    first, second = (run(softcapped_cross_entropy, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


ONES = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(3, 1, 4)}, r"hidden: expected shape \(M, d\)"),
        ({"weight": torch.ones(4, 5)}, r"weight: expected shape \(V, 4\), found \(4, 5\)"),
        ({"weight": torch.ones(5, 4).double()}, "expected one floating dtype"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets: expected shape \(3,\)"),
        ({"targets": torch.zeros(3)}, "targets: expected int64 or int32"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "devices: expected one"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets\[1\]: expected 0 <= target < 5 or ignore_index -100, found 5"),
        ({"targets": torch.tensor([0, 1, -1])}, r"targets\[2\]: .* found -1"),
        ({"softcap": 0.0}, "softcap: expected a number > 0"),
        ({"softcap": float("inf")}, "softcap: expected a number > 0"),
        ({"reduction": "none"}, "reduction: expected 'mean' or 'sum', found 'none'"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        softcapped_cross_entropy(**{**ONES, **change})


def test_a_second_derivative_and_a_missing_gradient_are_refused():
    hidden, weight, targets = head()
    loss = softcapped_cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="need_hidden or need_weight is False"):
        torch.ops.golf.softcapped_cross_entropy(hidden, weight, targets, 30.0, True, -100, 0.0, True, False)


def test_opcheck():
    hidden, weight, targets = head(dtype=torch.float32)
    op = torch.ops.golf.softcapped_cross_entropy.default
    torch.library.opcheck(op, (hidden, weight, targets, 30.0, True, -100, 0.1, True, True))
    plain = (hidden.detach(), weight.detach(), targets)
    torch.library.opcheck(op, (*plain, 30.0, False, -100, 0.0, False, False))


def test_compiles_as_one_graph():
    compiled = torch.compile(softcapped_cross_entropy, fullgraph=True, backend="aot_eager")
    tensors = head(ignored=(3,))
    got, want = (run(f, *tensors, upstream=0.5) for f in (compiled, softcapped_cross_entropy))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), want[0])


def test_fake_tensors_on_cuda():
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, 64, device="cuda", dtype=torch.bfloat16) for rows in (300, 1024))
        targets = torch.empty(300, device="cuda", dtype=torch.int64)
        loss = softcapped_cross_entropy(hidden, weight, targets)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
        results = torch.ops.golf.softcapped_cross_entropy(hidden, weight, targets, 30.0, True, -100, 0.0, True, True)
        assert [(tuple(r.shape), r.dtype) for r in results[1:]] == [
            ((300, 64), torch.bfloat16),
            ((1024, 64), torch.bfloat16),
        ]

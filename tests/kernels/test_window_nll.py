"""Negative log-likelihood per row against the plain formula in float64."""

import importlib

import pytest
import torch
from host_traffic import NoHostTraffic
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import dispatch

# the package's names of these modules are the functions
head_module = importlib.import_module("golf_kernels.softcapped_cross_entropy")
nll_module = importlib.import_module("golf_kernels.window_nll")
window_nll = nll_module.window_nll


@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    monkeypatch.setenv("GOLF_BACKEND", "window_nll=torch")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 4 * 37 * 3 + 8, "cuda": 1 << 28})


def head(rows=11, d=5, vocabulary=37, dtype=torch.float64, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, d, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(vocabulary, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    if rows > 1:
        targets[0], targets[1] = 0, vocabulary - 1
    return hidden.to(dtype), weight.to(dtype), targets


def formula(hidden, weight, targets, softcap=30.0, logits_rounding="none"):
    before, each, after = (
        (lambda x: x.bfloat16().double()) if logits_rounding in kinds else (lambda x: x)
        for kinds in (("bf16", "bf16_capped", "bf16_each"), ("bf16_each",), ("bf16_capped", "bf16_each"))
    )
    z = after(softcap * each(torch.tanh(each(before(hidden.double() @ weight.double().T) / softcap))))
    return -torch.log(z.exp() / z.exp().sum(1, keepdim=True))[torch.arange(len(targets)), targets.long()]


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_every_row_in_float64(small_chunks, softcap):
    tensors = head()
    nll = window_nll(*tensors, softcap=softcap)
    assert nll.dtype == torch.float64 and nll.shape == (11,)
    assert torch.allclose(nll, formula(*tensors, softcap), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rounding", ["bf16", "bf16_capped", "bf16_each"])
def test_rounding_to_bf16_is_before_or_also_after_the_softcap_or_each_of_its_operations(small_chunks, rounding):
    tensors = head()
    rounded = formula(*tensors, logits_rounding=rounding)
    assert torch.allclose(window_nll(*tensors, logits_rounding=rounding), rounded, rtol=1e-12)
    for other in {"none", "bf16", "bf16_capped", "bf16_each"} - {rounding}:
        difference = (rounded - formula(*tensors, logits_rounding=other)).abs()
        assert 1e-4 < difference.max() < 0.2


def test_each_operation_rounds_as_torch_does_in_bfloat16():
    hidden, weight, targets = head(rows=64, d=16, vocabulary=512, dtype=torch.bfloat16, spread=1.0)
    logits = hidden @ weight.T
    eager = torch.nn.functional.cross_entropy((30.0 * torch.tanh(logits / 30.0)).float(), targets, reduction="none")
    found = window_nll(hidden, weight, targets, logits_rounding="bf16_each")
    # products of another order of sums fall to the other side of an edge now and then
    assert ((found - eager).abs() > 1e-5).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_rounding_narrow_inputs_give_float32_results(dtype):
    tensors = head(rows=65, d=32, vocabulary=1025, dtype=dtype, spread=1.0)
    nll = window_nll(*tensors)
    assert nll.dtype == torch.float32
    assert torch.allclose(nll.double(), formula(*tensors), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("rows", "d", "vocabulary"), [(0, 4, 9), (1, 1, 2), (130, 16, 1025), (3, 4, 8192)])
def test_shapes_and_target_dtypes(rows, d, vocabulary):
    hidden, weight, targets = head(rows, d, vocabulary, spread=1.0)
    for kind in (torch.int32, torch.int64):
        nll = window_nll(hidden, weight, targets.to(kind))
        assert torch.allclose(nll, formula(hidden, weight, targets), rtol=1e-11, atol=1e-12)
    assert torch.equal(window_nll(hidden, torch.ones(1, d).double(), targets * 0), torch.zeros(rows).double())


def test_strides_do_not_matter():
    hidden, weight, targets = head()
    views = hidden.T.contiguous().T, weight.repeat(2, 2)[::2, ::2], targets.repeat_interleave(2)[::2]
    assert torch.allclose(window_nll(*views), formula(*views), rtol=1e-12)


def test_logits_at_the_cap_and_nan():
    hidden, weight, targets = head()
    hidden[2] *= 1e6
    hidden[5, 1] = float("nan")
    nll = window_nll(hidden, weight, targets)
    clean = [row for row in range(11) if row != 5]
    assert torch.allclose(nll[clean], formula(hidden, weight, targets)[clean], rtol=1e-11)
    assert nll[5].isnan() and 0 <= nll[2] <= 60 + torch.log(torch.tensor(37.0))


def test_the_whole_logits_never_exist(small_chunks):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Largest() as largest:
        dispatch.run_on("torch", "window_nll", *head(rows=60), 30.0, 0)
    assert largest.numel == 60 * 5


@pytest.mark.parametrize("rounding", range(4))
def test_nothing_waits_for_the_device(small_chunks, monkeypatch, rounding):
    # which only a CPU's targets go through
    monkeypatch.setattr(nll_module, "check_targets", lambda *_: None)
    tensors = head()
    with NoHostTraffic():
        dispatch.run_on("torch", "window_nll", *tensors, 30.0, rounding)


ONES = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4, 5)}, r"weight: expected shape \(V, 4\)"),
        ({"targets": torch.tensor([0, 1, 5])}, r"targets\[2\]: expected 0 <= target < 5, found 5"),
        ({"targets": torch.tensor([0, -100, 1])}, r"targets\[1\]: .* found -100"),
        (
            {"logits_rounding": "fp16"},
            "logits_rounding: expected one of none, bf16, bf16_capped, bf16_each, found 'fp16'",
        ),
        ({"softcap": -1.0}, "softcap: expected a number > 0"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        window_nll(**{**ONES, **change})


def test_gradients_are_refused():
    hidden, weight, targets = head()
    with pytest.raises(RuntimeError, match="has no gradient"):
        window_nll(hidden, weight.requires_grad_(), targets)
    with torch.no_grad():
        assert not window_nll(hidden, weight, targets).requires_grad


def test_opcheck_and_compile():
    tensors = head(dtype=torch.float32)
    for rounding in range(4):
        torch.library.opcheck(torch.ops.golf.window_nll.default, (*tensors, 30.0, rounding))
    compiled = torch.compile(window_nll, fullgraph=True, backend="aot_eager")
    for rounding in ("bf16", "bf16_each"):
        assert torch.equal(compiled(*tensors, logits_rounding=rounding), window_nll(*tensors, logits_rounding=rounding))


def test_fake_tensors_on_cuda():
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, 64, device="cuda", dtype=torch.bfloat16) for rows in (300, 1024))
        nll = window_nll(hidden, weight, torch.empty(300, device="cuda", dtype=torch.int32))
        assert nll.shape == (300,) and nll.dtype == torch.float32 and nll.device.type == "cuda"

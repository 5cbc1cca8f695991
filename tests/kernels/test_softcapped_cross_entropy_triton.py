"""The Triton kernels of the head against float64: on a Hopper GPU, else in Triton's interpreter."""

import importlib

import pytest
import torch

from golf_kernels import dispatch
from golf_kernels.window_nll import window_nll

# the package's name of this module is the function
module = importlib.import_module("golf_kernels.softcapped_cross_entropy")
softcapped_cross_entropy = module.softcapped_cross_entropy

pytestmark = pytest.mark.skipif(dispatch.triton_problem() is not None, reason=str(dispatch.triton_problem()))

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter multiplies the bit patterns of bfloat16
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)
# float32 differs from float64 by what exponentials and sums lose
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def triton_only(monkeypatch, poisoned_memory):
    monkeypatch.setenv("GOLF_BACKEND", "softcapped_cross_entropy=triton,window_nll=triton")


@pytest.fixture
def chunks_of_five_rows(monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda device, vocabulary: 5)


def head(rows=11, d=24, vocabulary=37, dtype=torch.float16, ignored=(), spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(rows + vocabulary + 100_000 * seed)
    hidden = spread * torch.randn(rows, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    if rows > 1:
        # both ends of the vocabulary
        targets[0], targets[1] = 0, vocabulary - 1
    targets[list(ignored)] = -100
    made = (hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_())
    return *made, targets.to(DEVICE)


def formula(hidden, weight, targets, *, softcap=30.0, reduction="mean", ignore_index=-100, z_loss=0.0):
    """The loss as people write it: products in the dtype of the inputs, the rest in float32 at least."""
    logits = hidden @ weight.T
    z = softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)
    lse = torch.logsumexp(z, 1)
    kept = (targets != ignore_index).nonzero().flatten()
    per_row = lse[kept] - z[kept, targets[kept].long()] + z_loss * lse[kept] ** 2
    return per_row.sum() / (len(kept) if reduction == "mean" else 1)


def exactly(hidden, weight, targets):
    return *(tensor.detach().double().requires_grad_() for tensor in (hidden, weight)), targets


def run(function, hidden, weight, targets, **options):
    loss = function(hidden, weight, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def errors(got, want):
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [(), (1, 2, 5, 10)])
@pytest.mark.parametrize(
    ("softcap", "reduction", "z_loss"), [(30.0, "mean", 0.0), (2.0, "sum", 0.0), (30.0, "mean", 0.05)]
)
def test_loss_and_gradients(chunks_of_five_rows, dtype, softcap, reduction, z_loss, ignored):
    tensors = head(dtype=dtype, ignored=ignored)
    options = {"softcap": softcap, "reduction": reduction, "z_loss": z_loss}
    got = run(softcapped_cross_entropy, *tensors, **options)
    want = run(formula, *exactly(*tensors), **options)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    assert max(errors(got, want)) < ROUNDING[dtype], errors(got, want)


@pytest.mark.parametrize("vocabulary", [1, 2, 1023, 1024, 1025, 2048, 4096, 8192])
def test_errs_no_more_than_the_plain_chain(vocabulary):
    found, plain = torch.zeros(3), torch.zeros(3)
    # several heads, as the error of one loss is that of a single number
    for seed in range(8):
        tensors = head(rows=40, d=32, vocabulary=vocabulary, dtype=DTYPES[0], seed=seed)
        got, want = run(softcapped_cross_entropy, *tensors), run(formula, *exactly(*tensors))
        if vocabulary == 1:
            # one token alone has loss and gradients of exactly zero
            assert all(torch.equal(g, torch.zeros_like(g)) for g in got)
            return
        found += torch.tensor(errors(got, want))
        plain += torch.tensor(errors(run(formula, *tensors), want))
    # both round logits and gradients once, and differ by the order of their sums: over other seeds the loss's ratio lies
    # in 0.995 to 1.005, the gradients' in 0.9999 to 1.0004
    assert (found <= torch.tensor([1.01, 1.001, 1.001]) * plain).all(), (found, plain)


def test_a_variant_has_chunks_of_its_bytes_of_logits(monkeypatch):
    tensors = head(rows=11, vocabulary=40, ignored=(2, 7))
    want = run(formula, *exactly(*tensors))
    rows = []
    kernels = importlib.import_module("golf_kernels.softcapped_cross_entropy_triton")
    given = kernels.loss_and_gradient
    monkeypatch.setattr(kernels, "loss_and_gradient", lambda *a: rows.append(len(a[0])) or given(*a))
    arguments = [*(tensor.detach() for tensor in tensors), 30.0, True, -100, 0.0, True, True]
    size = tensors[0].element_size()
    assert max(errors(module._triton(*arguments, chunk_bytes=4 * 40 * size), want)) < ROUNDING[DTYPES[0]]
    assert rows == [4, 4, 3]
    dispatch.run_on("triton/32MiB", "softcapped_cross_entropy", *arguments)
    # 2,048 rows of 8,192 logits in bfloat16, and all 11 of this batch
    assert rows.pop() == 11 and module.CHUNKS["32MiB"] == 2048 * 8192 * 2


def test_logits_at_the_cap():
    hidden, weight, targets = head(dtype=DTYPES[-1], spread=100.0)
    got, want = (
        run(f, *t)
        for f, t in ((softcapped_cross_entropy, (hidden, weight, targets)), (formula, exactly(hidden, weight, targets)))
    )
    capped = 30 * torch.tanh(hidden.detach().double() @ weight.detach().double().T / 30)
    assert capped.max() > 30 - 1e-6 and capped.min() < -30 + 1e-6
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-3) and float(got[0]) > 10
    assert all(gradient.isfinite().all() for gradient in got[1:])
    huge = torch.full_like(hidden.detach(), 6e4)
    nll = window_nll(huge, torch.ones_like(weight.detach()), targets)
    # every logit is at the cap, so every token is as likely
    assert torch.allclose(nll, torch.full_like(nll, 37.0).log(), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows_and_nothing_but_ignored_rows(reduction):
    for tensors in (head(rows=0), head(rows=4, ignored=(0, 1, 2, 3))):
        got = run(softcapped_cross_entropy, *tensors, reduction=reduction, z_loss=0.1)
        assert all(torch.equal(result, torch.zeros_like(result)) for result in got)


def test_an_ignored_row_may_hold_anything_and_nan_is_not_hidden():
    hidden, weight, targets = head(ignored=(4,))
    with torch.no_grad():
        hidden[4] = float("nan")
    loss, d_hidden, _ = run(softcapped_cross_entropy, hidden, weight, targets)
    assert loss.isfinite() and d_hidden.isfinite().all() and torch.equal(d_hidden[4], torch.zeros_like(d_hidden[4]))
    with torch.no_grad():
        alone = softcapped_cross_entropy(hidden, weight, targets)
        assert float(alone) == pytest.approx(float(loss), rel=1e-3)
        hidden[3, 2] = float("nan")
        assert softcapped_cross_entropy(hidden, weight, targets).isnan()
        assert window_nll(hidden, weight, targets.clamp(min=0))[[3, 4]].isnan().all()
    assert run(softcapped_cross_entropy, hidden, weight, targets)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_target_dtype_and_own_ignore_index(chunks_of_five_rows, dtype):
    hidden, weight, targets = head()
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = weight.detach().repeat(2, 2)[::2, ::2].requires_grad_()
    targets = targets.repeat_interleave(2)[::2].to(dtype)
    options = {"ignore_index": int(targets[3])}
    want = run(formula, *exactly(hidden, weight, targets), **options)
    assert max(errors(run(softcapped_cross_entropy, hidden, weight, targets, **options), want)) < ROUNDING[DTYPES[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "vocabulary"), [(1, 8, 2), (130, 72, 300), (3, 64, 1025), (260, 16, 129)])
def test_loss_alone_and_every_row(rows, d, vocabulary, dtype):
    hidden, weight, targets = (tensor.detach() for tensor in head(rows, d, vocabulary, dtype))
    with torch.no_grad():
        loss = softcapped_cross_entropy(hidden, weight, targets, z_loss=0.01)
    want = formula(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in (hidden, weight, targets)),
        z_loss=0.01,
    )
    assert float(loss) == pytest.approx(float(want), rel=2e-6)
    z = 30 * torch.tanh(hidden.double() @ weight.double().T / 30)
    expected = torch.logsumexp(z, 1) - z.gather(1, targets[:, None])[:, 0]
    nll = window_nll(hidden, weight, targets.to(torch.int32))
    assert nll.dtype == torch.float32 and torch.allclose(nll.double(), expected, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("rounding", ["bf16", "bf16_capped", "bf16_each"])
def test_rounding_to_bf16_is_before_or_also_after_the_softcap_or_each_of_its_operations(rounding):
    hidden, weight, targets = (tensor.detach() for tensor in head(rows=50, vocabulary=300, spread=3.0))
    logits = (hidden.float() @ weight.float().T).bfloat16().double()
    z = 30 * torch.tanh(logits / 30)
    if rounding == "bf16_each":
        z = 30 * torch.tanh((logits / 30).bfloat16().double()).bfloat16().double()
    if rounding != "bf16":
        z = z.bfloat16().double()
    expected = torch.logsumexp(z, 1) - z.gather(1, targets[:, None])[:, 0]
    rounded = window_nll(hidden, weight, targets, logits_rounding=rounding)
    # a logit on the edge between two bfloat16 values may fall to either side
    assert ((rounded.double() - expected).abs() > 1e-5 * expected).sum() <= 1
    assert (rounded - window_nll(hidden, weight, targets)).abs().max() > 1e-3


def test_the_same_call_gives_the_same_bits(chunks_of_five_rows):
    tensors = head(rows=64)
    first, second = (run(softcapped_cross_entropy, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_columns_of_a_program_are_whole_tiles_that_cover_the_vocabulary():
    from golf_kernels.softcapped_cross_entropy_triton import ROW_BLOCKS, column_span

    # 132 programs for 16 tiles of rows: 8 for each, and one alone where there are rows enough
    assert column_span(16, 8192, 132) == 1024 and column_span(768, 8192, 132) == 8192
    for tiles in (0, 1, 7, 500):
        for vocabulary in (1, 127, 1025, 8192):
            span = column_span(tiles, vocabulary, 132)
            parts = -(-vocabulary // span)
            assert span % ROW_BLOCKS["BLOCK_N"] == 0 and (parts - 1) * span < vocabulary


@pytest.mark.parametrize(
    ("tensors", "fragment"),
    [
        (head(dtype=torch.float64), "hidden is torch.float64, the Triton kernels take"),
        (head(vocabulary=8193), "its kernel takes a vocabulary of at most 8192, found 8193"),
    ],
)
def test_what_the_kernels_cannot_is_refused_when_forced(tensors, fragment):
    with pytest.raises(dispatch.BackendError, match=fragment):
        softcapped_cross_entropy(*tensors)


def test_the_kernels_wait_until_they_are_asked_for(monkeypatch):
    monkeypatch.delenv("GOLF_BACKEND")
    for op in ("softcapped_cross_entropy", "window_nll"):
        choice = dispatch.choose(op, device="cuda")
        assert choice.backend == "torch" and "not chosen: python -m golf_kernels tune" in choice.reason

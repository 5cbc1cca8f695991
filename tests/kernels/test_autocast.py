"""Operators under torch.autocast against the PyTorch lines that they replace."""

import pytest
import torch
from torch.nn import functional as F

from golf_kernels import leaky_relu2_mlp, softcapped_cross_entropy, window_nll

ROWS, WIDTH, HIDDEN, VOCABULARY = 24, 16, 64, 96


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def close(got, want, exact):
    """The operator errs as the lines that it replaces. It rounds x before the norm as well as after it: √2 at most."""
    assert got.dtype == want.dtype
    unit = exact.norm()
    assert (got - exact).norm() / unit < 1.42 * (want - exact).norm() / unit + 1e-6


def gradients(function, dtype, weights):
    leaves = [weight.clone().to(dtype).requires_grad_() for weight in weights]
    result = function(*leaves)
    result.float().square().sum().backward() if dtype != torch.float64 else result.square().sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_follows_autocast(dtype):
    x, w, targets = random(ROWS, WIDTH, dtype=dtype), random(VOCABULARY, WIDTH), torch.arange(ROWS)

    def before(x, w):
        return F.cross_entropy((30 * torch.tanh(x @ w.T / 30)).to(torch.promote_types(w.dtype, torch.float32)), targets)

    exact = gradients(lambda w: before(x.double(), w), torch.float64, [w])
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(lambda w: before(x, w), torch.float32, [w])
        got = gradients(lambda w: softcapped_cross_entropy(x, w, targets, softcap=30.0), torch.float32, [w])
        with torch.no_grad():
            rows = window_nll(x, w, targets, softcap=30.0)
    for a, b, c in zip(got, want, exact, strict=True):
        close(a, b, c)
    assert rows.mean().item() == pytest.approx(got[0].item(), rel=1e-5)
    # products in bfloat16, also of float32 inputs
    with torch.no_grad():
        rounded = softcapped_cross_entropy(x.bfloat16(), w.bfloat16(), targets, softcap=30.0)
    assert got[0] == rounded
    if dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="expected one floating dtype"):
            softcapped_cross_entropy(x, w, targets, softcap=30.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("extras", [False, True])
def test_the_mlp_follows_autocast(dtype, extras):
    x = random(ROWS, WIDTH, dtype=dtype)
    weights = [random(HIDDEN, WIDTH, scale=WIDTH**-0.5), random(WIDTH, HIDDEN, scale=HIDDEN**-0.5)]
    weights += [random(WIDTH)] if extras else []

    def before(x, up, down, scale=None):
        y = F.leaky_relu(F.rms_norm(x, x.shape[-1:], eps=1e-6) @ up.T, 0.5) ** 2 @ down.T
        return y if scale is None else x + scale * y

    def after(up, down, scale=None):
        more = {} if scale is None else {"residual": x, "scale": scale}
        return leaky_relu2_mlp(x, up, down, slope=0.5, norm_eps=1e-6, **more)

    exact = gradients(lambda *w: before(x.double(), *w), torch.float64, weights)
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(lambda *w: before(x, *w), torch.float32, weights)
        got = gradients(after, torch.float32, weights)
    for a, b, c in zip(got, want, exact, strict=True):
        close(a, b, c)


def test_float64_stays_under_autocast():
    x, w = random(ROWS, WIDTH, dtype=torch.float64), random(VOCABULARY, WIDTH, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert softcapped_cross_entropy(x, w, torch.arange(ROWS)).dtype == torch.float64

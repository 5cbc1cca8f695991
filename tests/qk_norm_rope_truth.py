"""QK-norm, rotation and gain as people write them, and how results are compared with float64, for every back end."""

import torch

LEAVES = ("q", "k", "gain")
EPS = 1e-6


def formula(q, k, cosine, sine, gain, *, eps):
    """The chain as people write it, in the dtype of its inputs; the norm in float32 at least, as torch does it."""

    def normed(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def turned(x):
        half = cosine.shape[-1]
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cosine + b * sine, -a * sine + b * cosine, x[..., 2 * half :]], dim=-1)

    return turned(normed(q)) * gain.to(q.dtype)[:, None], turned(normed(k))


def run(function, tensors, gradients, eps=EPS):
    """Results and gradients by name."""
    results = function(**tensors, eps=eps)
    found = torch.autograd.grad(results, [tensors[name] for name in LEAVES], gradients)
    return dict(zip(("q_hat", "k_hat", *LEAVES), [*(r.detach() for r in results), *found], strict=True))


def exactly(tensors):
    return {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}


def errors(got, want):
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}

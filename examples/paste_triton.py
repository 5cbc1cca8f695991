"""Writes a single-file script that contains a kernel file of golf_kernels and needs only torch and triton.

    python examples/paste_triton.py --out single.py
    python single.py                          # on a Hopper GPU
    TRITON_INTERPRET=1 python single.py       # without a GPU

The script is an unchanged copy of `golf_kernels/softcapped_cross_entropy_triton.py`, followed by `SCRIPT` below.
`SCRIPT` wraps the kernel in an autograd function and compares it with plain PyTorch. You can paste other `*_triton.py`
files in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import golf_kernels

SCRIPT = '''

class SoftcappedHead(torch.autograd.Function):
    """Mean cross-entropy of softcapped logits; the gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap):
        logits = hidden @ weight.T  # (rows, vocabulary)
        losses = torch.empty(len(targets), device=hidden.device)
        scale = torch.full((), 1 / len(targets), device=hidden.device)
        loss_and_gradient(logits, targets, scale, losses, softcap, 0.0, -100)  # logits hold their gradient now
        ctx.save_for_backward(logits @ weight, logits.T @ hidden)
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, d_weight = ctx.saved_tensors
        return upstream * d_hidden, upstream * d_weight, None, None


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(16, 32, device=device, requires_grad=True)
    weight = torch.randn(1000, 32, device=device, requires_grad=True)
    targets = torch.randint(1000, (16,), device=device)
    plain = torch.nn.functional.cross_entropy(30 * torch.tanh(hidden @ weight.T / 30), targets)
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = SoftcappedHead.apply(hidden, weight, targets, 30.0)
    found = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    print(f"loss {loss.item():.6f}, plain PyTorch {plain.item():.6f}")
'''


def single_script() -> str:
    """Returns the text of the kernel file, followed by `SCRIPT`."""
    kernels = Path(golf_kernels.__file__).with_name("softcapped_cross_entropy_triton.py").read_text()
    return kernels + SCRIPT


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("single.py"))
    out = parser.parse_args().out
    out.write_text(single_script())
    print(f"written: {out}")

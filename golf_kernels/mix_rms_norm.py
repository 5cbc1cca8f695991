"""Mixes the residual stream x with its initial value x0 and normalizes the mixture: `golf::mix_rms_norm`.

    h = m₀ ⊙ x + m₁ ⊙ x0,  n = gain · h · r,  r = 1 / √(mean(h²) + eps) of each row of d numbers

The norm uses h before h is rounded. The backward pass keeps the mix (m₀, m₁) and, for the mix's gradient, x and x0. It
computes h and r again. With t, the total gradient of h, the gradients are

    t = dh + gain · r · (dn − h · r² · ⟨dn, h⟩ / d)
    dx = m₀ ⊙ t,  dx0 = m₁ ⊙ t,  dm₀ = Σ t ⊙ x,  dm₁ = Σ t ⊙ x0  (sums over rows)

`golf::mix_rms_norm_backward` computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from golf_kernels import dispatch, operators


def mix_rms_norm(x: Tensor, x0: Tensor, mix: Tensor, *, eps: float, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mixes x with x0 and normalizes the rows: h = m₀ ⊙ x + m₁ ⊙ x0, n = gain · h / √(mean(h²) + eps).

    x, x0 and mix have first derivatives, but no second ones.

    Args:
        x: `(B, T, d)`, any floating dtype, any strides: the residual stream. B and T may be 0.
        x0: `(B, T, d)` in the dtype of x, any strides: the residual stream before the first layer. It may be x itself.
        mix: `(2, d)`, float32 or the dtype of x: m₀ and m₁. The operator rounds mix to the dtype of x. It does
            not round the gradient of mix.
        eps: epsilon of the norm.
        gain: constant factor on n.

    Returns:
        h and n, contiguous, in the shape and dtype of x.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    mixed: tuple[Tensor, Tensor] = torch.ops.golf.mix_rms_norm(x, x0, mix, eps, gain)
    return mixed


def _check(x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float) -> None:
    if x.ndim != 3 or not x.dtype.is_floating_point or x.shape[2] == 0:
        raise ValueError(f"x: expected shape (B, T, d) and a floating dtype, found {tuple(x.shape)} and {x.dtype}")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number >= 0, found {eps}")
    for name, tensor, shape in (("x0", x0, x.shape), ("mix", mix, (2, x.shape[2]))):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, found {tuple(tensor.shape)}")
        dtypes = (x.dtype, torch.float32) if name == "mix" else (x.dtype,)
        if tensor.dtype not in dtypes or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {' or '.join(dict.fromkeys(map(str, dtypes)))} on {x.device} like x, "
                f"found {tensor.dtype} on {tensor.device}"
            )


def _fake(x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    _check(x, x0, mix, eps, gain)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _mixed(x: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mix rounded to the dtype of x, and h before rounding, both in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rounded = mix.to(x.dtype).to(dtype)
    # in place, here and below, because allocating memory takes most of the time on a CPU
    return rounded, (rounded[0] * x.to(dtype)).addcmul_(rounded[1], x0.to(dtype))


def _reference(x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    _check(x, x0, mix, eps, gain)
    _, h = _mixed(x, x0, mix)
    normed = F.rms_norm(h, h.shape[-1:], eps=eps).mul_(gain)
    return h.to(x.dtype).contiguous(), normed.to(x.dtype).contiguous()


def _backward_fake(
    dh: Tensor, dn: Tensor, x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), mix.new_empty(mix.shape)


def _backward_reference(
    dh: Tensor, dn: Tensor, x: Tensor, x0: Tensor, mix: Tensor, eps: float, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    rounded, h = _mixed(x, x0, mix)
    rstd = (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    along = (dn * h).mean(dim=-1, keepdim=True) * rstd.square()
    total = h.mul_(-along).add_(dn).mul_(gain * rstd).add_(dh)
    dx, dx0 = ((factor * total).to(x.dtype).contiguous() for factor in rounded.unbind())
    sums = [(total * stream).sum(dim=(0, 1)) for stream in (x, x0)]
    return dx, dx0, torch.stack(sums).to(mix.dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, x0, mix, eps, gain = inputs
    ctx.save_for_backward(x, x0, mix)
    ctx.options = (eps, gain)


def _backward(ctx: Any, dh: Tensor, dn: Tensor) -> tuple[Any, ...]:
    return *torch.ops.golf.mix_rms_norm_backward(dh, dn, *ctx.saved_tensors, *ctx.options), None, None


def _triton_problem(x: Tensor) -> str | None:
    unfit = dispatch.elementwise_problem("x", x)
    if unfit is not None:
        return unfit
    return f"the Triton kernels take a width of at most 4096, found {x.shape[2]}" if x.shape[2] > 4096 else None


def _triton_supports(*args: Any) -> str | None:
    return dispatch.triton_problem() or (_triton_problem(args[0]) if args and args[0].ndim == 3 else None)


def _triton_backward_supports(*args: Any) -> str | None:
    return dispatch.triton_problem() or (_triton_problem(args[2]) if args else None)


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from golf_kernels import mix_rms_norm_triton

    _check(*args)
    return mix_rms_norm_triton.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from golf_kernels import mix_rms_norm_triton

    return mix_rms_norm_triton.backward(*args)


def _inputs(make: operators.Make, batch: int = 2, length: int = 19, width: int = 48) -> operators.Inputs:
    mix = 0.3 * make(2, width, dtype=torch.float32)
    mix[0] += 1
    x, x0 = make(batch, length, width), make(batch, length, width)
    return {
        "x": x.requires_grad_(),
        "x0": x0.requires_grad_(),
        "mix": mix.requires_grad_(),
        "eps": 1e-6,
        "gain": 0.5,
    }


dispatch.define(
    "mix_rms_norm",
    "(Tensor x, Tensor x0, Tensor mix, float eps, float gain) -> (Tensor h, Tensor n)",
    reference=_reference,
    fake=_fake,
)
dispatch.define_backward(
    "mix_rms_norm",
    "(Tensor dh, Tensor dn, Tensor x, Tensor x0, Tensor mix, float eps, float gain) "
    "-> (Tensor dx, Tensor dx0, Tensor dmix)",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
dispatch.register("mix_rms_norm", "triton", _triton, supports=_triton_supports)
dispatch.register("mix_rms_norm_backward", "triton", _triton_backward, supports=_triton_backward_supports)
operators.declare(
    operators.Operator(
        "mix_rms_norm",
        mix_rms_norm,
        _inputs,
        cases=[{"batch": 48, "length": 2048, "width": width} for width in (333, 768, 4096)],
        members=("mix_rms_norm", "mix_rms_norm_backward"),
        called_by="model",
    )
)

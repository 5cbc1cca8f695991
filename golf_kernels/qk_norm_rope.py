"""QK-norm, rotary embedding and query gain as one operator: `golf::qk_norm_rope`.

    n(x) = x · rstd,  rstd = 1 / √(mean(x²) + eps) of each head's vector of D numbers
    q̂ = g · R n(q),  k̂ = R n(k),  R (a, b) = (a cos + b sin, −a sin + b cos), a and b halves of the first r dimensions

The backward pass keeps rstd, q̂ and k̂. Attention keeps q̂ and k̂ anyway. With u = q̂ / g and n = n(q):

    s = ⟨dq̂, u⟩ = ⟨Rᵀ dq̂, n⟩,  dg = Σ s,  dq = rstd · g · (Rᵀ dq̂ − n · s / D),  n = R⁻¹ u = Rᵀ u / (cos² + sin²)

and the same for k with g = 1. `golf::qk_norm_rope_backward` computes these gradients. The division by cos² + sin² keeps
them exact if cos and sin were rounded to bfloat16.

With a gain g of 0, q̂ would be 0, and u could not be recovered for dg. So a gain closer to 0 than `GAIN_FLOOR` is
replaced by plus or minus this floor. A float32 softmax gives the same result for the floor 2⁻⁶⁰ as for 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from golf_kernels import dispatch, operators

GAIN_FLOOR = {torch.float16: 2.0**-12}
"""Smallest magnitude of a gain in float16. The smallest positive float16 is 2⁻²⁴, so a q̂ of 2⁻¹² still has 12 bits."""
_WIDE_FLOOR = 2.0**-60


def qk_norm_rope(
    q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Prepares queries and keys for attention: q̂ = gain · rotate(rms(q)), k̂ = rotate(rms(k)).

    q, k and gain have first derivatives, but no second ones. cosine and sine have none.

    Args:
        q: `(B, T, H, D)`, any floating dtype, any strides. Each size except D may be 0.
        k: `(B, T, H_kv, D)` in the dtype of q, any strides.
        cosine: `(T, 1, r/2)` in the dtype of q, with r ≤ D. Dimensions from r on are not rotated.
        sine: `(T, 1, r/2)` in the dtype of q. cos² + sin² must be 1 up to rounding.
        gain: `(H,)`, float32 or the dtype of q. The operator rounds gain to the dtype of q, but not its gradient.
        eps: epsilon of the norm x / √(mean(x²) + eps).

    Returns:
        q̂ and k̂, contiguous, with the shapes and dtype of q and k.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    rotated: tuple[Tensor, Tensor, Tensor] = torch.ops.golf.qk_norm_rope(q, k, cosine, sine, gain, eps)
    return rotated[0], rotated[1]


def written_out(
    q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` written with PyTorch's own operations for `torch.compile`, which cannot fuse a `golf::` operator.

    The backward pass is written out too, because autograd's own backward pass would keep q and k and read them again.

    Args:
        q, k, cosine, sine, gain, eps: see `qk_norm_rope`.

    Returns:
        q̂ and k̂.
    """
    turned: tuple[Tensor, Tensor, Tensor] = _WrittenOut.apply(q, k, cosine, sine, gain, eps)
    return turned[0], turned[1]


def _check(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, eps: float) -> None:
    if q.ndim != 4 or not q.dtype.is_floating_point or q.shape[-1] == 0:
        raise ValueError(f"q: expected shape (B, T, H, D) and a floating dtype, found {tuple(q.shape)} and {q.dtype}")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number >= 0, found {eps}")
    batch, length, heads, dim = q.shape
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (batch, length, dim):
        raise ValueError(f"k: expected shape ({batch}, {length}, H_kv, {dim}) like q, found {tuple(k.shape)}")
    if cosine.ndim != 3 or cosine.shape[:2] != (length, 1) or 2 * cosine.shape[2] > dim:
        raise ValueError(
            f"cosine: expected shape ({length}, 1, r/2) with r <= {dim} for q's positions, found {tuple(cosine.shape)}"
        )
    for name, tensor, shape in (("sine", sine, cosine.shape), ("gain", gain, (heads,))):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, found {tuple(tensor.shape)}")
    for name, tensor in {"k": k, "cosine": cosine, "sine": sine, "gain": gain}.items():
        dtypes = (q.dtype, torch.float32) if name == "gain" else (q.dtype,)
        if tensor.dtype not in dtypes or tensor.device != q.device:
            raise ValueError(
                f"{name}: expected {' or '.join(dict.fromkeys(map(str, dtypes)))} on {q.device} like q, "
                f"found {tensor.dtype} on {tensor.device}"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fake(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, cosine, sine, gain, eps)
    rstd = q.new_empty((*q.shape[:2], q.shape[2] + k.shape[2]), dtype=_wide(q.dtype))
    return q.new_empty(q.shape), k.new_empty(k.shape), rstd


def gain_floor(dtype: torch.dtype) -> float:
    """Returns the smallest magnitude of a gain for queries of this dtype."""
    return GAIN_FLOOR.get(dtype, _WIDE_FLOOR)


def _floored(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the gain as `(H, 1)`, rounded to dtype. Its magnitude is at least the floor."""
    floor = gain_floor(dtype)
    rounded = gain.to(dtype).to(_wide(dtype)).unsqueeze(1)
    return torch.where(rounded.abs() < floor, torch.where(rounded < 0, -floor, floor), rounded)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Returns R x for each head's vector x. With −sine it returns Rᵀ x."""
    half, dim = cosine.shape[-1], x.shape[-1]
    if torch.compiler.is_compiling():
        # torch.compile would write each operand of cat in a separate pass; these operations need only one pass
        other = x[..., : 2 * half].unflatten(-1, (2, half)).flip(-2).flatten(-2) * torch.cat([sine, -sine], dim=-1)
        kept = F.pad(torch.cat([cosine, cosine], dim=-1), (0, dim - 2 * half), value=1.0)
        return x * kept + F.pad(other, (0, dim - 2 * half))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)


def reference(
    q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, cosine, sine, gain, eps)
    dtype = _wide(q.dtype)
    cosine, sine = cosine.to(dtype), sine.to(dtype)
    rotated, rstds = [], []
    for x in (q.to(dtype), k.to(dtype)):
        rstd = (x.square().mean(dim=-1) + eps).rsqrt()
        rotated.append(_rotate(x * rstd.unsqueeze(-1), cosine, sine))
        rstds.append(rstd)
    queries, keys = rotated[0] * _floored(gain, q.dtype), rotated[1]
    return _rounded(queries, q.dtype), _rounded(keys, k.dtype), torch.cat(rstds, dim=-1)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    # torch.compile of torch 2.11 gives an autograd.Function gradients of 0 if it converts a result to the same dtype
    return x if x.dtype == dtype else x.to(dtype)


def _backward_fake(
    dq_hat: Tensor,
    dk_hat: Tensor,
    q_hat: Tensor,
    k_hat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_hat.new_empty(q_hat.shape), k_hat.new_empty(k_hat.shape), gain.new_empty(gain.shape)


def backward_reference(
    dq_hat: Tensor,
    dk_hat: Tensor,
    q_hat: Tensor,
    k_hat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    gain: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    cosine, sine = cosine.to(rstd.dtype), sine.to(rstd.dtype)
    size = cosine.square() + sine.square()
    heads, dim = q_hat.shape[2:]
    floored = _floored(gain, q_hat.dtype)
    groups = (
        (dq_hat, q_hat, floored, rstd[..., :heads]),
        (dk_hat, k_hat, floored.new_ones(1, 1), rstd[..., heads:]),
    )
    gradients, sums = [], []
    for upstream, output, factor, inverse_rms in groups:
        upstream, unit = upstream.to(rstd.dtype), output.to(rstd.dtype) / factor
        along = torch.linalg.vecdot(upstream, unit).unsqueeze(-1)
        normed = _rotate(unit, cosine / size, -sine / size)
        gradient = inverse_rms.unsqueeze(-1) * factor * (_rotate(upstream, cosine, -sine) - normed * (along / dim))
        gradients.append(gradient.to(output.dtype))
        sums.append(along.sum(dim=(0, 1, 3)))
    return gradients[0], gradients[1], sums[0].to(gain.dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, cosine, sine, gain, _ = inputs
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise RuntimeError("golf::qk_norm_rope has no gradient for cosine and sine; detach the tables")
    q_hat, k_hat, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(q_hat, k_hat, cosine, sine, gain, rstd)


def _backward(ctx: Any, dq_hat: Tensor, dk_hat: Tensor, unused: Any) -> tuple[Any, ...]:
    dq, dk, dgain = torch.ops.golf.qk_norm_rope_backward(dq_hat, dk_hat, *ctx.saved_tensors)
    return dq, dk, None, None, dgain, None


class _WrittenOut(torch.autograd.Function):
    forward = staticmethod(reference)
    setup_context = staticmethod(_setup_context)

    # like the operator, this function has no second derivative
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_hat: Tensor, dk_hat: Tensor, unused: Any) -> tuple[Any, ...]:
        dq, dk, dgain = backward_reference(dq_hat, dk_hat, *ctx.saved_tensors)
        return dq, dk, None, None, dgain, None


def triton_problem(q: Tensor, k: Tensor) -> str | None:
    unfit = dispatch.elementwise_problem("q", q)
    if unfit is not None:
        return unfit
    heads, dim = max(q.shape[2], k.shape[2]), q.shape[3]
    # a program keeps all numbers of a position in registers, with heads and dimensions padded to powers of 2
    if heads > 64 or dim > 256 or (heads - 1).bit_length() + (dim - 1).bit_length() > 13:
        return f"the Triton kernels take at most 64 heads of 128 dimensions or 32 of 256, found {heads} of {dim}"
    return None


def triton_supports(*args: Any) -> str | None:
    fits = args and all(tensor.ndim == 4 for tensor in args[:2])
    return dispatch.triton_problem() or (triton_problem(*args[:2]) if fits else None)


def _triton_backward_supports(*args: Any) -> str | None:
    return dispatch.triton_problem() or (triton_problem(*args[2:4]) if args else None)


def triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from golf_kernels import qk_norm_rope_triton

    _check(*args)
    return qk_norm_rope_triton.forward(*args, floor=gain_floor(args[0].dtype))


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from golf_kernels import qk_norm_rope_triton

    return qk_norm_rope_triton.backward(*args, floor=gain_floor(args[2].dtype))


def _inputs(
    make: operators.Make,
    batch: int = 2,
    length: int = 19,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    rotary: int = 8,
) -> operators.Inputs:
    q, k = make(batch, length, heads, dim), make(batch, length, kv_heads, dim)
    angles = 100 * make(length, 1, rotary // 2, dtype=torch.float32)
    # about as large as gains after training
    gain = 5 + make(heads, dtype=torch.float32)
    return {
        "q": q.requires_grad_(),
        "k": k.requires_grad_(),
        "cosine": angles.cos().to(q.dtype),
        "sine": angles.sin().to(q.dtype),
        "gain": gain.requires_grad_(),
        "eps": 1e-6,
    }


# heads, kv_heads, dim and rotary, up to the largest numbers that the kernels take
_CASES = (
    (8, 8, 64, 0),
    (8, 4, 64, 16),
    (6, 3, 80, 40),
    (8, 2, 128, 128),
    (16, 1, 256, 64),
    (32, 8, 256, 256),
    (64, 8, 128, 128),
)

dispatch.define(
    "qk_norm_rope",
    "(Tensor q, Tensor k, Tensor cosine, Tensor sine, Tensor gain, float eps) "
    "-> (Tensor q_hat, Tensor k_hat, Tensor rstd)",
    reference=reference,
    fake=fake,
)
dispatch.define_backward(
    "qk_norm_rope",
    "(Tensor dq_hat, Tensor dk_hat, Tensor q_hat, Tensor k_hat, Tensor cosine, Tensor sine, Tensor gain, Tensor rstd) "
    "-> (Tensor dq, Tensor dk, Tensor dgain)",
    reference=backward_reference,
    fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
dispatch.register("qk_norm_rope", "triton", triton_forward, supports=triton_supports)
dispatch.register("qk_norm_rope_backward", "triton", _triton_backward, supports=_triton_backward_supports)
operators.declare(
    operators.Operator(
        "qk_norm_rope",
        qk_norm_rope,
        _inputs,
        cases=[
            {"batch": 48, "length": 2048, "heads": heads, "kv_heads": kv_heads, "dim": dim, "rotary": rotary}
            for heads, kv_heads, dim, rotary in _CASES
        ],
        members=("qk_norm_rope", "qk_norm_rope_backward"),
        called_by="model",
    )
)

"""Exclusive self-attention (XSA, `golf::xsa`): removes the direction of a position's own value v from its output o.

    v̂ = v / n,  n = max(‖v‖₂, 1e-12) as in `torch.nn.functional.normalize`
    s = ⟨o, v̂⟩,  y = o − s v̂ for each of the H / H_kv query heads that share v

With t = ⟨dy, v̂⟩, and u = 1 where ‖v‖ ≥ 1e-12, else 0, the gradients are

    do = dy − t v̂,  dv = (1 / n) (2 u Σ s t v̂ − Σ (s dy + t o)), with sums over the query heads that share v

`golf::xsa_backward` computes them. The backward pass keeps o and v, which attention keeps anyway. Autograd adds dv to
the gradient that v has from attention.

Source: Zhai, "Exclusive Self Attention", 2026 (arXiv 2603.09078). Groups of query heads: Parameter Golf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from golf_kernels import dispatch, operators

EPS = 1e-12
"""Smallest norm by which a value is divided, as in `torch.nn.functional.normalize`."""


def xsa(output: Tensor, value: Tensor) -> Tensor:
    """Removes from attention's output its component along the value of the same position: y = o − ⟨o, v̂⟩ v̂.

    Both tensors have first derivatives, but no second ones. The kernels read inputs and upstream gradients with any
    strides, without copying them. They do not repeat a value for the query heads that share it.

    Args:
        output: `(B, T, H, D)`, any floating dtype: attention's output. B, T and H may be 0.
        value: `(B, T, H_kv, D)` in the dtype of output. Query head h uses value head ⌊h · H_kv / H⌋.

    Returns:
        `(B, T, H, D)` in the dtype of output, contiguous for the output projection.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    removed: Tensor = torch.ops.golf.xsa(output, value)
    return removed


def written_out(output: Tensor, value: Tensor) -> Tensor:
    """`xsa` written with PyTorch's own operations for `torch.compile`, which cannot fuse a `golf::` operator.

    Args:
        output, value: see `xsa`.

    Returns:
        `(B, T, H, D)`.
    """
    batch, length, heads, dim = output.shape
    kv_heads = value.shape[2]
    direction = F.normalize(value, dim=-1).unsqueeze(3)
    # broadcasts over groups of query heads, so that the value is not repeated in memory
    grouped = output.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    along = (grouped * direction).sum(dim=-1, keepdim=True)
    return (grouped - along * direction).reshape(batch, length, heads, dim)


def _check(output: Tensor, value: Tensor) -> None:
    if output.ndim != 4 or not output.dtype.is_floating_point or output.shape[-1] == 0:
        raise ValueError(
            f"output: expected shape (B, T, H, D) and a floating dtype, found {tuple(output.shape)} and {output.dtype}"
        )
    batch, length, heads, dim = output.shape
    if (
        value.ndim != 4
        or (*value.shape[:2], value.shape[3]) != (batch, length, dim)
        or value.shape[2] == 0
        or heads % value.shape[2]
    ):
        raise ValueError(
            f"value: expected shape ({batch}, {length}, H_kv, {dim}) like output with H_kv a divisor of its {heads} heads, "
            f"found {tuple(value.shape)}"
        )
    if value.dtype != output.dtype or value.device != output.device:
        raise ValueError(
            f"value: expected {output.dtype} on {output.device} like output, found {value.dtype} on {value.device}"
        )


def _fake(output: Tensor, value: Tensor) -> Tensor:
    _check(output, value)
    return output.new_empty(output.shape)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, value: Tensor) -> Tensor:
    """Reshapes `(B, T, H, D)` to `(B, T, H_kv, H / H_kv, D)`, in float32 at least."""
    batch, length, heads, dim = x.shape
    return _wide(x).reshape(batch, length, value.shape[2], heads // value.shape[2], dim)


def _along(x: Tensor, direction: Tensor) -> Tensor:
    along: Tensor = torch.linalg.vecdot(x, direction)
    return along.unsqueeze(-1)


def _length(value: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(_wide(value), dim=-1, keepdim=True)
    return length.unsqueeze(3)


def _reference(output: Tensor, value: Tensor) -> Tensor:
    _check(output, value)
    grouped = _grouped(output, value)
    direction = _wide(value).unsqueeze(3) / _length(value).clamp_min(EPS)
    removed = torch.addcmul(grouped, _along(grouped, direction), direction, value=-1)
    return removed.to(output.dtype).reshape(output.shape).contiguous()


def _backward_fake(dy: Tensor, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return output.new_empty(output.shape), value.new_empty(value.shape)


def _backward_reference(dy: Tensor, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    upstream, grouped, length = _grouped(dy, value), _grouped(output, value), _length(value)
    clamped = length.clamp_min(EPS)
    direction = _wide(value).unsqueeze(3) / clamped
    s, t = _along(grouped, direction), _along(upstream, direction)
    doutput = torch.addcmul(upstream, t, direction, value=-1)
    through_direction = (s * upstream).addcmul_(t, grouped).sum(dim=3, keepdim=True)
    through_length = 2 * (length >= EPS) * (s * t).sum(dim=3, keepdim=True)
    dvalue = ((through_length * direction - through_direction) / clamped).squeeze(3)
    doutput = doutput.to(output.dtype).reshape(output.shape)
    return doutput.contiguous(), dvalue.to(value.dtype).contiguous()


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    doutput, dvalue = torch.ops.golf.xsa_backward(dy, *ctx.saved_tensors)
    return doutput, dvalue


def _triton_problem(output: Tensor, value: Tensor) -> str | None:
    unfit = dispatch.elementwise_problem("output", output)
    if unfit is not None:
        return unfit
    group, dim = output.shape[2] // max(value.shape[2], 1), output.shape[3]
    if group > 16 or dim > 256:
        return f"the Triton kernels take at most 16 heads of at most 256 dimensions to a value, found {group} of {dim}"
    if value.numel() // dim > 2**30:
        return f"the Triton kernels count up to 2^30 values, found {value.numel() // dim}"
    return None


def _triton_supports(*args: Any) -> str | None:
    fits = args and all(tensor.ndim == 4 and tensor.shape[3] for tensor in args[-2:])
    return dispatch.triton_problem() or (_triton_problem(*args[-2:]) if fits else None)


def _triton(output: Tensor, value: Tensor) -> Tensor:
    from golf_kernels import xsa_triton

    _check(output, value)
    return xsa_triton.forward(output, value, EPS)


def _triton_backward(dy: Tensor, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    from golf_kernels import xsa_triton

    return xsa_triton.backward(dy, output, value, EPS)


def _inputs(
    make: operators.Make, batch: int = 2, length: int = 19, heads: int = 4, kv_heads: int = 2, dim: int = 16
) -> operators.Inputs:
    output, value = make(batch, length, heads, dim), make(batch, length, kv_heads, dim)
    return {"output": output.requires_grad_(), "value": value.requires_grad_()}


dispatch.define("xsa", "(Tensor output, Tensor value) -> Tensor", reference=_reference, fake=_fake)
dispatch.define_backward(
    "xsa",
    "(Tensor dy, Tensor output, Tensor value) -> (Tensor doutput, Tensor dvalue)",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
dispatch.register("xsa", "triton", _triton, supports=_triton_supports)
dispatch.register("xsa_backward", "triton", _triton_backward, supports=_triton_supports)
operators.declare(
    operators.Operator(
        "xsa",
        xsa,
        _inputs,
        cases=[
            {"batch": 48, "length": 2048, "heads": heads, "kv_heads": kv_heads, "dim": dim}
            for heads, kv_heads, dim in ((8, 8, 64), (6, 3, 80), (8, 2, 128), (16, 1, 256), (32, 8, 256), (64, 8, 128))
        ],
        members=("xsa", "xsa_backward"),
        called_by="model",
    )
)

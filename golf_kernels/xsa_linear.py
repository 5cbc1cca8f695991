"""XSA and the linear layer behind it as one operator: `golf::xsa_linear`.

    z = o − ⟨o, v̂⟩ v̂ as in `golf_kernels.xsa`,  y = z wᵀ with the heads of z beside each other

    dz = dy w;  do and dv are XSA's gradients for dz;  dw = dyᵀ z

Saved are o, v and w. z has the dtype of o in both products; the backward pass makes it again. Kernels never write dz, and z
in the backward pass alone.

`golf::xsa_linear_backward` computes the gradients; the pair of operators is what a kernel replaces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from golf_kernels import dispatch
from golf_kernels.xsa import EPS, backward_reference, check, reference

# columns of the tile of dz that a kernel's epilogue takes at once
MAX_WIDTH = 128


def xsa_linear(output: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """Linear layer of attention's output without what lies along the value of the same position: y = xsa(o, v) wᵀ.

    Differentiable once in all three. Kernels read o and v of any strides, without a copy where the numbers of a head lie
    beside each other and heads and positions begin at multiples of 16 bytes.

    Args:
        output: `(B, T, H, D)`, attention's output, floating; B, T and H may be 0.
        value: `(B, T, H_kv, D)`, the dtype of output; query head h belongs to value head ⌊h · H_kv / H⌋.
        weight: `(N, H · D)`, the dtype of output.

    Returns:
        `(B, T, N)`, contiguous, in the dtype of output.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    y: Tensor = torch.ops.golf.xsa_linear(output, value, weight)
    return y


def _check(output: Tensor, value: Tensor, weight: Tensor) -> None:
    check(output, value)
    width = output.shape[2] * output.shape[3]
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight: expected shape (N, {width}) with a column for each number of {tuple(output.shape[2:])}, found "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != output.dtype or weight.device != output.device:
        raise ValueError(
            f"weight: expected {output.dtype} on {output.device} like output, found {weight.dtype} on {weight.device}"
        )


def _fake(output: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    _check(output, value, weight)
    return output.new_empty((*output.shape[:2], weight.shape[0]))


def _reference(output: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    _check(output, value, weight)
    return F.linear(reference(output, value).flatten(2), weight)


def _backward_fake(dy: Tensor, output: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return output.new_empty(output.shape), value.new_empty(value.shape), weight.new_empty(weight.shape)


def _backward_reference(dy: Tensor, output: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = dy.flatten(0, 1)
    dweight = rows.T @ reference(output, value).flatten(2).flatten(0, 1)
    return *backward_reference((dy @ weight).reshape(output.shape), output, value), dweight


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    doutput, dvalue, dweight = torch.ops.golf.xsa_linear_backward(dy, *ctx.saved_tensors)
    return doutput, dvalue, dweight


def _triton_problem(output: Tensor, value: Tensor, weight: Tensor) -> str | None:
    # the interpreter multiplies the bit patterns of bfloat16, without a word
    dtypes = (torch.bfloat16, torch.float16) if output.is_cuda else (torch.float16, torch.float32)
    if output.dtype not in dtypes:
        return f"output is {output.dtype}, its kernels take {' and '.join(map(str, dtypes))}"
    # without heads nothing is launched
    group, dim = max(output.shape[2] // max(value.shape[2], 1), 1), output.shape[3]
    # a power of 2 has one bit
    if dim.bit_count() > 1 or group.bit_count() > 1 or not 16 <= dim <= group * dim <= MAX_WIDTH:
        return (
            f"its kernels take 1, 2, 4 or 8 heads to a value, of 16, 32, 64 or 128 dimensions, {MAX_WIDTH} in all at most, "
            f"found {group} of {dim}"
        )
    if weight.shape[0] % 8:
        return f"its kernels take rows of weight in multiples of 8, found {weight.shape[0]}"
    return None


def _triton_supports(*args: Any) -> str | None:
    fits = args and all(tensor.ndim == 4 and tensor.shape[3] for tensor in args[-3:-1]) and args[-1].ndim == 2
    return dispatch.triton_problem() or (_triton_problem(*args[-3:]) if fits else None)


def _triton(output: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    from golf_kernels import xsa_linear_triton

    _check(output, value, weight)
    return xsa_linear_triton.forward(output, value, weight, EPS)


def _triton_backward(dy: Tensor, output: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from golf_kernels import xsa_linear_triton

    return xsa_linear_triton.backward(dy, output, value, weight, EPS)


dispatch.define(
    "xsa_linear", "(Tensor output, Tensor value, Tensor weight) -> Tensor", reference=_reference, fake=_fake
)
dispatch.define_backward(
    "xsa_linear",
    "(Tensor dy, Tensor output, Tensor value, Tensor weight) -> (Tensor doutput, Tensor dvalue, Tensor dweight)",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
dispatch.register("xsa_linear", "triton", _triton, supports=_triton_supports, opt_in=dispatch.UNMEASURED)
dispatch.register(
    "xsa_linear_backward", "triton", _triton_backward, supports=_triton_supports, opt_in=dispatch.UNMEASURED
)

"""The LeakyReLU² MLP with norm, scale and residual as one operator: `golf::leaky_relu2_mlp`.

    n = gain · x · rstd,  rstd = 1 / √(mean(x²) + norm_eps)     (without a norm: n = gain · x)
    pre = n · w_upᵀ,  post = leaky_relu(pre, slope)²,  y = residual + scale ⊙ (post · w_downᵀ)

The backward pass keeps the inputs, `post`, `rstd` and, unless the slope is 0, one sign bit per element of `pre`. The
derivative of post with respect to pre, post', is 2√post where pre > 0 and −2·slope·√post elsewhere. `post` is
homogeneous of degree 2 in n, so ⟨n, dn⟩ = 2⟨post, dpost⟩ in each row of d numbers. With r = gain · rstd:

    dpost = (dy ⊙ scale) · w_down,  dpre = dpost ⊙ post'
    dx = r · (dpre · w_up) − x · (2 · rstd² / d) · ⟨post, dpost⟩ (+ dy if x is also the residual)
    dw_up = (r · dpre)ᵀ · x,  dw_down = scale ⊙ (dyᵀ · post),  dscale = rowsum((dyᵀ · post) ⊙ w_down)

`golf::leaky_relu2_mlp_backward` computes these gradients. Its PyTorch reference computes ⟨n, dn⟩ directly from dn,
which is more accurate, but takes another pass over dn.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from golf_kernels import dispatch, operators
from golf_kernels.autocast import as_autocast

# factor for eight bytes that are 0 or 1, taken as an int64: the top byte of the product has these bytes as its bits,
# the first byte as the lowest bit
_GATHER_BITS = 0x0102040810204080


def leaky_relu2_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    slope: float = 0.5,
    norm_eps: float | None = None,
    gain: float = 1.0,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Computes the MLP block residual + scale ⊙ (leaky_relu(gain · rms(x) · w_upᵀ, slope)² · w_downᵀ).

    All tensors have first derivatives, but no second ones. Under `torch.no_grad()`, nothing is kept for a backward
    pass.

    Args:
        x: `(..., d)`, any floating dtype. The number of rows may be 0.
        w_up: `(h, d)` in the dtype of x, with h > 0 and d > 0.
        w_down: `(d, h)` in the dtype of x.
        slope: slope of leaky_relu for negative numbers, in [0, 1). Slope 0 gives ReLU².
        norm_eps: epsilon of the RMS norm x / √(mean(x²) + norm_eps) over the last dimension. None: no norm.
        gain: constant factor on the norm's output, or on x if there is no norm.
        residual: `(..., d)` like x, added to the result; None: nothing is added. If the residual is x itself, the
            backward kernel adds the residual's gradient to that of x.
        scale: `(d,)` in the dtype of x: factor on each output channel. None: no factor.

    Returns:
        `(..., d)` in the dtype of x. Matrix products use this dtype. Mean squares use float32 at least. Under
        `torch.autocast`, products use autocast's dtype, and scale and residual keep their dtypes.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    narrow, w_up, w_down = as_autocast(x, w_up, w_down)
    extra = [tensor for tensor in (residual, scale) if tensor is not None]
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    if autocast and any(tensor.dtype != narrow.dtype for tensor in (x, *extra)):
        # autocast rounds the inputs of products, but neither the scale nor the residual
        product = leaky_relu2_mlp(narrow, w_up, w_down, slope=slope, norm_eps=norm_eps, gain=gain)
        product = product if scale is None else scale * product
        return product if residual is None else residual + product
    tensors = [x, w_up, w_down, *extra]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    rows = x.reshape(-1, x.shape[-1]) if x.ndim and x.shape[-1] else x
    add_x = residual is x
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected shape {tuple(x.shape)} like x, found {tuple(residual.shape)}")
        residual = None if add_x else residual.reshape(rows.shape)
    options = (slope, norm_eps, gain, add_x, save)
    y: Tensor = torch.ops.golf.leaky_relu2_mlp(rows, w_up, w_down, residual, scale, *options)[0]
    return y.reshape(x.shape)


def _check(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    slope: float,
    norm_eps: float | None,
) -> None:
    if x.ndim != 2 or not x.dtype.is_floating_point or x.shape[1] == 0:
        raise ValueError(f"x: expected shape (..., d) and a floating dtype, found {tuple(x.shape)} and {x.dtype}")
    if w_up.ndim != 2 or w_up.shape[0] == 0:
        raise ValueError(f"w_up: expected shape (h, {x.shape[1]}) with h > 0, found {tuple(w_up.shape)}")
    if not 0.0 <= slope < 1.0:
        raise ValueError(f"slope: expected 0 <= slope < 1 (0 is ReLU², 1 would be a plain square), found {slope}")
    if norm_eps is not None and not norm_eps >= 0.0:
        raise ValueError(f"norm_eps: expected a number >= 0, or None for no norm, found {norm_eps}")
    rows, width = x.shape
    hidden = w_up.shape[0]
    expected = {
        "w_up": (w_up, (hidden, width)),
        "w_down": (w_down, (width, hidden)),
        "residual": (residual, (rows, width)),
        "scale": (scale, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, found {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {x.dtype} on {x.device} like x, found {tensor.dtype} on {tensor.device}"
            )


def _fake(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    slope: float,
    norm_eps: float | None,
    gain: float,
    add_x: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, w_up, w_down, residual, scale, slope, norm_eps)
    rows, hidden = x.shape[0], w_up.shape[0]
    rstd_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, hidden) if save else (0, 0)),
        x.new_empty((rows, (hidden + 7) // 8) if save and slope > 0 else (0, 0), dtype=torch.uint8),
        x.new_empty((rows,) if save and norm_eps is not None else (0,), dtype=rstd_dtype),
    )


def _reference(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    slope: float,
    norm_eps: float | None,
    gain: float,
    add_x: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, w_up, w_down, residual, scale, slope, norm_eps)
    _, post, sign, rstd = _fake(x, w_up, w_down, residual, scale, slope, norm_eps, gain, add_x, False)
    inverse = None if norm_eps is None else _inverse_rms(x, norm_eps)
    hidden = _normalize(x, inverse, gain) @ w_up.T
    if save and slope > 0:
        sign = _pack(hidden > 0)
    hidden = F.leaky_relu_(hidden, slope) if slope > 0 else hidden.relu_()
    hidden.mul_(hidden)
    columns = (w_down if scale is None else scale.unsqueeze(1) * w_down).T
    residual = x if add_x else residual
    y = hidden @ columns if residual is None else torch.addmm(residual, hidden, columns)
    if save:
        post, rstd = hidden, rstd if inverse is None else inverse
    return y, post, sign, rstd


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale: Tensor | None,
    post: Tensor,
    sign: Tensor,
    rstd: Tensor,
    slope: float,
    norm: bool,
    gain: float,
    add_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        w_up.new_empty(w_up.shape),
        w_down.new_empty(w_down.shape),
        x.new_empty((0,) if scale is None else scale.shape),
    )


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale: Tensor | None,
    post: Tensor,
    sign: Tensor,
    rstd: Tensor,
    slope: float,
    norm: bool,
    gain: float,
    add_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = w_down if scale is None else scale.unsqueeze(1) * w_down
    dpost = dy @ columns
    inverse = rstd if norm else None
    # in this dtype √post equals |leaky_relu(pre)| for all but a few elements
    dpre = dpost.mul_(post.sqrt()).mul_(2.0)
    if slope > 0:
        dpre = torch.where(_unpack(sign, post.shape[1]), dpre, dpre * -slope)
    dx = dpre @ w_up
    dw_up = dpre.T @ _normalize(x, inverse, gain)
    if inverse is not None:
        # computes the norm's gradient in the norm's dtype and rounds it once; subtracting `unit * along` also removes
        # dn's rounding error along x
        unit = x * inverse.unsqueeze(1)
        wide = dx.to(inverse.dtype)
        along = torch.linalg.vecdot(wide, unit).unsqueeze(1) / x.shape[1]
        wide = (wide - unit * along).mul_((inverse * gain).unsqueeze(1))
        dx = (wide.add_(dy) if add_x else wide).to(x.dtype)
    else:
        dx.mul_(gain)
        if add_x:
            dx.add_(dy)
    dw_down = dy.T @ post
    dscale = x.new_empty((0,))
    if scale is not None:
        dscale = torch.linalg.vecdot(dw_down, w_down)
        dw_down = scale.unsqueeze(1) * dw_down
    return dx, dw_up, dw_down, dscale


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide.square().mean(dim=1) + eps).rsqrt()


def _normalize(x: Tensor, inverse_rms: Tensor | None, gain: float) -> Tensor:
    if inverse_rms is None:
        return x if gain == 1.0 else x * gain
    return (x * (inverse_rms * gain).unsqueeze(1)).to(x.dtype)


def _pack(positive: Tensor) -> Tensor:
    """Packs each row as bits into ⌈columns / 8⌉ bytes. The first of eight elements is the lowest bit."""
    padded = F.pad(positive, (0, -positive.shape[1] % 8)).contiguous()
    return (padded.view(torch.int64) * _GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    # made on the device, because a CUDA graph cannot capture a copy from the host
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(2).bitwise_and(masks).ne(0).reshape(packed.shape[0], packed.shape[1] * 8)[:, :columns]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, w_up, w_down, residual, scale, slope, norm_eps, gain, add_x, save = inputs
    if not save:
        raise RuntimeError(
            "golf::leaky_relu2_mlp: an input requires a gradient, but save is False; call golf_kernels.leaky_relu2_mlp, "
            "which sets it"
        )
    _, post, sign, rstd = output
    ctx.mark_non_differentiable(post, sign, rstd)
    ctx.save_for_backward(x, w_up, w_down, scale, post, sign, rstd)
    ctx.has_residual = residual is not None
    ctx.options = (slope, norm_eps is not None, gain, add_x)


def _backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Any, ...]:
    x, w_up, w_down, scale, post, sign, rstd = ctx.saved_tensors
    dx, dw_up, dw_down, dscale = torch.ops.golf.leaky_relu2_mlp_backward(
        dy.contiguous(), x, w_up, w_down, scale, post, sign, rstd, *ctx.options
    )
    d_residual = dy if ctx.has_residual else None
    return dx, dw_up, dw_down, d_residual, None if scale is None else dscale, *(None,) * 5


def _triton_problem(x: Tensor, w_up: Tensor) -> str | None:
    # Triton's interpreter would multiply the bit patterns of bfloat16 numbers without raising an error
    dtypes = (torch.bfloat16, torch.float16) if x.is_cuda else (torch.float16, torch.float32)
    if x.dtype not in dtypes:
        return f"x is {x.dtype}, the Triton kernels take {' and '.join(map(str, dtypes))}"
    width, hidden = x.shape[-1] if x.ndim else 0, w_up.shape[0] if w_up.ndim else 0
    if width == 0 or width % 8 or hidden == 0 or hidden % 64:
        return f"the Triton kernels take a width in multiples of 8 and a hidden size in multiples of 64, found {width}, {hidden}"
    return None


def _triton_supports(*args: Any) -> str | None:
    return dispatch.triton_problem(tma=True) or (_triton_problem(args[0], args[1]) if args else None)


def _triton_backward_supports(*args: Any) -> str | None:
    return dispatch.triton_problem(tma=True) or (_triton_problem(args[1], args[2]) if args else None)


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from golf_kernels import leaky_relu2_mlp_triton

    _check(*args[:7])
    return leaky_relu2_mlp_triton.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from golf_kernels import leaky_relu2_mlp_triton

    return leaky_relu2_mlp_triton.backward(*args)


def _inputs(
    make: operators.Make,
    rows: int = 37,
    width: int = 32,
    hidden: int = 128,
    slope: float = 0.5,
    norm_eps: float | None = 1e-6,
    residual: str = "other",
) -> operators.Inputs:
    x, w_up, w_down = make(rows, width), make(hidden, width) * width**-0.5, make(width, hidden) * hidden**-0.5
    scale, other = make(width), make(rows, width)
    for tensor in (x, w_up, w_down, scale):
        tensor.requires_grad_()
    tensors = {"x": x, "w_up": w_up, "w_down": w_down, "scale": scale}
    return tensors | {
        "residual": {"x": x, "other": other, "none": None}[residual],
        "slope": slope,
        "norm_eps": norm_eps,
    }


dispatch.define(
    "leaky_relu2_mlp",
    "(Tensor x, Tensor w_up, Tensor w_down, Tensor? residual, Tensor? scale, float slope, float? norm_eps, "
    "float gain, bool add_x, bool save) -> (Tensor y, Tensor post, Tensor sign, Tensor rstd)",
    reference=_reference,
    fake=_fake,
)
dispatch.define_backward(
    "leaky_relu2_mlp",
    "(Tensor dy, Tensor x, Tensor w_up, Tensor w_down, Tensor? scale, Tensor post, Tensor sign, Tensor rstd, "
    "float slope, bool norm, float gain, bool add_x) -> (Tensor dx, Tensor dw_up, Tensor dw_down, Tensor dscale)",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
dispatch.register("leaky_relu2_mlp", "triton", _triton, supports=_triton_supports)
dispatch.register(
    "leaky_relu2_mlp_backward",
    "triton",
    _triton_backward,
    supports=_triton_backward_supports,
)
operators.declare(
    operators.Operator(
        "leaky_relu2_mlp",
        leaky_relu2_mlp,
        _inputs,
        # the first width and hidden size are multiples of wide tiles, the second are not; with both hidden sizes the dx
        # kernel adds MAX_PARTS partial sums per row
        cases=[
            {"rows": 98304, "width": width, "hidden": hidden, "slope": slope, "norm_eps": eps, "residual": residual}
            for (width, hidden), eps, slope, residual in itertools.product(
                ((512, 4096), (640, 1984)), (None, 1e-6), (0.0, 0.5), ("none", "x")
            )
        ],
        members=("leaky_relu2_mlp", "leaky_relu2_mlp_backward"),
        called_by="model",
        products={
            "up_kernel": ("x_desc", "w_up_desc"),
            "down_kernel": ("post_desc", "w_down_desc"),
            "dpre_kernel": ("dy_desc", "w_down_desc"),
            "dx_kernel": ("dpre_desc", "w_up_desc"),
        },
    )
)

"""Output projection, softcap, cross-entropy and their gradients as one operator: `golf::softcapped_cross_entropy`.

    z = softcap · tanh(hidden · weightᵀ / softcap)
    loss = mean or sum over rows of  lse − z[target] + z_loss · lse²,  lse = logsumexp(z)

The operator computes loss and gradients for one chunk of rows at a time, and never stores the logits of all rows. The
logits of a chunk in float32 take at most `CHUNK_BYTES` of memory. The Triton backend has variants with other
chunks, such as `triton/32MiB`, the bytes of its logits. Small chunks stay in a GPU's L2 cache; large ones keep all of
the GPU busy.

With p = softmax(z), e the one-hot target and w the row's weight (sum: 1, mean: 1 / count, ignored row: 0):

    d logits = w · (p · (1 + 2 · z_loss · lse) − e) · (1 − (z / softcap)²)
    d hidden = d logits · weight,  d weight = d logitsᵀ · hidden
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from golf_kernels import dispatch, operators
from golf_kernels.autocast import as_autocast

# bytes of a chunk's logits in float32: 16 MiB nearly fit in a CPU's caches, 256 MiB keep a GPU busy
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
# bytes of a chunk's logits in their own dtype; an H100 has 50 MiB of L2 cache. 32 MiB are 2,048 rows of 8,192 in bfloat16
CHUNKS = {"16MiB": 1 << 24, "32MiB": 1 << 25, "512MiB": 1 << 29}


def softcapped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 30.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """Computes the cross-entropy of the logits `softcap·tanh(hidden·weightᵀ / softcap)`.

    The forward pass also computes the gradients that are needed. The backward pass multiplies them by the upstream
    gradient. Under `torch.no_grad()` only the loss is computed. Results are deterministic. No second derivatives exist.

    Args:
        hidden: `(M, d)`, any floating dtype: hidden states.
        weight: `(V, d)` in the dtype of `hidden`, or any dtype under `torch.autocast`: weight of the output projection.
        targets: `(M,)`, int64 or int32, in [0, V) or equal to `ignore_index`. Targets are checked on the CPU, but not
            on CUDA, where a check would wait for the GPU.
        softcap: bound on the magnitude of the logits, > 0.
        reduction: `mean` over the rows that are not ignored (0 if there are none), or `sum`.
        ignore_index: rows with this target are left out of the loss and of the mean.
        z_loss: weight of the penalty logsumexp², which keeps the logits from drifting and is reduced like the loss.

    Returns:
        Scalar loss in nats, float32 (float64 for float64 inputs). Products multiply in the dtype of `hidden` and sum in
        float32 at least. The Triton backend also rounds the logits to the dtype of `hidden` if gradients are needed.

    Raises:
        ValueError: a wrong shape, dtype, device or option, or (on the CPU) a target outside [0, V).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', found {reduction!r}")
    hidden, weight = as_autocast(hidden, weight)
    grad = torch.is_grad_enabled()
    loss: Tensor = torch.ops.golf.softcapped_cross_entropy(
        hidden,
        weight,
        targets,
        softcap,
        reduction == "mean",
        ignore_index,
        z_loss,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
    )[0]
    return loss


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> None:
    """Raises `ValueError` unless hidden states, weight and targets fit together and the softcap is a positive number."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape (M, d), found {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[1]}), found {tuple(weight.shape)}")
    if targets.ndim != 1 or targets.shape[0] != hidden.shape[0]:
        raise ValueError(f"targets: expected shape ({hidden.shape[0]},), found {tuple(targets.shape)}")
    if not hidden.dtype.is_floating_point or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight: expected one floating dtype, found {hidden.dtype} and {weight.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32, found {targets.dtype}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"devices: expected one, found {hidden.device}, {weight.device} and {targets.device}")
    if not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a number > 0, found {softcap}")


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Raises `ValueError` for a target outside [0, vocabulary) that is not `ignore_index`. Skips targets on a GPU."""
    if targets.device.type != "cpu":
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}]: expected 0 <= target < {vocabulary}"
            f"{'' if ignore_index is None else f' or ignore_index {ignore_index}'}, found {int(targets[row])}"
        )


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Returns the number of rows whose float32 logits fill one chunk."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * max(1, vocabulary)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left · right to `total`, which is in `accumulation_dtype`."""
    if left.is_cuda and left.dtype != total.dtype:
        # one product that reads and writes the total, instead of a product and a sum
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += wide_product(left, right)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left · right in `accumulation_dtype`, without rounding the result to the operands' dtype."""
    dtype = accumulation_dtype(left.dtype)
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _scale(kept: Tensor, mean: bool, dtype: torch.dtype) -> Tensor:
    """Returns the weight of each row that counts, a scalar on the device: 1 for `sum`, 1 / (number of rows) for `mean`."""
    count = kept.sum().clamp_min(1) if mean else kept.new_ones((), dtype=dtype)
    return count.to(dtype).reciprocal()


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    mean: bool,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_head(hidden, weight, targets, softcap)
    return (
        hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    mean: bool,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_head(hidden, weight, targets, softcap)
    check_targets(targets, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden.dtype)
    kept = targets != ignore_index
    row_weight = kept * _scale(kept, mean, dtype)
    picked = torch.where(kept, targets, 0).long().unsqueeze(1)
    loss = hidden.new_zeros((), dtype=dtype)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=dtype, device=weight.device)
    step = chunk_rows(hidden.device, weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        capped = wide_product(hidden[rows], weight.T).div_(softcap).tanh_()
        z = capped * softcap
        lse = torch.logsumexp(z, dim=1, keepdim=True)
        per_row = (lse - z.gather(1, picked[rows])).squeeze(1) + z_loss * lse.squeeze(1).square()
        # torch.where instead of a product with 0, because the logits of an ignored row may be NaN
        loss += torch.where(kept[rows], per_row * row_weight[rows], 0.0).sum()
        if not (need_hidden or need_weight):
            continue
        d_logits = z.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
        d_logits.scatter_(1, picked[rows], d_logits.gather(1, picked[rows]) - 1)
        d_logits.mul_(capped.square_().neg_().add_(1)).mul_(row_weight[rows].unsqueeze(1))
        d_logits = d_logits.masked_fill_(~kept[rows].unsqueeze(1), 0.0).to(hidden.dtype)
        if need_hidden:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if need_weight:
            add_product(d_weight, d_logits.T, hidden[rows])
    return loss, d_hidden, d_weight.to(weight.dtype)


def _triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    mean: bool,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from golf_kernels import softcapped_cross_entropy_triton as kernels

    check_head(hidden, weight, targets, softcap)
    check_targets(targets, weight.shape[0], ignore_index)
    kept = targets != ignore_index
    scale = _scale(kept, mean, torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=torch.float32, device=weight.device)
    if not (need_hidden or need_weight):
        lse, picked = kernels.row_nll(hidden, weight, targets, softcap, False)
        losses = torch.where(kept, scale * (lse - picked + z_loss * lse.square()), 0.0)
        return losses.sum(), d_hidden, d_weight.to(weight.dtype)
    (count, vocabulary), targets = (hidden.shape[0], weight.shape[0]), targets.contiguous()
    losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
    in_bytes = chunk_bytes and max(1, chunk_bytes // (hidden.element_size() * vocabulary))
    step = in_bytes or chunk_rows(hidden.device, vocabulary)
    chunk = hidden.new_empty((min(step, count), vocabulary))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        logits = torch.mm(hidden[rows], weight.T, out=chunk[: min(step, count - start)])
        kernels.loss_and_gradient(logits, targets[rows], scale, losses[rows], softcap, z_loss, ignore_index)
        if need_hidden:
            torch.mm(logits, weight, out=d_hidden[rows])
        if need_weight:
            add_product(d_weight, logits.T, hidden[rows])
    return losses.sum(), d_hidden, d_weight.to(weight.dtype)


def triton_problem(hidden: Tensor) -> str | None:
    """Returns the reason why the output head's Triton kernels cannot take these hidden states, or None if they can."""
    # Triton's interpreter would multiply the bit patterns of bfloat16 numbers without raising an error
    dtypes = (torch.float16, torch.float32) if hidden.device.type == "cpu" else (torch.bfloat16, torch.float16)
    if hidden.dtype in dtypes:
        return None
    return f"hidden is {hidden.dtype}, the Triton kernels take {' and '.join(map(str, dtypes))}"


def _triton_supports(*args: Any) -> str | None:
    unavailable = dispatch.triton_problem()
    if unavailable is not None or not args:
        return unavailable
    from golf_kernels.softcapped_cross_entropy_triton import MAX_VOCABULARY

    if args[1].shape[0] > MAX_VOCABULARY:
        return f"its kernel takes a vocabulary of at most {MAX_VOCABULARY}, found {args[1].shape[0]}"
    return triton_problem(args[0])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, *_, need_hidden, need_weight = inputs
    if (hidden.requires_grad and not need_hidden) or (weight.requires_grad and not need_weight):
        raise RuntimeError(
            "golf::softcapped_cross_entropy: an input requires a gradient, but its need_hidden or need_weight is False; "
            "call golf_kernels.softcapped_cross_entropy, which sets them"
        )
    _, d_hidden, d_weight = output
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.needs = (need_hidden, need_weight)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("golf::softcapped_cross_entropy is not differentiable twice; leave create_graph at False")
    d_hidden, d_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs
    # in float32 at least: on CUDA a product with a 16-bit tensor rounds the upstream gradient to 16 bits first
    wide = accumulation_dtype(d_hidden.dtype)
    return (
        (d_hidden.to(wide) * grad_loss).to(d_hidden.dtype) if need_hidden else None,
        (d_weight.to(wide) * grad_loss).to(d_weight.dtype) if need_weight else None,
        *[None] * 7,
    )


def head_inputs(make: operators.Make, rows: int = 53, width: int = 32, vocabulary: int = 129) -> operators.Inputs:
    """Example inputs for an operator of the output head; see `operators.Operator.inputs`."""
    hidden, weight = make(rows, width), make(vocabulary, width)
    targets = torch.arange(rows, device=hidden.device) % vocabulary
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets}


dispatch.define(
    "softcapped_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, float softcap, bool mean, int ignore_index, float z_loss, "
    "bool need_hidden, bool need_weight) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
torch.library.register_autograd(
    "golf::softcapped_cross_entropy", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY
)
dispatch.register(
    "softcapped_cross_entropy",
    "triton",
    _triton,
    supports=_triton_supports,
    variants={name: functools.partial(_triton, chunk_bytes=size) for name, size in CHUNKS.items()},
)
operators.declare(
    operators.Operator(
        "softcapped_cross_entropy",
        softcapped_cross_entropy,
        head_inputs,
        called_by="model",
        in_place={"loss_and_gradient_kernel": "logits_ptr"},
    )
)

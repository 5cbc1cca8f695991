"""Calibration: the second moments of every matrix's inputs, gathered on the function that is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from train.errors import UserError
from train.model.gpt import GPT
from train.model.linear import observe_inputs


@torch.no_grad()
def collect_hessians(
    model: GPT,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    recurrence: bool,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """The Hessian of each matrix for GPTQ: H = Σ Xᵀ X / (number of batches), X `(tokens, in_features)`.

    A layer that runs twice adds both of its inputs. The sum is over all tokens of a batch, so H grows with the batch;
    GPTQ does not mind a constant factor.

    Args:
        model: not compiled; it runs in evaluation mode and is left in the mode it was in.
        batches: token ids `(B, T)` int64, on the model's device.
        names: parameter names to collect for; `embedding.weight` gets the final norm's output.
        recurrence: whether the repeated layers run twice: as in the evaluation, unless a recipe says otherwise.
        all_reduce: replaces a tensor by its sum over the ranks, in place; every rank must call this function with the
            same names, each with batches of its own. None for one process.

    Returns:
        name → `(in_features, in_features)` float32 (float64 where the model computes in it), on the model's device.

    Raises:
        UserError: there is no batch, or the model has no such matrix or never multiplies by it.
    """
    wanted = sorted(set(names))
    known = dict(model.named_parameters())
    for name in wanted:
        if name not in known:
            raise UserError(f"{name}: the model has no such matrix to calibrate")
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []
    product: list[Tensor] = []

    def accumulate(name: str, inputs: Tensor) -> None:
        if name not in wanted:
            return
        # query, key and value report the same tensor in turn: held on to, its memory cannot become another's meanwhile
        if not (last and _same_memory(last[0], inputs)):
            rows = inputs.flatten(0, -2)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            last[:], product[:] = [inputs], [rows.mT @ rows]
        if name in sums:
            sums[name] += product[0]
        else:
            sums[name] = product[0].clone()

    was_training = model.training
    model.eval()
    count = 0
    try:
        with observe_inputs(model, accumulate):
            for ids in batches:
                model.hidden(ids, recurrence=recurrence)
                last.clear()
                count += 1
    finally:
        model.train(was_training)
    if not count:
        raise UserError("gptq_calib_batches: no batch to calibrate on")
    unseen = [name for name in wanted if name not in sums]
    if unseen:
        raise UserError(f"{unseen[0]}: the model never multiplied by this matrix, so there is nothing to calibrate on")
    total = torch.tensor(float(count), dtype=torch.float64)
    if all_reduce is not None:
        all_reduce(total)
        for name in wanted:
            all_reduce(sums[name])
    return {name: sums[name] / total.item() for name in wanted}


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one._version == other._version
    )

"""Computes GPTQ's Hessians, the second moments of each matrix's inputs, on training batches or on generated text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.wording import counted
from train.config import Config
from train.data.dataset import Dataset
from train.model.gpt import GPT
from train.model.linear import observe_inputs


def calibrate(
    config: Config, model: GPT, names: Sequence[str], data: Dataset, ranks: Ranks, note: Callable[[str], None]
) -> dict[str, Tensor]:
    """Compute the Hessians of the matrices `names` with `collect_hessians`, on the batches of all ranks.

    Every rank must call this. `note` receives one log line. Two settings choose the batches and the model:

    - `gptq_calib_source`: "train" reads training batches. "generated" reads no data: the model writes
      `gptq_calib_batches` texts, divided among the ranks.
    - `gptq_calib_graph`: "evaluated" runs the model as in the evaluation. "plain" runs the same weights without
      repeated and parallel layers, as #1392 did.

    Raises:
        UserError: `collect_hessians` raises it, or there are fewer texts than ranks.
    """
    started = time.perf_counter()
    recurrence = bool(config.recur_layers)
    if config.gptq_calib_source == "generated":
        from train.quantize.generate import generated_batches

        batches = generated_batches(config, model, ranks, recurrence=recurrence)
    else:
        batches = _training_batches(config, data, ranks)
    if config.gptq_calib_graph == "plain":
        model, recurrence = plain_graph(model), False
    hessians = collect_hessians(model, batches, names, recurrence=recurrence, all_reduce=ranks.sum)
    seconds = f"in {time.perf_counter() - started:.1f}s"
    plain = " without recurrence and parallel layers" if config.gptq_calib_graph == "plain" else ""
    if config.gptq_calib_source == "generated":
        texts = f"{counted(config.gptq_calib_batches, 'sequence')} of {config.train_seq_len} tokens"
        note(
            f"gptq:generated {texts}, computed {counted(len(hessians), 'Hessian')} with the trained model{plain} {seconds}"
        )
    else:
        matrices = counted(len(hessians), "matrix", "matrices")
        read = counted(len(batches) * ranks.world_size, "training batch", "training batches")
        note(f"gptq:calibrated {matrices}: computed their Hessians on {read} with the trained model{plain} {seconds}")
    return hessians


def plain_graph(model: GPT) -> GPT:
    """Return a model without repeated and parallel layers, which shares the weights of `model`."""
    with torch.device("meta"):
        plain = GPT(model.config.replace(recur_layers=(), parallel_start_layer=-1))
    plain.compute_dtype = model.compute_dtype
    # leave out the parameters of lanes, which the plain model does not have
    own = {name for name, _ in plain.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    plain.load_state_dict(state, assign=True)
    return plain


def _training_batches(config: Config, data: Dataset, ranks: Ranks) -> list[Tensor]:
    loader = data.loader(ranks)
    count = -(-config.gptq_calib_batches // ranks.world_size)
    batches: list[Tensor] = []
    while len(batches) < count:
        # with the last length of the training sequences
        batches += [inputs.view(-1, config.seq_lengths[-1][0]) for inputs, _ in loader.next_batch()]
    return batches[:count]


@torch.no_grad()
def collect_hessians(
    model: GPT,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    recurrence: bool,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Compute each matrix's Hessian for GPTQ: H = Σ Xᵀ X / (number of batches).

    X `(tokens, in_features)` is the input of the matrix for one batch. If a layer runs again, both inputs count. H is
    proportional to the number of tokens per batch, but GPTQ ignores constant factors.

    Args:
        model: the model, which must not be compiled. It runs in evaluation mode; then its former mode is restored.
        batches: token ids `(B, T)` int64, on the model's device.
        names: names of the matrices. The input of `embedding.weight` is the output of the final norm, because the
            output head multiplies it by this matrix.
        recurrence: whether the layers in `recur_layers` run again.
        all_reduce: function that replaces a tensor by its sum over the ranks, in place; None for one process. Every
            rank must call `collect_hessians` with the same names and its own batches.

    Returns:
        Name → H `(in_features, in_features)`, float32 (float64 for a float64 model), on the model's device.

    Raises:
        UserError: there is no batch, a name is not in the model, or the model never multiplies by a named matrix.
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
        # query, key and value have the same input tensor, so compute its second moment once. `last` keeps the tensor
        # alive, so that no other tensor gets the same memory.
        if not (last and _same_memory(last[0], inputs)):
            last[:], product[:] = [inputs], [second_moment(inputs.flatten(0, -2))]
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


def second_moment(rows: Tensor) -> Tensor:
    """Compute Xᵀ X `(in_features, in_features)` of X `(tokens, in_features)`, in float32 (in float64 for float64)."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        # bfloat16 inputs: their products are exact in float32, and tensor cores sum them in float32 ten times as fast
        return torch.mm(rows.mT, rows, out_dtype=torch.float32)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.mT @ rows


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one._version == other._version
    )

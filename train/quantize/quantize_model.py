"""Quantizes a trained model tensor by tensor, by GPTQ or to nearest. The ranks divide the matrices."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config
from train.quantize.gptq import gptq
from train.quantize.rank_work import assign, gptq_cost
from train.quantize.row_scales import ROW_SCALES, percentile_candidates, rtn, squared_error
from train.quantize.tensors import (
    Clip,
    QuantizedTensor,
    StoredTensors,
    clip_settings,
    matrices_to_calibrate,
    stored_bits,
)

# limit for batches of equal matrices on a GPU: number of elements of a batch's Hessians (128 MiB)
_BATCH_ELEMENTS = 1 << 25


class _Job(NamedTuple):
    shape: torch.Size
    bits: int
    clip: Clip


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    config: Config,
    hessians: Mapping[str, Tensor],
    *,
    ranks: Ranks | None = None,
    note: Callable[[str], None] = warnings.warn,
    sigmas: Mapping[str, float] | None = None,
) -> StoredTensors:
    """Quantize a model to the tensors that its artifact stores. `stored_bits` gives the bits of each tensor.

    Matrices are rounded by GPTQ or to nearest (setting `quantizer`), with scales from the row clip `matrix_clip`.
    Embeddings are rounded to nearest with `embed_clip`, or by GPTQ if `hessians` contains their names. If GPTQ rounds a
    matrix with `percentile_search`, it does so once per candidate clip and keeps the least squared error (#1392).

    The ranks divide the matrices that GPTQ rounds, and exchange the results. On a CPU, matrices are not batched, so
    that the codes do not depend on the number of ranks.

    Args:
        model: the trained model, the same on every rank.
        config: the quantization settings.
        hessians: parameter name → Hessian, the same on every rank, for every name of `matrices_to_calibrate`.
        ranks: the ranks that divide the matrices; None for one process. Every rank must call this function.
        note: receives a sentence about each matrix that needed more damping, or was rounded to nearest because GPTQ
            failed.
        sigmas: parameter name → SDClip's k, instead of the settings' k.

    Returns:
        Parameter name → `QuantizedTensor` or float16 tensor, on the CPU, in the model's order.

    Raises:
        UserError: a tensor contains NaN or infinity or does not fit float16, a Hessian is missing or contains NaN, or a
            setting is out of range. The message names the tensor or the setting.
    """
    ranks = ranks or Ranks()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    device = next(iter(parameters.values())).device
    needed = set(matrices_to_calibrate(model, config))
    stored: StoredTensors = {}
    rounded: dict[str, QuantizedTensor] = {}
    jobs: dict[str, _Job] = {}
    for name, parameter in parameters.items():
        _need_finite(name, parameter)
        bits = stored_bits(name, parameter, config)
        if bits == 16:
            stored[name] = _to_float16(name, parameter)
            continue
        if name in needed and name not in hessians:
            raise UserError(f"{name}: GPTQ needs this matrix's Hessian: calibrate first, or set QUANTIZER=rtn")
        clip = clip_settings(name, config)
        clip = clip._replace(sigmas=(sigmas or {}).get(name, clip.sigmas))
        if config.quantizer == "gptq" and name in hessians:
            jobs[name] = _Job(parameter.shape, bits, clip)
        else:
            weight = parameter.float()
            given = _checked(name, hessians[name], weight) if name in hessians else None
            stored[name] = _nearest(name, weight, given, bits, clip)
    assigned = assign({name: gptq_cost(*job.shape) for name, job in jobs.items()}, ranks.world_size)

    def round_own() -> list[str]:
        notes: list[str] = []
        mine = assigned[ranks.rank]
        for job, names in _batches({name: jobs[name] for name in mine}, device):
            weights = {name: parameters[name].float() for name in names}
            given = {name: _checked(name, hessians[name], weights[name]) for name in names}
            rounded.update(_gptq_batch(weights, given, job.bits, job.clip, config, notes.append))
        return notes

    for notes in ranks.on_all(round_own):
        for text in notes:
            note(text)
    for source, names in enumerate(assigned):
        for name in names:
            if name not in rounded:
                rounded[name] = QuantizedTensor.empty(jobs[name].shape, jobs[name].bits)
            ranks.copy_from(source, [rounded[name].codes, rounded[name].scales])
    stored.update(rounded)
    return {name: stored[name] for name in parameters}


def _batches(jobs: Mapping[str, _Job], device: torch.device) -> Iterator[tuple[_Job, list[str]]]:
    """Divide matrices into batches of equal shape, bits and clip. On a CPU each batch is one matrix."""
    alike: dict[_Job, list[str]] = defaultdict(list)
    for name, job in jobs.items():
        alike[job].append(name)
    for job, names in alike.items():
        step = max(_BATCH_ELEMENTS // job.shape[1] ** 2, 1) if device.type == "cuda" else 1
        for start in range(0, len(names), step):
            yield job, names[start : start + step]


def _scales(name: str, weight: Tensor, hessian: Tensor | None, bits: int, clip: Clip) -> Tensor:
    try:
        scales = ROW_SCALES[clip.name](weight, bits, sigmas=clip.sigmas, floor=clip.floor, hessian=hessian)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return _fitting(name, scales)


def _fitting(name: str, scales: Tensor) -> Tensor:
    bad = (~scales.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"{name}: row {int(bad[0])} has weights so large that its scale exceeds float16: lower the clip's sigmas"
        )
    return scales


def _nearest(name: str, weight: Tensor, hessian: Tensor | None, bits: int, clip: Clip) -> QuantizedTensor:
    scales = _scales(name, weight, hessian, bits, clip)
    return QuantizedTensor(rtn(weight, scales, bits).cpu(), scales.cpu(), bits)


def _gptq_batch(
    weights: dict[str, Tensor],
    hessians: dict[str, Tensor],
    bits: int,
    clip: Clip,
    config: Config,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    rows = next(iter(weights.values())).shape[0]
    if clip.name == "percentile_search":
        found = {name: percentile_candidates(weight, bits, floor=clip.floor) for name, weight in weights.items()}
    else:
        found = {name: [_scales(name, weights[name], hessians[name], bits, clip)] for name in weights}
    candidates = {name: torch.cat([_fitting(name, one) for one in scales]) for name, scales in found.items()}
    repeats = len(next(iter(found.values())))
    # repeat the rows for each candidate clip, so that one factorization serves all: rows are rounded independently
    codes, damping = gptq(
        torch.stack([weight.repeat(repeats, 1) for weight in weights.values()]),
        torch.stack([*hessians.values()]),
        torch.stack([*candidates.values()]),
        bits,
        damp=config.gptq_damp,
    )
    best: dict[str, QuantizedTensor] = {}
    for (name, weight), rounded in zip(weights.items(), codes, strict=True):
        passes = list(zip(rounded.split(rows), candidates[name].split(rows), strict=True))
        errors = [squared_error(weight, *one) for one in passes]
        least, scales = passes[errors.index(min(errors))]
        best[name] = QuantizedTensor(least.clone().cpu(), scales.clone().cpu(), bits)
    for name, used in zip(weights, damping, strict=True):
        if used is None:
            note(f"{name}: the Hessian could not be factorized at any damping; rounded to nearest instead of GPTQ")
        elif used != config.gptq_damp:
            note(f"{name}: the Hessian could not be factorized at damping {config.gptq_damp}; used {used:g}")
    return best


def _checked(name: str, hessian: Tensor, weight: Tensor) -> Tensor:
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise UserError(f"{name}: expected a Hessian {(columns, columns)}, got {tuple(hessian.shape)}: calibrate again")
    if not bool(hessian.isfinite().all()):
        raise UserError(f"{name}: its Hessian holds NaN or infinity: the calibration batches overflowed the model")
    return hessian.to(device=weight.device, dtype=weight.dtype)


def _need_finite(name: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise UserError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite: training diverged, nothing was quantized"
        )


def _to_float16(name: str, tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise UserError(
            f"{name}: holds {tensor.abs().max().item():g}, above float16's maximum {torch.finfo(torch.float16).max:g}: "
            "train with more weight decay"
        )
    return half.cpu().clone()

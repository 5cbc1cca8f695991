"""A model's tensors as they are stored: codes with row scales, or float16; and back to weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.config import Config
from train.errors import UserError
from train.model.inventory import classify
from train.progress import Progress
from train.quantize.gptq import gptq
from train.quantize.row_scales import ROW_SCALES, largest_code, percentile_candidates, rtn, squared_error

# matrices of one shape share the column loop; their Hessians together stay below 128 MiB
_BATCH_ELEMENTS = 1 << 25


class _Clip(NamedTuple):
    name: str
    sigmas: float
    floor: str


class _Job(NamedTuple):
    shape: torch.Size
    bits: int
    clip: _Clip
    calibrated: bool


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix as integers and one scale per row: w ≈ q · s.

    Attributes:
        codes: `(rows, columns)` int8, each within 2^(bits−1) of zero.
        scales: `(rows,)` float16.
        bits: bits of a code, 2 to 8.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    def __post_init__(self) -> None:
        largest_code(self.bits)
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise ValueError(f"codes: expected an int8 matrix, got {self.codes.dtype} {tuple(self.codes.shape)}")
        if self.scales.dtype != torch.float16 or self.scales.shape != self.codes.shape[:1]:
            raise ValueError(
                f"scales: expected float16 {tuple(self.codes.shape[:1])}, got {self.scales.dtype} {tuple(self.scales.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for: `(rows, columns)` float32."""
        return self.codes.float() * self.scales.float()[:, None]


StoredTensors = dict[str, QuantizedTensor | Tensor]
"""A model's state as it is stored, by parameter name."""


def stored_bits(name: str, parameter: Tensor, config: Config) -> int:
    """Bits in which a parameter is stored: 2 to 8 as codes with row scales, 16 as float16.

    Matrices of more than `passthrough_max_elements` elements get `matrix_bits`, embeddings of more `embed_bits` (the tied
    one `tied_embed_bits` if that is set); everything else is float16: vectors, scalars and control tensors of any size, and whatever is small.
    """
    if parameter.ndim != 2 or parameter.numel() <= config.passthrough_max_elements:
        return 16
    kind = classify(name, parameter, config)
    if kind == "embedding":
        bits = (config.tied_embed_bits if name == "embedding.weight" else 0) or config.embed_bits
        return bits
    return config.matrix_bits if kind == "matrix" else 16


def matrices_to_calibrate(model: nn.Module, config: Config) -> list[str]:
    """Names of the matrices for which `quantize_model` wants a Hessian; none if they are rounded to nearest."""
    if config.quantizer != "gptq":
        return []
    return [
        name
        for name, parameter in model.named_parameters()
        if stored_bits(name, parameter, config) < 16 and classify(name, parameter, config) == "matrix"
    ]


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    config: Config,
    hessians: Mapping[str, Tensor],
    *,
    note: Callable[[str], None] = warnings.warn,
    progress: bool = False,
) -> StoredTensors:
    """Turn a model's parameters into what its artifact stores; see `stored_bits` for which tensor becomes what.

    Matrices are rounded by GPTQ or to nearest (`quantizer`), under `matrix_clip`. Embeddings are rounded to nearest,
    unless there is a Hessian for them: then by GPTQ too. `percentile_search` runs GPTQ once per candidate and keeps
    the one with the least squared error of the matrix, as #1392 does.

    Args:
        model: its parameters are read.
        config: the quantization settings.
        hessians: by parameter name; every name of `matrices_to_calibrate` is needed.
        note: is told, in a sentence, of each matrix that needed more damping or had to be rounded to nearest.
        progress: show it.

    Returns:
        name → `QuantizedTensor` or float16 tensor, on the CPU, in the model's order.

    Raises:
        UserError: a tensor holds NaN or infinity or does not fit float16, a Hessian is missing or holds NaN, or a
            setting is out of range; the message names the tensor or the setting.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    needed = set(matrices_to_calibrate(model, config))
    stored: StoredTensors = {}
    jobs: dict[_Job, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        _need_finite(name, parameter)
        bits = stored_bits(name, parameter, config)
        if bits == 16:
            stored[name] = _to_float16(name, parameter)
            continue
        if name in needed and name not in hessians:
            raise UserError(f"{name}: GPTQ needs this matrix's Hessian: calibrate first, or set QUANTIZER=rtn")
        calibrated = config.quantizer == "gptq" and name in hessians
        jobs[_Job(parameter.shape, bits, _clip(name, parameter, config), calibrated)].append(name)
    with Progress(sum(map(len, jobs.values())), "quantize", "matrices", enabled=progress) as bar:
        for job, names in jobs.items():
            step = max(_BATCH_ELEMENTS // job.shape[1] ** 2, 1)
            for part in (names[i : i + step] for i in range(0, len(names), step)):
                weights = {name: parameters[name].float() for name in part}
                given = {name: _checked(name, hessians[name], weights[name]) for name in part if name in hessians}
                if job.calibrated:
                    stored |= _gptq_batch(weights, given, job.bits, job.clip, config, note)
                else:
                    stored |= {
                        name: _nearest(name, weights[name], given.get(name), job.bits, job.clip) for name in part
                    }
                bar.advance(len(part))
    return {name: stored[name] for name in parameters}


def dequantize_state(tensors: Mapping[str, QuantizedTensor | Tensor]) -> dict[str, Tensor]:
    """The state dict for `GPT.load_state_dict`: every stored tensor as float32."""
    return {
        name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.float()
        for name, tensor in tensors.items()
    }


def _clip(name: str, parameter: Tensor, config: Config) -> _Clip:
    if classify(name, parameter, config) == "embedding":
        return _Clip(config.embed_clip, config.embed_clip_sigmas, config.scale_floor)
    return _Clip(config.matrix_clip, config.matrix_clip_sigmas, config.scale_floor)


def _scales(name: str, weight: Tensor, hessian: Tensor | None, bits: int, clip: _Clip) -> Tensor:
    scales = ROW_SCALES[clip.name](weight, bits, sigmas=clip.sigmas, floor=clip.floor, hessian=hessian)
    return _fitting(name, scales)


def _fitting(name: str, scales: Tensor) -> Tensor:
    bad = (~scales.isfinite()).nonzero()
    if len(bad):
        raise UserError(f"{name}: the weights of row {int(bad[0])} are so large that its scale exceeds float16")
    return scales


def _nearest(name: str, weight: Tensor, hessian: Tensor | None, bits: int, clip: _Clip) -> QuantizedTensor:
    scales = _scales(name, weight, hessian, bits, clip)
    return QuantizedTensor(rtn(weight, scales, bits).cpu(), scales.cpu(), bits)


def _gptq_batch(
    weights: dict[str, Tensor],
    hessians: dict[str, Tensor],
    bits: int,
    clip: _Clip,
    config: Config,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    stack, curvature = torch.stack([*weights.values()]), torch.stack([*hessians.values()])
    if clip.name == "percentile_search":
        found = [percentile_candidates(weight, bits, floor=clip.floor) for weight in weights.values()]
        candidates = [dict(zip(weights, scales, strict=True)) for scales in zip(*found, strict=True)]
        candidates = [{name: _fitting(name, scales[name]) for name in weights} for scales in candidates]
    else:
        candidates = [{name: _scales(name, weights[name], hessians[name], bits, clip) for name in weights}]
    best: dict[str, QuantizedTensor] = {}
    least = dict.fromkeys(weights, float("inf"))
    for scales in candidates:
        codes, damping = gptq(
            stack,
            curvature,
            torch.stack([*scales.values()]),
            bits,
            damp=config.gptq_damp,
            block_size=config.gptq_block_size,
            act_order=config.gptq_act_order,
        )
        for name, rounded in zip(weights, codes, strict=True):
            error = squared_error(weights[name], rounded, scales[name])
            if error < least[name]:
                least[name], best[name] = error, QuantizedTensor(rounded.cpu(), scales[name].cpu(), bits)
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
            f"{name}: holds {tensor.abs().max().item():g}, and float16 ends at {torch.finfo(torch.float16).max:g}: "
            "train with more weight decay"
        )
    return half.cpu().clone()

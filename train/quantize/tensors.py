"""A model's tensors as they are stored: codes with row scales, or float16; and back to weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.config import Config
from train.model.parameters import classify
from train.quantize.row_scales import largest_code


class Clip(NamedTuple):
    """How a tensor's rows are clipped: a name in `ROW_SCALES`, SDClip's k, and the floor of the scales."""

    name: str
    sigmas: float
    floor: str


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

    @classmethod
    def empty(cls, shape: torch.Size, bits: int) -> QuantizedTensor:
        """Room for codes `(rows, columns)` and their scales."""
        return cls(torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.float16), bits)

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

    Matrices of more than `passthrough_max_elements` elements get `matrix_bits`, embeddings of more `embed_bits` (the
    tied one `tied_embed_bits` if that is set); everything else is float16: vectors, scalars and control tensors of any
    size, and whatever is small.
    """
    if parameter.ndim != 2 or parameter.numel() <= config.passthrough_max_elements:
        return 16
    kind = classify(name, config)
    if kind == "embedding":
        return (config.tied_embed_bits if name == "embedding.weight" else 0) or config.embed_bits
    return config.matrix_bits if kind == "matrix" else 16


def matrices_to_calibrate(model: nn.Module, config: Config) -> list[str]:
    """Names of the matrices for which `quantize_model` wants a Hessian; none if they are rounded to nearest.

    With `gptq_tied_embed` the tied embedding is one of them: its inputs are the final norm's outputs (#1394).
    """
    if config.quantizer != "gptq":
        return []
    return [
        name
        for name, parameter in model.named_parameters()
        if stored_bits(name, parameter, config) < 16
        and (classify(name, config) == "matrix" or (config.gptq_tied_embed and name == "embedding.weight"))
    ]


def dequantize_state(tensors: Mapping[str, QuantizedTensor | Tensor]) -> dict[str, Tensor]:
    """The state dict for `GPT.load_state_dict`: every stored tensor as float32."""
    return {
        name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.float()
        for name, tensor in tensors.items()
    }


def tensor_group(name: str) -> str:
    """What a tensor has in common with those that play its part in other layers: `blocks.3.mlp.up` is in `blocks.*.mlp.up`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def clip_settings(name: str, config: Config) -> Clip:
    """How the settings clip a coded tensor's rows."""
    if classify(name, config) == "embedding":
        return Clip(config.embed_clip, config.embed_clip_sigmas, config.scale_floor)
    return Clip(config.matrix_clip, config.matrix_clip_sigmas, config.scale_floor)

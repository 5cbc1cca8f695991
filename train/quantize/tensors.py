"""The tensors that an artifact stores: codes with row scales, or float16. Converts these tensors back to weights."""

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
    """How the rows of a tensor are clipped."""

    name: str  # a name in `ROW_SCALES`
    sigmas: float  # SDClip's k
    floor: str  # floor of the scales: "published" or "none", as for `sdclip`


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix stored as integer codes q and one scale s per row: w ≈ q · s."""

    codes: Tensor  # (rows, columns) int8, |code| ≤ 2^(bits−1)
    scales: Tensor  # (rows,) float16
    bits: int  # 2 to 8

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
        """Make a tensor of the given shape with uninitialized codes and scales."""
        return cls(torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.float16), bits)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """Compute the weights q · s, `(rows, columns)` float32."""
        return self.codes.float() * self.scales.float()[:, None]


StoredTensors = dict[str, QuantizedTensor | Tensor]
"""Parameter name → stored tensor."""


def stored_bits(name: str, parameter: Tensor, config: Config) -> int:
    """Return the bits per stored value of a parameter: 2 to 8 for codes with row scales, 16 for float16.

    Tensors of at most `passthrough_max_elements` elements are stored in float16. Larger matrices have `matrix_bits`,
    larger embeddings `embed_bits`, and the tied embedding `tied_embed_bits` if this is set. All other tensors are
    stored in float16.
    """
    if parameter.ndim != 2 or parameter.numel() <= config.passthrough_max_elements:
        return 16
    kind = classify(name, config)
    if kind == "embedding":
        return (config.tied_embed_bits if name == "embedding.weight" else 0) or config.embed_bits
    return config.matrix_bits if kind == "matrix" else 16


def matrices_to_calibrate(model: nn.Module, config: Config) -> list[str]:
    """Return the names of the matrices for which `quantize_model` needs a Hessian. Empty if `quantizer` is not "gptq".

    With `gptq_tied_embed`, the tied embedding is included. Its inputs are the outputs of the final norm (#1394).
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
    """Convert stored tensors to a state dict for `GPT.load_state_dict`. All tensors become float32."""
    return {
        name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.float()
        for name, tensor in tensors.items()
    }


def tensor_group(name: str) -> str:
    """Return a parameter's tensor group: its name with * for the layer's number, such as `blocks.*.mlp.up`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def clip_settings(name: str, config: Config) -> Clip:
    """Return the row clip that the settings give to a tensor that is stored as codes."""
    if classify(name, config) == "embedding":
        return Clip(config.embed_clip, config.embed_clip_sigmas, config.scale_floor)
    return Clip(config.matrix_clip, config.matrix_clip_sigmas, config.scale_floor)

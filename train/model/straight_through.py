"""Quantization-aware training with int6 rows (#122). The forward pass rounds weights, the gradient ignores this."""

from __future__ import annotations

import torch
from torch import Tensor

from golf_kernels.int6 import int6_fake_quantize

QUANTILE = 0.9999984
"""Row quantile of |w| at which #122, #265 and #1392 clip. In a row of up to 625,000 weights it lies between the two largest |w|."""

_LARGEST_CODE = 31
_SMALLEST_CLIP = 1e-8


def fake_quantize_scales(weight: Tensor) -> Tensor:
    """Compute row scales for training: s = max(quantile(|w|, 0.9999984), 1e-8) / 31.

    The artifact's row scales also have a floor. `weight` is `(rows, columns)`. The result `(rows,)` is
    float32, or float64 for float64, and has no gradient. The quantile is interpolated between the row's two largest
    magnitudes, so no row is sorted.

    Raises:
        ValueError: there is one column, or so many that the quantile lies below the two largest magnitudes.
    """
    columns = weight.shape[-1]
    position = (columns - 1) * QUANTILE
    if columns < 2 or position < columns - 2:
        raise ValueError(f"expected 2 to 625,000 columns, got {columns}: the row clip needs the two largest magnitudes")
    wide = torch.promote_types(weight.dtype, torch.float32)
    largest, second = torch.topk(weight.detach().abs(), 2, dim=-1).values.to(wide).unbind(-1)
    clip = torch.lerp(second, largest, position - (columns - 2))
    return clip.clamp_min(_SMALLEST_CLIP) / _LARGEST_CODE


def fake_quantize_rows(weight: Tensor) -> Tensor:
    """Round each row to 63 int6 levels: w ← round(clamp(w/s, −31, 31)) · s. The gradient is the identity.

    #122 computes w + (rounded − w) in bfloat16. This is exact, because the rounded weight is 0 or within a factor 2 of w.
    """
    return int6_fake_quantize(weight, fake_quantize_scales(weight))

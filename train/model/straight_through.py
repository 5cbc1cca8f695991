"""Quantization-aware training with int6 rows (#122). The forward pass rounds weights. The backward pass does not."""

from __future__ import annotations

import torch
from torch import Tensor

from golf_kernels.int6 import int6_fake_quantize

QUANTILE = 0.9999984
"""Quantile of |w| at which #122, #265 and #1392 clip a row.

In a row of up to 625,000 weights, this quantile lies between the two largest |w|.
"""

_LARGEST_CODE = 31
_SMALLEST_CLIP = 1e-8


def fake_quantize_scales(weight: Tensor) -> Tensor:
    """Compute row scales for training: s = max(quantile(|w|, 0.9999984), 1e-8) / 31.

    `weight` is `(rows, columns)`. The result `(rows,)` is float32 (float64 for float64 weights) and has no gradient.
    The quantile is interpolated between the two largest magnitudes of the row, so no row is sorted. Unlike the row
    scales in the artifact, these have no floor besides 1e-8 / 31.

    Raises:
        ValueError: the weight has one column, or so many that the quantile is below the second largest magnitude.
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

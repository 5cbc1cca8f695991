"""Computes row scales. The weights of a row are clipped to |w| ≤ c and rounded to multiples of the row's scale s.

Every function in `ROW_SCALES` has the same arguments and returns one float16 scale per row,
s = max(c / (2^(bits−1) − 1), floor). A weight w becomes the code round(clamp(w / s)) within ±(2^(bits−1) − 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from train.common.errors import UserError
from train.model.straight_through import QUANTILE

SEARCH_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
"""Quantiles of |w| in a row, from which #1392 chooses its clip."""

HESSIAN_STRENGTH = 0.175
"""λ of the Hessian-aware SDClip (#1412)."""

# smallest scale: float16(1e-10) would be zero, and weights are divided by the scale
_SMALLEST_SCALE = 2.0**-24

# torch.quantile refuses more than 2^24 elements at once
_QUANTILE_ELEMENTS = 1 << 22


class RowScales(Protocol):
    """A function that returns the row scales of a matrix.

    For the arguments see `sdclip`; some functions ignore some.
    """

    def __call__(
        self, rows: Tensor, bits: int, *, sigmas: float = ..., floor: str = ..., hessian: Tensor | None = None
    ) -> Tensor: ...


def largest_code(bits: int) -> int:
    """Return the largest code, 2^(bits−1) − 1: 31 for int6, 127 for int8. The smallest code is its negative.

    Raises:
        UserError: `bits` is outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"bits: expected 2 to 8, got {bits}")
    return (1 << bits - 1) - 1


def rtn(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round weights to the nearest codes: q = round(clamp(w / s, −m, m)), m = 2^(bits−1) − 1, ties to even.

    `weight` is `(..., rows, columns)`, `scales` `(..., rows)` and positive. The codes q are int8 of the weight's shape.
    """
    limit = largest_code(bits)
    return (weight / scales.to(weight.dtype).unsqueeze(-1)).clamp(-limit, limit).round().to(torch.int8)


def row_max(
    rows: Tensor, bits: int, *, sigmas: float = 0.0, floor: str = "published", hessian: Tensor | None = None
) -> Tensor:
    """Clip a row at its largest magnitude: c = max |w| (#262). For the arguments see `sdclip`."""
    return _to_scales(rows.abs().amax(dim=1), bits, floor)


def quantile(
    rows: Tensor, bits: int, *, sigmas: float = 0.0, floor: str = "published", hessian: Tensor | None = None
) -> Tensor:
    """Clip a row at the 0.9999984 quantile of |w| (#122). For the arguments see `sdclip`."""
    return _to_scales(_row_quantiles(rows, (QUANTILE,))[0], bits, floor)


def percentile_candidates(rows: Tensor, bits: int, *, floor: str = "published") -> list[Tensor]:
    """Return the row scales of each candidate clip of `percentile_search`, so that GPTQ can choose after rounding."""
    return [_to_scales(clip, bits, floor) for clip in _row_quantiles(rows, SEARCH_QUANTILES)]


def percentile_search(
    rows: Tensor, bits: int, *, sigmas: float = 0.0, floor: str = "published", hessian: Tensor | None = None
) -> Tensor:
    """Clip each row at a quantile of |w|. All rows have the same quantile, the best one of `SEARCH_QUANTILES`.

    The best quantile has the least Σ (w − ŵ)² over the matrix, where ŵ is w after rounding to nearest; of equal ones it
    is the smallest. For the arguments see `sdclip`.

    Source: #1392.
    """
    candidates = percentile_candidates(rows, bits, floor=floor)
    errors = [squared_error(rows, rtn(rows, scales, bits), scales) for scales in candidates]
    return candidates[errors.index(min(errors))]


def squared_error(rows: Tensor, codes: Tensor, scales: Tensor) -> float:
    """Return the squared rounding error Σ (w − q s)² of a matrix, summed in float64."""
    return (rows - codes * scales.to(rows.dtype).unsqueeze(-1)).double().square().sum().item()


def sdclip(
    rows: Tensor, bits: int, *, sigmas: float = 12.85, floor: str = "published", hessian: Tensor | None = None
) -> Tensor:
    """Clip a row at k of its standard deviations σ: c = k σ, s = max(k σ / (2^(bits−1) − 1), floor).

    Args:
        rows: `(rows, columns)`, float32 or float64.
        bits: bits of the codes, 2 to 8.
        sigmas: k. σ is the unbiased standard deviation of the row.
        floor: floor of the scale: "published" is 1/(2^(bits−1) − 1), as in #1471; "none" is 1e-10, as in #1394.
        hessian: the matrix's Hessian `(columns, columns)`; only `hessian_sdclip` reads it.

    Returns:
        `(rows,)` float16, at least 2⁻²⁴, the smallest positive float16.

    Raises:
        UserError: `bits` or `floor` is out of range, or a row has one element and hence no deviation.

    Source: #1394, #1471.
    """
    return _to_scales(sigmas * _row_deviations(rows), bits, floor)


def hessian_sdclip(
    rows: Tensor, bits: int, *, sigmas: float = 12.85, floor: str = "published", hessian: Tensor | None = None
) -> Tensor:
    """SDClip with a larger clip for rows that have large weights on strong inputs. For the arguments see `sdclip`.

    Row i is clipped at c_i = k σ_i (1 + λ (r_i − 1)) with λ = 0.175. r_i is mean_j |w_ij| h_j divided by its mean over
    all rows, where h_j = H_jj / mean(diag H).

    Raises:
        UserError: `sdclip` raises it, or `hessian` is None.

    Source: #1412.
    """
    if hessian is None:
        raise UserError("hessian_sdclip: needs the matrix's Hessian: choose sdclip for a matrix that has none")
    diagonal = hessian.diagonal().to(rows.dtype).clamp_min(1e-8)
    importance = (rows.abs() * (diagonal / diagonal.mean())).mean(dim=1)
    # avoid a division by zero if all weights are zero
    relative = importance / importance.mean().clamp_min(torch.finfo(rows.dtype).tiny)
    adjusted = 1 + HESSIAN_STRENGTH * (relative - 1)
    return _to_scales(sigmas * _row_deviations(rows) * adjusted, bits, floor)


ROW_SCALES: dict[str, RowScales] = {
    "sdclip": sdclip,
    "hessian_sdclip": hessian_sdclip,
    "row_max": row_max,
    "quantile": quantile,
    "percentile_search": percentile_search,
}
"""All row scale functions by name. The names are the values of the settings `matrix_clip` and `embed_clip`."""


_FLOORS: dict[str, Callable[[int], float]] = {
    "published": lambda bits: 1 / largest_code(bits),
    "none": lambda bits: 1e-10,
}


def _to_scales(clip: Tensor, bits: int, floor: str) -> Tensor:
    if floor not in _FLOORS:
        raise UserError(f"scale_floor: expected one of {', '.join(_FLOORS)}, got {floor!r}")
    scales = (clip / largest_code(bits)).clamp_min(_FLOORS[floor](bits)).to(torch.float16)
    return scales.clamp_min(_SMALLEST_SCALE)


def _row_deviations(rows: Tensor) -> Tensor:
    if rows.shape[1] < 2:
        raise UserError(
            "sdclip: rows of one element have no standard deviation: set MATRIX_CLIP or EMBED_CLIP to row_max"
        )
    return rows.std(dim=1) if len(rows) else rows.new_empty(0)


def _row_quantiles(rows: Tensor, fractions: Sequence[float]) -> Tensor:
    """Return quantiles of |w| in each row, `(fractions, rows)`. Each row is sorted once for all fractions."""
    if not len(rows):
        return rows.new_empty(len(fractions), 0)
    step = max(_QUANTILE_ELEMENTS // rows.shape[1], 1)
    wanted = torch.tensor(fractions, dtype=rows.dtype, device=rows.device)
    return torch.cat([torch.quantile(part.abs(), wanted, dim=1) for part in rows.split(step)], dim=1)

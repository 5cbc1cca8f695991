"""Rotary position embeddings of the first r dimensions of a head. The NTK rule adapts the base to longer texts."""

from __future__ import annotations

import torch
from torch import Tensor


def ntk_base(base: float, rotary_dims: int, length: int, train_length: int) -> float:
    """Return the base of the rotary frequencies by the NTK rule, for r = `rotary_dims`.

    It is base · (length / train_length)^(r / (r − 2)) if `length` exceeds `train_length`, otherwise `base`. With r = 2
    the only frequency is base⁰ = 1, so the base does not matter.
    """
    if length <= train_length or rotary_dims <= 2:
        return base
    stretch: float = (length / train_length) ** (rotary_dims / (rotary_dims - 2))
    return base * stretch


def rotary_table(
    length: int, rotary_dims: int, base: float, *, kind: str = "exact", dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines `(length, 1, r/2)` of angle[t, i] = t · base^(−2i/r). r = `rotary_dims` is even.

    The middle dimension broadcasts over heads. Some published scripts round the table to bfloat16, because they cast
    the whole model. `kind` says what is rounded to bfloat16:

    exact: nothing
    bf16_frequencies (#2135): the frequencies base^(−2i/r)
    bf16 (#1471, #122, baseline): positions t, frequencies, cosines and sines; for example t = 257 becomes 256
    """
    # angles of large positions need the precision of float64
    frequencies = base ** -(torch.arange(0, rotary_dims, 2, dtype=torch.float64, device=device) / rotary_dims)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    if kind != "exact":
        frequencies = _rounded(frequencies)
    if kind == "bf16":
        positions = _rounded(positions)
    angles = torch.outer(positions, frequencies)[:, None]
    cosine, sine = angles.cos(), angles.sin()
    if kind == "bf16":
        cosine, sine = _rounded(cosine), _rounded(sine)
    return cosine.to(dtype), sine.to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first r dimensions of each head of `x` `(B, T, H, D)` and keep the other dimensions.

    (a, b) → (a cos + b sin, −a sin + b cos), where a and b are the two halves of the r rotary dimensions. `table` is
    the result of `rotary_table`, in the dtype of `x`.
    """
    cosine, sine = table
    half = cosine.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)


def _rounded(x: Tensor) -> Tensor:
    """Round float64 to bfloat16: to nearest, ties to even. The result is float64.

    The bits are changed directly, because the compiler removes a cast to bfloat16 that is followed by a cast back.
    """
    bits = x.float().view(torch.int32)
    kept = bits + 0x7FFF + (bits >> 16 & 1) & -0x10000
    return kept.view(torch.float32).double()

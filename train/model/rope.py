"""Rotary position embeddings on all or part of a head, with the NTK rule for texts longer than in training."""

from __future__ import annotations

import torch
from torch import Tensor


def ntk_base(base: float, rotary_dims: int, length: int, train_length: int) -> float:
    """Base of the rotary frequencies for a text of `length` tokens.

    base · (length / train_length)^(r / (r − 2)) beyond `train_length`, else `base`.

    Args:
        base: base up to `train_length`.
        rotary_dims: r, the rotary dimensions of a head.
        length: tokens of the text.
        train_length: longest text with the plain base.

    Returns:
        The base; with r = 2 the only frequency is base⁰, so the plain one.
    """
    if length <= train_length or rotary_dims <= 2:
        return base
    stretch: float = (length / train_length) ** (rotary_dims / (rotary_dims - 2))
    return base * stretch


def rotary_table(
    length: int, rotary_dims: int, base: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position: angle[t, i] = t · base^(−2i/r).

    Args:
        length: positions 0 … length − 1.
        rotary_dims: r, even.
        base: base of the frequencies, see `ntk_base`.
        dtype: dtype of the tables.
        device: device of the tables.

    Returns:
        `(length, 1, r/2)` cosines and sines; the middle dimension broadcasts over heads.
    """
    # float64: angles of large positions need its precision
    exponents = torch.arange(0, rotary_dims, 2, dtype=torch.float64, device=device) / rotary_dims
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first r dimensions of each head and keep the others.

    (a, b) → (a cos + b sin, −a sin + b cos), with a and b the two halves of the r rotary dimensions.

    Args:
        x: `(B, T, H, D)`.
        table: cosines and sines `(T, 1, r/2)` of `rotary_table`, in the dtype of `x`.

    Returns:
        `(B, T, H, D)`.
    """
    cosine, sine = table
    half = cosine.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)

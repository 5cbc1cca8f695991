"""Newton-Schulz by the singular value decomposition in float64: the truth for the tests of every backend."""

import math
from collections.abc import Iterable

import torch
from operator_truth import random
from torch import Tensor

from golf_kernels.newton_schulz import COEFFICIENTS

Triple = tuple[float, float, float]


def scalar_map(triples: Iterable[Triple], sigma: Tensor) -> Tensor:
    for a, b, c in triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def triples_of(name: str, steps: int = 5) -> tuple[Triple, ...]:
    found = COEFFICIENTS[name]
    return found.triples * steps if len(found.triples) == 1 else found.triples


def prescaled(name: str, matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """The matrix as scaled before the first iteration, computed from the definition."""
    if COEFFICIENTS[name].prescale == "frobenius":
        norm = matrix.square().sum((-2, -1), keepdim=True).sqrt()
        return matrix / norm.clamp_min(eps) / COEFFICIENTS[name].safety
    if matrix.shape[-2] > matrix.shape[-1]:
        return prescaled(name, matrix.mT).mT
    sums = (matrix @ matrix.mT).abs().sum(-1, keepdim=True)
    return matrix / sums.sqrt()


def truth(name: str, matrix: Tensor, eps: float = 1e-7) -> Tensor:
    u, sigma, vh = torch.linalg.svd(prescaled(name, matrix, eps), full_matrices=False)
    result: Tensor = u * scalar_map(triples_of(name), sigma).unsqueeze(-2) @ vh
    return result


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def spread(rows: int, columns: int, low: float, high: float, seed: int = 0) -> Tensor:
    """A matrix with singular values from low to high, evenly spaced on a logarithmic scale."""
    rank = min(rows, columns)
    u = torch.linalg.qr(random(rows, rank, seed=seed)).Q
    v = torch.linalg.qr(random(columns, rank, seed=seed + 1)).Q
    result: Tensor = u * torch.logspace(math.log10(low), math.log10(high), rank, dtype=torch.float64) @ v.T
    return result

"""Chooses each tensor group's k from predicted bytes and predicted loss. SDClip clips a row at k standard deviations.

A larger k gives coarser codes, which take fewer bytes and raise the loss. A tensor group is the same matrix of all
layers, or one embedding. The chosen values of k minimize (rise of the loss) + λ · (bytes), with one λ for all groups.
`train.artifact.fit_to_target` later corrects the predicted bytes by measured bytes.

bytes   Assume that the weights of a row are normally distributed with deviation σ. Rounded to multiples of the row's
        scale s = kσ / (2^(bits-1) - 1), they take as many bits as the entropy of the resulting discrete distribution.
        For large σ / s this is about ½ log2(2πe (σ²/s² + 1/12)) bits per weight.
loss    Assume that the rise is proportional to the squared rounding error of the group. `loss_factors` measures the
        factor by rounding this group alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.config import Config
from train.quantize.row_scales import ROW_SCALES, largest_code, rtn
from train.quantize.tensors import clip_settings, stored_bits, tensor_group

SEARCHED_CLIPS = ("sdclip", "hessian_sdclip")
"""Names of the row clips that depend on k."""

_GRID = 800
_SMALLEST_SIGMAS = 2.0
# `loss_factors` rounds with this multiple of the settings' k, so that the rise of the loss exceeds the noise
_PROBE = 2.0
# scales are computed with this k and then divided by it: float16 scales with k = 1 would lose bits below 2^-14
_UNIT_SIGMAS = 1024.0


@dataclass(frozen=True)
class Curves:
    """Predictions for one tensor group, for each k in a grid."""

    name: str  # the group
    tensors: tuple[str, ...]  # parameter names
    bits: int
    start: float  # the settings' k
    sigmas: Tensor  # (grid,) float64, the values of k, rising
    size: Tensor  # (grid,) float64, predicted bytes
    error: Tensor  # (grid,) float64, predicted squared error
    elements: int  # number of weights


def gaussian_codes(ratio: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the entropy in bits per code, and mean squared error / s², of N(0, σ²) values rounded to multiples of s.

    `ratio` is σ / s, positive float64 of any shape. Both results have the shape of `ratio`.
    """
    limit = largest_code(bits)
    codes = torch.arange(-limit, limit + 1, dtype=torch.float64)
    bounds = (codes[:-1] + 0.5) / ratio[..., None]
    below = torch.special.ndtr(bounds)
    density = torch.exp(-0.5 * bounds.square()) / math.sqrt(2 * math.pi)
    nothing, everything = torch.zeros_like(below[..., :1]), torch.ones_like(below[..., :1])
    # moments of order 0, 1 and 2 of the standard normal distribution between the rounding bounds of each code
    mass = torch.cat([nothing, below, everything], -1).diff()
    first = -torch.cat([nothing, density, nothing], -1).diff()
    second = mass - torch.cat([nothing, bounds * density, nothing], -1).diff()
    entropy = -torch.xlogy(mass, mass.clamp_min(1e-300)).sum(-1) / math.log(2)
    wide = ratio[..., None]
    error = (wide.square() * second - 2 * codes * wide * first + codes.square() * mass).sum(-1)
    return entropy, error


@torch.no_grad()
def group_curves(model: nn.Module, config: Config, hessians: Mapping[str, Tensor]) -> list[Curves]:
    """Predict bytes and error of all tensor groups that are stored as codes with a row clip in `SEARCHED_CLIPS`."""
    members: dict[tuple[str, int], list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        bits = stored_bits(name, parameter, config)
        if bits < 16 and clip_settings(name, config).name in SEARCHED_CLIPS:
            members[tensor_group(name), bits].append(name)
    curves = []
    for (group, bits), names in members.items():
        limit = largest_code(bits)
        sigmas = torch.logspace(math.log10(_SMALLEST_SIGMAS), math.log10(2 * limit), _GRID, dtype=torch.float64)
        size, error = torch.zeros(_GRID, dtype=torch.float64), torch.zeros(_GRID, dtype=torch.float64)
        # interpolate in a table over log(σ / s), because exact sums over all codes are slow
        table = torch.linspace(-7.0, 9.0, 1601, dtype=torch.float64)
        entropies, errors = gaussian_codes(table.exp(), bits)
        for name in names:
            weight = parameters[name].detach().float()
            unit, floor, deviation = _row_units(name, weight, bits, config, hessians.get(name))
            scales = torch.maximum(sigmas[:, None] * unit, floor)
            position = ((deviation / scales).clamp_min(1e-300).log() - table[0]) / (table[1] - table[0])
            position = position.clamp(0, len(table) - 1.001)
            low, part = position.long(), position.frac()
            size += weight.shape[1] / 8 * torch.lerp(entropies[low], entropies[low + 1], part).sum(1)
            relative = torch.lerp(errors[low], errors[low + 1], part)
            error += weight.shape[1] * (relative * scales.square()).sum(1)
        start = clip_settings(names[0], config).sigmas
        elements = sum(parameters[name].numel() for name in names)
        curves.append(Curves(group, tuple(names), bits, start, sigmas, size, error, elements))
    return curves


@torch.no_grad()
def loss_factors(
    model: nn.Module,
    config: Config,
    curves: Sequence[Curves],
    hessians: Mapping[str, Tensor],
    loss: Callable[[], float],
) -> list[float]:
    """Measure, for each group, the rise of the loss per squared rounding error, by rounding this group alone.

    The group is clipped at `_PROBE` times the settings' k. `loss` returns the model's mean loss, the same on every
    rank. The model's parameters change during the measurement; then they are restored.
    """
    parameters = dict(model.named_parameters())
    before = loss()
    factors = []
    for group in curves:
        kept = {name: parameters[name].detach().clone() for name in group.tensors}
        error = 0.0
        for name, weight in kept.items():
            clip = clip_settings(name, config)
            rows = weight.float()
            scales = ROW_SCALES[clip.name](
                rows, group.bits, sigmas=_PROBE * group.start, floor=clip.floor, hessian=hessians.get(name)
            )
            rounded = rtn(rows, scales, group.bits) * scales.float()[:, None]
            error += (rows - rounded).double().square().sum().item()
            parameters[name].copy_(rounded)
        factors.append((loss() - before) / error if error else 0.0)
        for name, weight in kept.items():
            parameters[name].copy_(weight)
    # noise may hide the effect of a group, but rounding always costs some loss: use a smallest factor
    least = 0.01 * max([*factors, 1e-12])
    return [max(factor, least) for factor in factors]


def choose_sigmas(
    curves: Sequence[Curves], factors: Sequence[float], correction: Mapping[str, float], budget: float
) -> list[int]:
    """Choose each group's k so that the expected loss is least and all codes take at most `budget` predicted bytes.

    `factors` is the result of `loss_factors`. `correction`: group → bytes per weight to add to the prediction. If no
    choice meets the budget, choose the fewest predicted bytes.

    Returns:
        For each group, the index of the chosen k in the group's grid.
    """
    sizes = [group.size + correction.get(group.name, 0.0) * group.elements for group in curves]
    losses = [factor * group.error for factor, group in zip(factors, curves, strict=True)]

    def picked(multiplier: float) -> list[int]:
        return [int((loss + multiplier * size).argmin()) for loss, size in zip(losses, sizes, strict=True)]

    def taken(chosen: list[int]) -> float:
        return sum(float(size[index]) for size, index in zip(sizes, chosen, strict=True))

    # bounds of log2 λ: at the lower end only the loss matters, at the upper end only the bytes
    low, high = -100.0, 40.0
    if taken(picked(2.0**low)) <= budget:
        return picked(2.0**low)
    for _ in range(60):
        middle = (low + high) / 2
        if taken(picked(2.0**middle)) <= budget:
            high = middle
        else:
            low = middle
    return picked(2.0**high)


def _row_units(
    name: str, weight: Tensor, bits: int, config: Config, hessian: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the scale with k = 1 and no floor, the scale's floor, and the row's deviation: float64, CPU."""
    clip = clip_settings(name, config)
    scales = ROW_SCALES[clip.name]
    unit = scales(weight, bits, sigmas=_UNIT_SIGMAS, floor="none", hessian=hessian).cpu().double() / _UNIT_SIGMAS
    floor = scales(torch.zeros_like(weight), bits, sigmas=1.0, floor=clip.floor, hessian=hessian).cpu().double()
    return unit, floor, weight.double().std(dim=1).cpu()

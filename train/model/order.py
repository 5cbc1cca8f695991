"""The order of layer runs: encoder and decoder, repeated layers, skips, and where lanes begin."""

from __future__ import annotations

from typing import NamedTuple

from train.config import Config


class Step(NamedTuple):
    """One layer run."""

    layer: int  # physical layer
    form: str  # "serial", "gptj" or "lanes", see `train.model.block`
    skip: tuple[int, int] | None = None  # (row of the skip weights, step whose output is added before the layer runs)
    saves: bool = False  # a later step adds this one's output
    blend: int | None = None  # which repeat, if its output is averaged with its input instead of replacing it (#1392)


def skip_count(config: Config) -> int:
    """Number of U-Net skips with weights: ⌊layers / 2⌋, also with recurrence."""
    return config.num_layers // 2


def halves(config: Config, *, recurrence: bool) -> tuple[list[int], list[int]]:
    """Physical layers of the encoder and of the decoder in order, without blended repeats.

    `recur_form` "unroll" (#1471) repeats `recur_layers` once after their first run and splits the longer order in the
    middle; "blend" (#1392) does not change the halves.
    """
    order = list(range(config.num_layers))
    if recurrence and config.recur_layers and config.recur_form == "unroll":
        end = config.recur_layers[-1] + 1
        order[end:end] = config.recur_layers
    middle = len(order) // 2
    return order[:middle], order[middle:]


def make_plan(config: Config, *, recurrence: bool) -> tuple[Step, ...]:
    """All layer runs of a forward pass, in order.

    The decoder's n-th layer adds the output of the encoder's n-th layer from the end, while there are skip weights. No skips
    from the first layer in lanes on (#1471). Only the encoder has blended repeats; a skip takes a layer's output before its
    repeat (#1392).
    """
    encoder, decoder = halves(config, recurrence=recurrence)
    blends = recurrence and config.recur_form == "blend"
    steps: list[Step] = []
    stored: list[int] = []
    for layer in encoder:
        form = "gptj" if _is_parallel(config, layer) and config.parallel_form == "gptj" else "serial"
        stored.append(len(steps))
        steps.append(Step(layer, form))
        if blends and layer in config.recur_layers:
            steps.append(Step(layer, form, blend=config.recur_layers.index(layer)))
    in_lanes = False
    for row, layer in enumerate(decoder):
        skip = None
        if row < skip_count(config) and stored and not in_lanes:
            skip = (row, stored.pop())
            steps[skip[1]] = steps[skip[1]]._replace(saves=True)
        parallel = _is_parallel(config, layer)
        in_lanes = in_lanes or (parallel and config.parallel_form == "lanes")
        form = "lanes" if in_lanes else "gptj" if parallel else "serial"
        steps.append(Step(layer, form, skip))
    return tuple(steps)


def virtual_order(config: Config, *, recurrence: bool) -> tuple[int, ...]:
    """Physical layers in the order in which they run, with repeats."""
    return tuple(step.layer for step in make_plan(config, recurrence=recurrence))


def _is_parallel(config: Config, layer: int) -> bool:
    return 0 <= config.parallel_start_layer <= layer

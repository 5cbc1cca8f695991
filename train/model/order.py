"""The order in which layers run: encoder and decoder halves, repeated layers, U-Net skips, and layers in lanes.

A physical layer has weights. It may run several times in one forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

from train.config import Config


class Step(NamedTuple):
    """One run of a layer."""

    layer: int  # the physical layer
    form: str  # "serial", "gptj", "lanes" or "routed", see `train.model.block.Block`
    skip: tuple[int, int] | None = None  # (row of the skip weights, step whose output is added before the layer runs)
    saves: bool = False  # whether a later step adds this step's output
    blend: int | None = None  # for a blended repeat: its index; the repeat's output is averaged with its input (#1392)


def skip_count(config: Config) -> int:
    """Return the largest number of U-Net skips: `skip_rows`, or ⌊layers / 2⌋ if `skip_rows` is 0."""
    return config.skip_rows or config.num_layers // 2


def halves(config: Config, *, recurrence: bool) -> tuple[list[int], list[int]]:
    """Return the physical layers of the encoder and of the decoder, in order, without blended repeats.

    `recur_form` "unroll" (#1471) repeats the group `recur_layers` `num_loops` times after its first run, and then
    splits the longer order in the middle. "blend" (#1392) does not change the halves.
    """
    order = list(range(config.num_layers))
    if recurrence and config.recur_layers and config.recur_form == "unroll":
        end = config.recur_layers[-1] + 1
        order[end:end] = config.recur_layers * config.num_loops
    middle = len(order) // 2
    return order[:middle], order[middle:]


def make_plan(config: Config, *, recurrence: bool) -> tuple[Step, ...]:
    """List all layer runs of a forward pass, in order.

    The first layer of the decoder adds the output of the last layer of the encoder, the second layer adds
    that of the last layer but one, and so on, as long as there are skip weights. With `parallel_form` "lanes" there are
    no skips after the first layer in lanes (#1471). Only encoder layers have blended repeats. A skip adds a layer's
    output before the layer's blended repeat (#1392).
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
    in_lanes, has_lanes = False, config.parallel_form in ("lanes", "routed")
    for row, layer in enumerate(decoder):
        skip = None
        if row < skip_count(config) and stored and not (in_lanes and config.parallel_form == "lanes"):
            skip = (row, stored.pop())
            steps[skip[1]] = steps[skip[1]]._replace(saves=True)
        parallel = _is_parallel(config, layer)
        in_lanes = in_lanes or (parallel and has_lanes)
        form = config.parallel_form if in_lanes or parallel else "serial"
        steps.append(Step(layer, form, skip))
    return tuple(steps)


def virtual_order(config: Config, *, recurrence: bool) -> tuple[int, ...]:
    """Return the physical layers in the order in which they run, with repeats."""
    return tuple(step.layer for step in make_plan(config, recurrence=recurrence))


def split_order(config: Config, *, recurrence: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the result of `virtual_order`, divided into encoder and decoder."""
    order = virtual_order(config, recurrence=recurrence)
    # only the encoder has blended repeats
    middle = len(order) - len(halves(config, recurrence=recurrence)[1])
    return order[:middle], order[middle:]


def _is_parallel(config: Config, layer: int) -> bool:
    return 0 <= config.parallel_start_layer <= layer

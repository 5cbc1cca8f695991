"""The order of layer runs: encoder and decoder, repeated layers, skips, and where lanes begin."""

from __future__ import annotations

from typing import NamedTuple

from train.config import Config


class Step(NamedTuple):
    """One layer run.

    Attributes:
        layer: physical layer.
        form: "serial", "gptj" or "lanes", see `train.model.block`.
        skip: (row of the skip weights, step whose output is added) before the layer runs, or None.
        saves: whether a later step adds this one's output.
        blend: index of the repeated layer if its output is averaged with its input instead of replacing it (#1392).
    """

    layer: int
    form: str
    skip: tuple[int, int] | None = None
    saves: bool = False
    blend: int | None = None


def skip_count(config: Config) -> int:
    """Number of U-Net skips with weights: ⌊layers / 2⌋, also with recurrence."""
    return config.num_layers // 2


def halves(config: Config, *, recurrence: bool) -> tuple[list[int], list[int]]:
    """Physical layers of the encoder and of the decoder in order, without blended repeats.

    `recur_form` "unroll" (#1471) repeats `recur_layers` once after their first run and splits the longer order in the
    middle; "blend" (#1392) does not change the halves.

    Args:
        config: `num_layers`, `recur_layers`, `recur_form`.
        recurrence: whether the repeated layers run twice.

    Returns:
        Encoder and decoder.
    """
    order = list(range(config.num_layers))
    if recurrence and config.recur_layers and config.recur_form == "unroll":
        end = config.recur_layers[-1] + 1
        order[end:end] = config.recur_layers
    middle = len(order) // 2
    return order[:middle], order[middle:]


def make_plan(config: Config, *, recurrence: bool) -> tuple[Step, ...]:
    """All layer runs of a forward pass.

    The n-th layer of the decoder adds the n-th output from the encoder's end, as long as there are weights; from the first
    layer in lanes on there are no skips (#1471). Only the encoder has blended repeats, and a skip takes a layer's output
    before its repeat (#1392).

    Args:
        config: the settings of the model.
        recurrence: whether the repeated layers run twice.

    Returns:
        The steps in order.
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

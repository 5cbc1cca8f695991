"""Which layer runs when: encoder and decoder halves, repeated layers, who takes which skip, where lanes begin."""

from __future__ import annotations

from typing import NamedTuple

from train.config import Config


class Step(NamedTuple):
    """One layer run.

    Attributes:
        layer: physical layer.
        form: "serial", "gptj" or "lanes", see `train.model.block`.
        skip: (row of the skip weights, step whose output is taken up) before the layer runs, or None.
        saves: whether a later step takes up this one's output.
        blend: index of the repeated layer if this run is blended half into the stream instead of replacing it (#1392).
    """

    layer: int
    form: str
    skip: tuple[int, int] | None = None
    saves: bool = False
    blend: int | None = None


def skip_count(config: Config) -> int:
    """Number of U-Net skips that have weights: ⌊layers / 2⌋, whatever recurrence adds."""
    return config.num_layers // 2 if config.unet_skips else 0


def halves(config: Config, *, recurrence: bool) -> tuple[list[int], list[int]]:
    """Physical layers of the encoder and of the decoder, in order, blended repeats left out.

    `recur_form` "unroll" (#1471) repeats the run of `recur_layers` once behind itself and splits the longer order in
    the middle; "blend" (#1392) leaves both halves as they are.

    Args:
        config: `num_layers`, `recur_layers`, `recur_form`.
        recurrence: whether the repetition is on.

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
    """Lay out all layer runs of a forward pass.

    The n-th layer of the decoder takes up the n-th output from the encoder's end, as long as there are weights. A
    skip is added to the stream that lanes have left, so from the first layer in lanes on, the others are dead (#1471).
    Blended repeats exist only in the encoder, and the skip is what the layer put out before its repeat (#1392).

    Args:
        config: the model's fields.
        recurrence: whether the repetition is on.

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
    """Physical layers in the order in which they run, repeats included."""
    return tuple(step.layer for step in make_plan(config, recurrence=recurrence))


def _is_parallel(config: Config, layer: int) -> bool:
    return 0 <= config.parallel_start_layer <= layer

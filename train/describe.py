"""Computes the numbers that `python -m train --recipe NAME --describe` prints. This needs no GPU and no data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from train.common.wording import counted
from train.config import Config
from train.model.gpt import GPT
from train.model.order import split_order, virtual_order
from train.model.parameters import mflop_per_token, parameter_table
from train.optimize.schedules import ContextGrowth, lr_scale, muon_momentum, warmdown_seconds
from train.quantize.tensors import stored_bits

SCHEDULE_POINTS = 13

# columns of the printed schedule: key, title, width, number format
SCHEDULE_COLUMNS = (
    ("seconds", "seconds", 8, ".1f"),
    ("step", "step", 7, ","),
    ("lr_scale", "lr scale", 9, ".4f"),
    ("muon_momentum", "momentum", 9, ".4f"),
    ("seq_len", "sequence", 8, ","),
)


def describe(config: Config, published: Mapping[str, float]) -> dict[str, Any]:
    """Compute parameters, bytes, layer order and schedule of a configuration, as a dictionary for JSON.

    `state_bytes` is the size of the trained weights in their own dtypes. `container_bytes` is the size of the quantized
    tensors before the codec, with one byte per code and float16 row scales. `packed_bytes` is the same with b/8 bytes
    per b-bit code. `published` is the recipe's `PUBLISHED`. Its `step_ms`, if given, converts seconds to steps.
    """
    with torch.device("meta"):
        model = GPT(config)
    tensors: list[dict[str, Any]] = []
    for row, (name, parameter) in zip(parameter_table(model), model.named_parameters(), strict=True):
        bits = stored_bits(name, parameter, config)
        scales = 2 * parameter.shape[0] if bits < 16 else 0
        tensors.append(
            {
                "name": name,
                "shape": list(row.shape),
                "parameters": row.count,
                "optimizer": row.kind,
                "stored": f"int{bits}" if bits < 16 else "float16",
                "state_bytes": row.count * parameter.element_size(),
                "container_bytes": row.count * (1 if bits < 16 else 2) + scales,
                "packed_bytes": math.ceil(row.count * bits / 8) + scales,
            }
        )
    totals = {key: sum(tensor[key] for tensor in tensors) for key in ("state_bytes", "container_bytes", "packed_bytes")}
    return {
        "recipe": config.recipe,
        "published": dict(published),
        "parameters": sum(tensor["parameters"] for tensor in tensors),
        **totals,
        "virtual_order": {
            "before_recurrence": list(virtual_order(config, recurrence=False)),
            "after_recurrence": list(virtual_order(config, recurrence=True)),
            "encoder_runs_before_recurrence": len(split_order(config, recurrence=False)[0]),
            "encoder_runs_after_recurrence": len(split_order(config, recurrence=True)[0]),
            "recurrence_from_step": _recurrence_step(config, published.get("step_ms")) if config.recur_layers else None,
            "recurrence_from_fraction": config.recur_start_frac if config.recur_layers else None,
        },
        "mflop_per_token": {
            "before_recurrence": mflop_per_token(config, recurrence=False),
            "after_recurrence": mflop_per_token(config, recurrence=True),
        },
        "training_ends": {"steps": config.iterations, "seconds": config.training_seconds or None},
        "schedule": schedule(config, published.get("step_ms")),
        "tensors": tensors,
    }


def _recurrence_step(config: Config, step_ms: float | None) -> int | None:
    """Return the first step with recurrence; None if it depends on the time and `step_ms` is not known."""
    if not config.recur_start_frac:
        return config.recur_start_step
    cap = warmdown_seconds(config)
    if not cap:
        return math.ceil(config.recur_start_frac * config.iterations)
    return math.ceil(config.recur_start_frac * cap * 1000 / step_ms) if step_ms else None


def schedule(config: Config, step_ms: float | None) -> list[dict[str, float | None]]:
    """Compute learning-rate scale, momentum and sequence length at `SCHEDULE_POINTS` points of a run.

    If the learning rate follows the steps, the points are equidistant in steps. If it follows the time, they are
    equidistant in time, and `step_ms` converts seconds to steps. If `step_ms` is None, all values that depend on the
    step are None.
    """
    cap = warmdown_seconds(config)
    timed = bool(step_ms) or not cap
    rate_known = timed or config.warmdown_frac > 0 or config.warmdown_iters == 0
    momentum_known = timed or config.muon_momentum_warmup_steps == 0
    points: list[dict[str, float | None]] = []
    context = ContextGrowth(config)
    for index in range(SCHEDULE_POINTS):
        done = index / (SCHEDULE_POINTS - 1)
        if cap and step_ms:
            seconds = done * cap
            step = int(seconds * 1000 / step_ms)
        else:
            step, seconds = int(done * config.iterations), done * cap
        context.grow(step, seconds)
        points.append(
            {
                "seconds": seconds if cap else None,
                "step": step if timed else None,
                "lr_scale": lr_scale(step, seconds, config) if rate_known else None,
                "muon_momentum": muon_momentum(step, config) if momentum_known else None,
                "seq_len": context.length,
            }
        )
    return points


def _runs(order: Mapping[str, Any], when: str) -> str:
    layers, middle = [str(layer) for layer in order[when]], order[f"encoder_runs_{when}"]
    return f"encoder ({' '.join(layers[:middle])}), decoder ({' '.join(layers[middle:])})"


def describe_text(facts: Mapping[str, Any]) -> str:
    """Format the result of `describe` for people."""
    order, flops = facts["virtual_order"], facts["mflop_per_token"]
    lines = [
        f"recipe {facts['recipe']}: {facts['parameters']:,} parameters",
        f"  bytes: {facts['state_bytes']:,} in training; {facts['container_bytes']:,} quantized, one byte per code; "
        f"{facts['packed_bytes']:,} quantized, packed codes",
    ]
    if facts["published"]:
        lines.append("  published: " + ", ".join(f"{name} {value:,}" for name, value in facts["published"].items()))
    lines.append(f"  layers: {_runs(order, 'before_recurrence')}: {flops['before_recurrence']:.1f} MFLOP per token")
    if order["after_recurrence"] != order["before_recurrence"]:
        step, fraction = order["recurrence_from_step"], order["recurrence_from_fraction"]
        begin = f"{fraction:.4g} of training" if step is None else f"step {step:,}"
        lines.append(
            f"  from {begin}: {_runs(order, 'after_recurrence')}: {flops['after_recurrence']:.1f} MFLOP per token"
        )
    steps, seconds = facts["training_ends"]["steps"], facts["training_ends"]["seconds"]
    limit = f" or {seconds:g} s, whichever comes first" if seconds else ""
    lines += [f"  training ends after {counted(steps, 'step')}{limit}", ""]
    if facts["schedule"][0]["step"] is None:
        lines.append("no published step time: values that depend on the step are shown as -")
    lines.append(" ".join(f"{title:>{width}}" for _, title, width, _ in SCHEDULE_COLUMNS))
    lines += [
        " ".join(
            f"{'-' if point[key] is None else format(point[key], spec):>{width}}"
            for key, _, width, spec in SCHEDULE_COLUMNS
        )
        for point in facts["schedule"]
    ]
    header = f"{'tensor':<34} {'shape':>13} {'parameters':>11} {'optimizer':>10} {'stored':>8} {'training B':>12} {'quantized B':>11} {'packed B':>11}"
    lines += ["", header]
    lines += [
        f"{t['name']:<34} {'x'.join(map(str, t['shape'])) or 'scalar':>13} {t['parameters']:11,} {t['optimizer']:>10} {t['stored']:>8} "
        f"{t['state_bytes']:12,} {t['container_bytes']:11,} {t['packed_bytes']:11,}"
        for t in facts["tensors"]
    ]
    return "\n".join(lines)

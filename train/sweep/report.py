"""Writes the table and the plot of a sweep: varied settings and scores."""

from __future__ import annotations

import itertools
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.common.files import atomic_write, atomic_writer, write_json
from train.submission.plots import BLUE, DPI, FAINT, INK, VERMILION
from train.sweep.plan import Plan, value_text


def write_report(plan: Plan, points: list[dict[str, Any]]) -> None:
    """Write sweep.json, sweep.txt and, once a run has finished, sweep.png into the sweep's folder."""
    write_json(plan.folder / "sweep.json", report(plan, points))
    atomic_write(plan.folder / "sweep.txt", table(plan, points) + "\n")
    if any(point["val_bpb"] for point in points):
        figure = plot(plan, points)
        FigureCanvasAgg(figure)
        with atomic_writer(plan.folder / "sweep.png") as file:
            figure.savefig(file, format="png", dpi=DPI)


def report(plan: Plan, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sweep as a dictionary for JSON, best point first."""
    varied = {name: values if isinstance(values, list) else str(values) for name, values in plan.varied.items()}
    return {
        "sweep": plan.config.run_id, "recipe": plan.config.recipe, "sampler": plan.sampler, "seeds": list(plan.seeds),
        "varied": varied, "points_planned": plan.total, "points": _ranked(points),
    }  # fmt: skip


def table(plan: Plan, points: list[dict[str, Any]]) -> str:
    """Return a table with one line per point, best first: settings, mean and deviation of val_bpb, seeds, state."""
    heads = [*plan.varied, "val_bpb", "std", "seeds", "state"]
    rows = [heads]
    for point in _ranked(points):
        cells = [value_text(point["settings"][name]) for name in plan.varied]
        scores = [f"{point[name]:.6f}" if point[name] is not None else "–" for name in ("mean", "std")]
        state = f"failed: {point['error']}" if point["state"] == "failed" else point["state"]
        rows.append([*cells, *scores, f"{len(point['val_bpb'])} of {len(plan.seeds)}", state])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ended = sum(point["state"] != "not finished" for point in points)
    return "\n".join([f"{plan.folder}: {ended} of {plan.total} points, val_bpb is the mean over the seeds", *lines])


def plot(plan: Plan, points: list[dict[str, Any]]) -> Figure:
    """Plot mean and standard deviation of each point's scores, in one panel per varied setting.

    In a panel, lines join the points that differ only in the panel's setting.
    """
    scored = [point for point in _ranked(points) if point["mean"] is not None]
    columns = min(len(plan.varied), 3)
    rows = -(-len(plan.varied) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.6, 3.9 * rows), layout="constrained")
    figure.suptitle(f"Sweep {plan.config.run_id}", fontsize=12, color=INK, x=0.01, ha="left")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(plan.varied) :]:
        panel.set_visible(False)
    for panel, name in zip(panels.flat, plan.varied, strict=False):
        _panel(panel, name, plan, scored)
    for row in panels:
        row[0].set_ylabel("bits per byte, mean over seeds")
    return figure


def _panel(axis: Axes, name: str, plan: Plan, scored: list[dict[str, Any]]) -> None:
    values = plan.varied[name]

    def position(point: dict[str, Any]) -> float:
        value = point["settings"][name]
        # draw listed values at equal distances
        return float(values.index(value) if isinstance(values, list) else value)

    def others(point: dict[str, Any]) -> str:
        return str({key: value for key, value in point["settings"].items() if key != name})

    ordered = sorted(scored, key=lambda point: (others(point), position(point)))
    for _, joined in itertools.groupby(ordered, key=others):
        line = list(joined)
        axis.plot([position(p) for p in line], [p["mean"] for p in line], color=FAINT, linewidth=1.2, zorder=1)
    for index, point in enumerate(scored):
        axis.errorbar(
            position(point), point["mean"], yerr=point["std"], fmt="o", capsize=3, markersize=6, zorder=3,
            color=BLUE if index else VERMILION, label="best" if index == 0 else None,
        )  # fmt: skip
    if isinstance(values, list):
        axis.set_xticks(range(len(values)), values)
    elif values.log:
        axis.set_xscale("log")
    axis.set_xlabel(name)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9)
    if scored:
        axis.legend(frameon=False, fontsize=9)


def _ranked(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort points: finished ones first, then unfinished, then failed ones.

    Points of the same state are sorted by score.
    """
    order = ("finished", "not finished", "failed")
    return sorted(
        points, key=lambda p: (order.index(p["state"]), math.inf if p["mean"] is None else p["mean"], p["number"])
    )

"""Draws a run's plots: the loss and the bits per byte during training, and the submission's bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from train.common.errors import UserError
from train.common.files import atomic_writer
from train.run.logger import series
from train.submission.summary import Summary

# the Okabe-Ito palette, distinguishable with any color vision
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, FAINT, EMPTY = "#333333", "#DDDDDD", "#F2F2F2"
DPI = 150
# a run has few validations: each is drawn as a marker, and a thin line connects the markers
MEASURED = {"color": BLUE, "linewidth": 0.8, "marker": "o", "markersize": 5, "clip_on": False, "zorder": 3}
LEGEND = {"loc": "upper right", "fontsize": 9, "framealpha": 1.0, "edgecolor": "white"}

Points = Sequence[tuple[int, float, float]]


def plot_loss(path: str | os.PathLike[str], records: list[dict[str, Any]], summary: Summary) -> None:
    """Draw training and validation loss over steps and over seconds.

    Args:
        path: the PNG.
        records: the records of metrics.jsonl, from `train.run.logger.read_metrics`.
        summary: the run's numbers.

    Raises:
        UserError: the records hold no loss.
    """
    train, val = series(records, "train", "train_loss"), series(records, "val", "val_loss")
    if not train and not val:
        raise UserError(f"{path}: nothing to draw: metrics.jsonl holds no training or validation loss")
    figure, panels = _two_panels(_title("Loss", summary), "loss (nats per token)")
    for axis, column in zip(panels, (0, 1), strict=True):
        if train:
            _curve(axis, train, column, color=SKY, linewidth=1.2, label="training (batch)")
        if val:
            _curve(axis, val, column, label="validation", **MEASURED)
        _limit(axis, [point[2] for point in (*train, *val)])
    panels[1].legend(**LEGEND)
    _save(figure, path)


def plot_bpb(path: str | os.PathLike[str], records: list[dict[str, Any]], summary: Summary, evaluation: str) -> None:
    """Draw validation bits per byte over steps and over seconds.

    Horizontal lines show the scores of the artifact and of compressors such as gzip.

    Args:
        path: the PNG.
        records: the records of metrics.jsonl, from `train.run.logger.read_metrics`.
        summary: the run's numbers.
        evaluation: description of the evaluation that gave `summary.val_bpb`.

    Raises:
        UserError: the records hold no validation.
    """
    val = series(records, "val", "val_bpb")
    if not val:
        raise UserError(f"{path}: nothing to draw: metrics.jsonl holds no validation")
    figure, panels = _two_panels(_title("Validation", summary), "bits per byte")
    levels = [(f"artifact, {evaluation}: {summary.val_bpb:.4f}", summary.val_bpb, VERMILION, "-")]
    if summary.flat_val_bpb not in (None, summary.val_bpb):
        levels.append(
            (f"artifact, non-overlapping windows: {summary.flat_val_bpb:.4f}", summary.flat_val_bpb, VERMILION, ":")
        )
    colors = (INK, PURPLE, GREEN, ORANGE)
    for (name, value), color in zip(summary.yardsticks.items(), colors, strict=False):
        levels.append((f"{name}: {value:.4f}", value, color, "--"))
    for axis, column in zip(panels, (0, 1), strict=True):
        _curve(axis, val, column, label="during training, non-overlapping windows", **MEASURED)
        for label, value, color, style in levels:
            axis.axhline(value, color=color, linestyle=style, linewidth=1.2, label=label)
        _limit(axis, [*(point[2] for point in val), *(level[1] for level in levels)])
    _legend_below(figure, panels[1], columns=2)
    _save(figure, path)


def plot_runs(
    path: str | os.PathLike[str], title: str, curves: Mapping[str, Points], scores: Sequence[float | None]
) -> None:
    """Draw the validations of runs over steps and over seconds, one color per run.

    Args:
        path: the PNG.
        title: the title.
        curves: name of a run → its validations during training; at least one run has a validation.
        scores: score of each run's artifact, drawn as a dotted line; None: no score.
    """
    figure, panels = _two_panels(title, "bits per byte")
    for axis, column in zip(panels, (0, 1), strict=True):
        for (name, points), score, color in zip(curves.items(), scores, (BLUE, VERMILION), strict=True):
            # Matplotlib would read a dollar sign as the start of a formula
            label = name.replace("$", r"\$")
            if points:
                _curve(axis, points, column, **MEASURED | {"color": color, "label": label})
            if score is not None:
                axis.axhline(score, color=color, linestyle=":", linewidth=1.2, label=f"{label}, artifact: {score:.4f}")
        values = [point[2] for points in curves.values() for point in points]
        _limit(axis, [*values, *(score for score in scores if score is not None)])
    _legend_below(figure, panels[1], columns=2)
    _save(figure, path)


def plot_size_budget(path: str | os.PathLike[str], summary: Summary) -> None:
    """Draw the bytes of code and model as two bars. The upper bar shows the cap; the lower bar is enlarged."""
    palette = (BLUE, SKY, GREEN, PURPLE, VERMILION, "#F0E442", "#999999", ORANGE)
    parts = [
        (name, size, palette[index % len(palette)]) for index, (name, size) in enumerate(summary.byte_parts.items())
    ]
    remaining = summary.max_bytes - summary.bytes_total
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    title = f"{summary.bytes_total:,} of {summary.max_bytes:,} bytes"
    title += f", {remaining:,} left" if remaining >= 0 else f", {-remaining:,} TOO MANY"
    figure.suptitle(f"{_title('Size', summary)}: {title}", fontsize=12, color=INK, x=0.01, ha="left")
    whole, enlarged = figure.subplots(2, 1)
    _stack(whole, parts)
    if remaining > 0:
        whole.barh(0, remaining, left=summary.bytes_total, color=EMPTY, edgecolor=FAINT, height=0.6)
    whole.axvline(summary.max_bytes, color=INK, linewidth=1.5)
    whole.annotate("cap ", (summary.max_bytes, 0.4), ha="right", va="bottom", fontsize=9, color=INK)
    whole.set_xlim(0, max(summary.max_bytes, summary.bytes_total) * 1.02)
    whole.set_title("against the cap", fontsize=10, loc="left", color=INK)
    _stack(enlarged, parts)
    enlarged.set_xlim(0, summary.bytes_total)
    enlarged.set_title("by part", fontsize=10, loc="left", color=INK)
    for axis in (whole, enlarged):
        axis.set_yticks([])
        axis.set_ylim(-0.4, 0.4)
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_formatter(EngFormatter(unit="B"))
        _tidy(axis)
    enlarged.set_xlabel("bytes (1 kB = 1,000 B)")
    _legend_below(figure, enlarged, columns=3)
    _save(figure, path)


def _title(what: str, summary: Summary) -> str:
    return summary.labelled(f"{what} of {summary.run_id}")


def _stack(axis: Axes, parts: list[tuple[str, int, str]]) -> None:
    left = 0
    for name, size, color in parts:
        axis.barh(
            0, size, left=left, color=color, edgecolor="white", linewidth=0.8, height=0.6, label=f"{name} {size:,} B"
        )
        left += size


def _two_panels(title: str, quantity: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    panels = list(figure.subplots(1, 2, sharey=True))
    panels[0].set_ylabel(quantity)
    panels[0].set_xlabel("step")
    panels[1].set_xlabel("training time (seconds)")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    for axis in panels:
        axis.grid(color=FAINT, linewidth=0.6)
        _tidy(axis)
    return figure, panels


def _curve(axis: Axes, points: Points, column: int, **style: Any) -> None:
    axis.plot([point[column] for point in points], [point[2] for point in points], **style)


def _limit(axis: Axes, values: list[float]) -> None:
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    axis.set_ylim(min(values) - margin, max(values) + margin)
    axis.set_xlim(left=0)


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=columns, fontsize=9)


def _tidy(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    with atomic_writer(Path(path)) as file:
        figure.savefig(file, format="png", dpi=DPI)

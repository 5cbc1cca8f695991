"""Plots of each GPU's results.

There are four plots: milliseconds per step at each commit, evaluation speed at each commit, speed-ups, and a roofline.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from benchmarks.report.results import Measurement, Subject, codes_by_age, file_stem, gpus, newest

STEP = "step "
EVALUATION = "evaluation"
# these variants have the same color in every plot
VARIANT_COLORS = {"published": "#999999", "torch": "#0072B2", "golf": "#D55E00"}
COLORS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
REST = "#999999"
# most rounds in which overlapping labels are moved apart
PASSES = 300
# speed-ups are relative to the fastest of these variants and of the compiled variants
PLAIN = ("torch", "published", "plain")


def plots(measurements: Sequence[Measurement]) -> dict[str, bytes]:
    """Returns file name → PNG. Each GPU gets the plots for which it has data."""
    drawn = {}
    for gpu in gpus(measurements):
        own = [m for m in measurements if m.subject.gpu == gpu and not m.subject.repeated]
        charts = {"steps": _steps, "speedup": _speedup, "roofline": _roofline, "evaluation": _evaluation}
        for name, draw in charts.items():
            figure = Figure(figsize=(9, 5), layout="constrained", dpi=120)
            title = draw(figure, own)
            if not title:
                continue
            figure.suptitle(f"{title}\n{gpu}", x=0.01, ha="left", fontsize=11)
            # drawing sets the positions that spread_labels reads
            figure.draw_without_rendering()
            for axis in figure.axes:
                spread_labels(axis, figure.dpi)
            png = io.BytesIO()
            FigureCanvasAgg(figure).print_png(png)
            drawn[f"{file_stem(gpu)}_{name}.png"] = png.getvalue()
    return drawn


def _bare(axis: Axes, grid: Literal["both", "x", "y"]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)


def spread_labels(axis: Axes, dpi: float) -> None:
    """Move the annotations of an axis up or down until none overlap."""
    labels = [text for text in axis.texts if isinstance(text, Annotation)]
    # the extent of the text alone, without the line that connects it to a point
    boxes = [Text.get_window_extent(label) for label in labels]
    middles = [(box.y0 + box.y1) / 2 for box in boxes]
    places = list(middles)
    # from the lowest label up, so that the labels keep their order
    pairs = list(itertools.combinations(sorted(range(len(labels)), key=places.__getitem__), 2))
    for _ in range(PASSES):
        moved = False
        for one, other in pairs:
            beside = boxes[one].x0 >= boxes[other].x1 or boxes[other].x0 >= boxes[one].x1
            over = places[one] - places[other] + (boxes[one].height + boxes[other].height) / 2
            if not beside and over > 0:
                # slightly more than needed, so that the loop ends
                places[one], places[other] = places[one] - over / 2 - 0.1, places[other] + over / 2 + 0.1
                moved = True
        if not moved:
            break
    for label, middle, place in zip(labels, middles, places, strict=True):
        x, y = label.get_position()
        label.set_position((x, y + (place - middle) * 72 / dpi))


def _steps(figure: Figure, measurements: list[Measurement]) -> str:
    steps = [m for m in measurements if m.subject.op.startswith(STEP) and "+" not in m.subject.impl]
    panels: dict[str, list[Measurement]] = {}
    for m in sorted(steps, key=lambda m: (m.subject.op, m.subject.mode != "before recurrence")):
        name = f"{m.subject.op.removeprefix(STEP)}, {m.subject.mode}, {m.subject.shape} {m.subject.dtype}"
        panels.setdefault(name, []).append(m)
    _over_commits(figure, panels, lambda m: m.p50)
    return "ms per training step on one of 8 GPUs, over commits" if steps else ""


def _evaluation(figure: Figure, measurements: list[Measurement]) -> str:
    panels: dict[str, list[Measurement]] = {}
    for m in measurements:
        if m.subject.op == EVALUATION and _targets(m):
            panels.setdefault(f"{m.subject.shape} {m.subject.dtype}", []).append(m)
    _over_commits(figure, panels, lambda m: _targets(m) / m.p50)
    return "Thousands of tokens per second of sliding evaluation, over commits" if panels else ""


def _targets(m: Measurement) -> int:
    """Returns the number of tokens that one measured call of the evaluation scores."""
    found = re.search(r"(\d+) targets", m.subject.shape)
    return int(found[1]) if found else 0


def _over_commits(figure: Figure, panels: dict[str, list[Measurement]], value: Callable[[Measurement], float]) -> None:
    """Draw a panel for each title, with a line for each variant. The newest value is written at the line's end."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns) if panels else 0
    figure.set_size_inches(5.5 * max(columns, 1) + (columns == 1) * 3, 3.2 * max(rows, 1) + 0.8)
    for number, (title, points) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, number + 1)
        # variant → commit → last measurement
        lines: dict[str, dict[str, Measurement]] = {}
        codes = codes_by_age(points)
        for m in points:
            lines.setdefault(m.subject.impl, {})[m.code] = m
        others = iter(COLORS * len(lines))
        for impl, of_commit in lines.items():
            own = sorted(of_commit.values(), key=lambda m: codes.index(m.code))
            places, values = [codes.index(m.code) for m in own], [value(m) for m in own]
            # the value may be a rate, so the error bars scale it by the relative spread of the times
            low = [v * (1 - m.p20 / m.p50) for v, m in zip(values, own, strict=True)]
            high = [v * (m.p80 / m.p50 - 1) for v, m in zip(values, own, strict=True)]
            color = VARIANT_COLORS.get(impl) or next(others)
            axis.errorbar(places, values, [low, high], marker="o", markersize=4, capsize=2, color=color, label=impl)
            axis.annotate(
                f"{impl} {values[-1]:.1f}", (len(codes) - 1, values[-1]), (6, 0), textcoords="offset points", va="center", fontsize=8, color=color
            )  # fmt: skip
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xticks(range(len(codes)), [code.replace(" + ", "\n+ ") for code in codes], fontsize=8)
        if len(codes) > 3:
            for tick in axis.get_xticklabels():
                tick.set(rotation=30, ha="right", rotation_mode="anchor")
        # leave room for the labels at the right end
        axis.set_xlim(-0.3, len(codes) - 1 + 0.35 * len(codes))
        axis.set_ylim(0, None)
        _bare(axis, "y")


def _speedup(figure: Figure, measurements: list[Measurement]) -> str:
    rows = speedups(newest(measurements))
    if not rows:
        return ""
    figure.set_size_inches(9, 0.34 * len(rows) + 1.3)
    axis = figure.subplots()
    axis.bar_label(
        axis.barh(list(rows), list(rows.values()), color=["#0072B2" if ratio >= 1 else "#D55E00" for ratio in rows.values()]),
        fmt="%.2f ×", padding=4, fontsize=8,
    )  # fmt: skip
    axis.axvline(1.0, color="#333333", linewidth=1)
    axis.tick_params(axis="y", labelsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    _bare(axis, "x")
    return "Speed-up over the fastest PyTorch variant; for steps and evaluation over the published script"


def speedups(latest: dict[Subject, Measurement]) -> dict[str, float]:
    """Returns label → speed-up of a kernel over the fastest PyTorch variant.

    For training steps and evaluation it is the speed-up of `golf` over `published`.
    """
    found = {}
    for subject, m in sorted(latest.items(), key=lambda item: not item[0].op.startswith(STEP)):
        whole = subject.op.startswith(STEP) or subject.op == EVALUATION
        if whole:
            # the mode must match, because a step with recurrence does more work
            same = [o for s, o in latest.items() if s == subject._replace(impl="published")]
        else:
            same = [o for s, o in latest.items() if s == subject._replace(impl=s.impl, mode=s.mode)]
            same = [o for o in same if o.subject.impl in PLAIN or o.subject.impl.startswith("compile")]
        is_kernel = subject.impl == "golf" if whole else re.match(r"triton|cuda|cpp|golf", subject.impl)
        if same and is_kernel:
            which = subject.mode if subject.op.startswith(STEP) else subject.impl
            name = f"{subject.op}, {which}, {subject.shape} {subject.dtype}"
            found[name] = min(o.p50 for o in same) / m.p50
    return found


def _roofline(figure: Figure, measurements: list[Measurement]) -> str:
    points = [m for m in newest(measurements).values() if m.tflops and m.gbps and m.floor]
    if not points:
        return ""
    axis = figure.subplots()
    intensities = [1e3 * m.tflops / m.gbps for m in points]
    tflops, gbps = ceilings_of(points)
    edges = [min(intensities) / 3, max(intensities) * 3]
    if math.isfinite(tflops + gbps):
        ridge = 1e3 * tflops / gbps
        edges = sorted([min(edges[0], ridge / 3), ridge, max(edges[1], 3 * ridge)])
    if math.isfinite(min(tflops, gbps)):
        axis.loglog(edges, [min(tflops, x * gbps / 1e3) for x in edges], color="#333333", linewidth=1)
    for op in sorted({m.subject.op for m in points}):
        own = [m for m in points if m.subject.op == op]
        fastest = min(own, key=lambda m: m.p50 / m.floor)
        for m in own:
            x = 1e3 * m.tflops / m.gbps
            color, size = (VARIANT_COLORS["golf"], 6) if m is fastest else (REST, 4)
            axis.loglog(x, m.tflops, "o", color=color, markersize=size)
        label = f"{op}: {fastest.subject.impl}, {fastest.floor / fastest.p50:.0%}"
        place = (1e3 * fastest.tflops / fastest.gbps, fastest.tflops)
        axis.annotate(
            label, place, (24, -4), textcoords="offset points", va="top", fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": REST, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
    axis.set(xlabel="FLOP per byte of least memory traffic", ylabel="TFLOP/s")
    _bare(axis, "both")
    ceilings = {f"{tflops:.0f} TFLOP/s": tflops, f"{gbps:,.0f} GB/s": gbps}
    reached = ", ".join(name for name, ceiling in ceilings.items() if math.isfinite(ceiling))
    known = f"Roofline, ceilings measured on this GPU ({reached})" if reached else "Operations"
    return f"{known}; the fastest variant of each operation, and floor / time"


def ceilings_of(points: Sequence[Measurement]) -> tuple[float, float]:
    """Returns the ceilings (TFLOP/s, GB/s) from which the floors of these rows were computed; infinity if unknown.

    A floor is the longer of two times: arithmetic at the first ceiling, memory traffic at the second. So a ceiling is
    the largest rate that any row has at its floor, provided that some row is limited by it. The first ceiling limits
    some row if the rows' GB/s at their floors differ, the second if their TFLOP/s differ. Differences of less than 10 %
    do not count, because the ceilings vary between runs.
    """
    tflops, gbps = [m.tflops * m.p50 / m.floor for m in points], [m.gbps * m.p50 / m.floor for m in points]
    return (
        max(tflops) if min(gbps) < 0.9 * max(gbps) else math.inf,
        max(gbps) if min(tflops) < 0.9 * max(tflops) else math.inf,
    )

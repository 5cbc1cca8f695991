"""Tables for the README and plots from `benchmarks/results/*.csv`; no figure in either is ever typed.

Each GPU has its own table and its own plots. Where nothing was measured the README says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import ROOT
from benchmarks.results import Measurement, gpus, newest, relative
from train.files import atomic_write, atomic_writer

BEGIN, END = "<!-- figures: python -m benchmarks report -->", "<!-- end of figures -->"
NOTHING = "**Not measured on a GPU yet**: `benchmarks/results/` is empty, so there is no figure here."
STEP = "step "
EVALUATION = "evaluation"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")


def tables(measurements: Sequence[Measurement]) -> str:
    """One Markdown table per GPU of the newest measurements, or the sentence that there are none."""
    parts = []
    for gpu in gpus(measurements):
        rows = [m for subject, m in newest(measurements).items() if subject.gpu == gpu]
        rows = [m for m in rows if not m.subject.impl.endswith(" again")]
        rows.sort(
            key=lambda m: (not m.subject.op.startswith(STEP), m.subject.op, m.subject.shape, m.subject.mode, m.p50)
        )
        lines = [
            f"**{gpu}**, milliseconds per call (median, and p20 to p80)\n",
            "| what | implementation | shape | ms | spread | floor, computed | commit |",
            "|---|---|---|---|---|---|---|",
        ]
        for m in rows:
            op, impl, mode, shape, dtype = m.subject[1:]
            floor = f"{m.floor:.3f}" if m.floor else "–"
            commit = f"{m.commit}{' + changes' if m.dirty else ''}"
            lines.append(
                f"| {op} | {impl}, {mode} | {shape} {dtype} | {m.p50:.3f} | {m.p20:.3f}–{m.p80:.3f} | {floor} | {commit} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOTHING


def write_readme(path: Path, measurements: Sequence[Measurement]) -> bool:
    """Put the tables between the README's two marks; whether that changed it.

    Raises:
        ValueError: the marks are not there, once each.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected the lines {BEGIN!r} and {END!r}, once each and in this order")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{tables(measurements)}\n{END}{after}"
    if new == text:
        return False
    atomic_write(path, new)
    return True


def plots(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Draw for each GPU ms/step over time, speed-up per operation, the roofline, and evaluation; what has data."""
    written = []
    for gpu in gpus(measurements):
        own = [m for m in measurements if m.subject.gpu == gpu]
        stem = "".join(c if c.isalnum() else "_" for c in gpu)
        for name, draw in (
            ("steps", _steps),
            ("speedup", _speedup),
            ("roofline", _roofline),
            ("evaluation", _evaluation),
        ):
            figure = Figure(figsize=(9, 5), layout="constrained")
            if not draw(figure, own):
                continue
            figure.suptitle(f"{figure.get_suptitle()}, {gpu}", x=0.01, ha="left")
            path = folder / f"{stem}_{name}.png"
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_writer(path) as file:
                FigureCanvasAgg(figure).print_png(file)
            written.append(path)
    return written


def _steps(figure: Figure, measurements: list[Measurement]) -> bool:
    figure.suptitle("ms per step over commits")
    return _over_time(figure, [m for m in measurements if m.subject.op.startswith(STEP)], "ms per step")


def _evaluation(figure: Figure, measurements: list[Measurement]) -> bool:
    figure.suptitle("Sliding evaluation over commits")
    return _over_time(figure, [m for m in measurements if EVALUATION in m.subject.op], "ms per batch of windows")


def _over_time(figure: Figure, measurements: list[Measurement], label: str) -> bool:
    if not measurements:
        return False
    commits = list(dict.fromkeys(m.commit for m in measurements))
    axis = figure.subplots()
    lines: dict[tuple[str, str, str], list[Measurement]] = {}
    for m in measurements:
        lines.setdefault((m.subject.op, m.subject.impl, m.subject.mode), []).append(m)
    for number, (key, points) in enumerate(lines.items()):
        places = [commits.index(m.commit) for m in points]
        spread = [[m.p50 - m.p20 for m in points], [m.p80 - m.p50 for m in points]]
        color = COLORS[number % len(COLORS)]
        axis.errorbar(places, [m.p50 for m in points], spread, marker="o", capsize=3, color=color, label=", ".join(key))
    axis.set_xticks(range(len(commits)), commits, rotation=45, ha="right")
    axis.set(ylabel=label, ylim=(0, None))
    axis.legend(fontsize=8)
    return True


def _speedup(figure: Figure, measurements: list[Measurement]) -> bool:
    figure.suptitle("Time of PyTorch's way over the kernel's")
    rows: dict[str, float] = {}
    latest = newest(measurements)
    for subject, m in latest.items():
        if "triton" not in subject.impl and "cuda" not in subject.impl and subject.impl != "golf":
            continue
        plain = [
            o.p50
            for s, o in latest.items()
            if s.impl in ("torch", "published") and s[1] == subject.op and s[4:] == subject[4:]
        ]
        if plain:
            rows[f"{subject.op}, {subject.impl}, {subject.shape}"] = min(plain) / m.p50
    if not rows:
        return False
    axis = figure.subplots()
    axis.bar_label(axis.barh(list(rows), list(rows.values()), color=COLORS[0]), fmt="%.2f", padding=4)
    axis.axvline(1.0, color="#333333", linewidth=1)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    return True


def _roofline(figure: Figure, measurements: list[Measurement]) -> bool:
    figure.suptitle("Arithmetic rate over operations per byte")
    points = [m for m in newest(measurements).values() if m.tflops and m.gbps]
    if not points:
        return False
    axis = figure.subplots()
    for number, op in enumerate(sorted({m.subject.op for m in points})):
        own = [m for m in points if m.subject.op == op]
        intensity = [1e3 * m.tflops / m.gbps for m in own]
        axis.loglog(intensity, [m.tflops for m in own], "o", color=COLORS[number % len(COLORS)], label=op)
        # what the floor's time would be as a rate
        reach = [m.tflops * m.p50 / m.floor for m in own if m.floor]
        axis.loglog(intensity[: len(reach)], reach, "_", color=COLORS[number % len(COLORS)], markersize=14)
    axis.set(xlabel="operations per byte", ylabel="TFLOP/s (dash: the floor's)")
    axis.legend(fontsize=8)
    return True


def describe_written(paths: Sequence[Path]) -> str:
    """Names of what was written, for the terminal."""
    return ", ".join(relative(path) for path in paths) or "nothing to draw"


README = ROOT / "README.md"

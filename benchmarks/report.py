"""Tables for the README from `benchmarks/results/*.csv`; no figure in them is ever typed.

Each GPU has its own table. Where nothing was measured the README says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.figures import STEP
from benchmarks.results import Measurement, gpus, newest, relative
from train.files import atomic_write

README = ROOT / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks report -->", "<!-- end of figures -->"
NOTHING = "**Not measured on a GPU yet**: `benchmarks/results/` is empty, so there is no figure here."


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


def describe_written(paths: Sequence[Path]) -> str:
    """Names of what was written, for the terminal."""
    return ", ".join(relative(path) for path in paths) or "nothing to draw"

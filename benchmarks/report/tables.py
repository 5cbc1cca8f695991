"""The tables in docs/benchmarks.md, one per GPU, made from `benchmarks/results/*.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.plots import STEP, plots
from benchmarks.report.results import ROOT, Measurement, ResultsError, gpus, newest
from train.common.files import atomic_write

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: python -m benchmarks report -->", "<!-- end of figures -->"
NOTHING = "**Not measured on a GPU yet**: `benchmarks/results/` is empty, so there is no figure here."


def tables(measurements: Sequence[Measurement]) -> str:
    """Returns Markdown tables of each GPU's newest measurements, or a sentence that nothing was measured."""
    found = []
    for gpu in gpus(measurements):
        rows = [m for subject, m in newest(measurements).items() if subject.gpu == gpu and not subject.repeated]
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
            lines.append(
                f"| {op} | {impl}, {mode} | {shape} {dtype} | {m.p50:.3f} | {m.p20:.3f}–{m.p80:.3f} | {floor} | {m.code} |"
            )
        found.append("\n".join(lines))
    return "\n\n".join(found) or NOTHING


def new_page(path: Path, measurements: Sequence[Measurement]) -> str:
    """Returns the text of the page with new tables between the marks `BEGIN` and `END`."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultsError(
            f"{path}: expected the lines {BEGIN!r} and {END!r}, once each and in this order: put them back"
        )
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(measurements)}\n{END}{after}"


def write(measurements: Sequence[Measurement], page: Path, folder: Path) -> list[Path]:
    """Make all tables and plots, then write those that changed. Returns the changed files."""
    made: dict[Path, bytes] = {page: new_page(page, measurements).encode()}
    made |= {folder / name: png for name, png in plots(measurements).items()}
    changed = [path for path, data in made.items() if not path.exists() or path.read_bytes() != data]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, made[path])
    return changed

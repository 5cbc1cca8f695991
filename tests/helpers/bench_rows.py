"""Made-up rows of benchmark results, in files that `benchmarks/report` reads."""

import csv
from pathlib import Path

from benchmarks.report.results import COLUMNS

MADE = "Made GPU"


def row(**changes: object) -> dict[str, object]:
    """A made-up row. The GPU's name is made up too, so that nobody takes the row for a measurement."""
    base = {
        "date": "2026-01-01T00:00:00Z", "commit": "aaaaaaa", "dirty": 0, "gpu": MADE, "op": "op", "impl": "torch", "mode": "eager",
        "shape": "8x8", "dtype": "bf16", "p50": 2.0, "p20": 1.9, "p80": 2.1, "tflops": 3.0, "gbps": 400.0, "floor": 1.0, "n": 50,
    }  # fmt: skip
    return base | changes


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_results(folder: Path) -> Path:
    """Write rows of two commits and two GPUs.

    From the first commit to the second, one operation became faster, one slower, and one stayed the same.
    """
    later = {"date": "2026-02-01T00:00:00Z", "commit": "bbbbbbb"}
    write(
        folder / "a.csv",
        [
            row(), row(op="slow"), row(op="same"), row(impl="triton", p50=1.5, p20=1.4, p80=1.6), row(op="step x", impl="published", gbps=""),
            row(**later, p50=1.0, p20=0.9, p80=1.1), row(**later, op="slow", p50=3.0, p20=2.9, p80=3.1),
            row(**later, op="same", p50=2.05, p20=2.0, p80=2.2), row(**later, op="step x", impl="golf", p50=1.25, p20=1.2, p80=1.3, dirty=1, gbps=""),
        ],
    )  # fmt: skip
    write(folder / "b.csv", [row(gpu="Other GPU", p50=9.0, p20=8.0, p80=9.5)])
    return folder

"""Append rows to `benchmarks/results/<gpu>.csv`, and read and check all rows."""

from __future__ import annotations

import csv
import datetime
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.provenance import ROOT as ROOT
from golf_kernels import tuned
from train.common.errors import UserError

# an installed package has no folder benchmarks/results, so rows go to the user's cache folder
RESULTS = ROOT / "benchmarks" / "results" if (ROOT / "pyproject.toml").is_file() else tuned.folder() / "results"
# p50, p20, p80 and floor are milliseconds per call; n is the number of measurements
COLUMNS = (
    *("date", "commit", "dirty", "gpu", "driver", "cuda", "torch", "triton", "op", "impl", "mode", "shape", "dtype"),
    *("p50", "p20", "p80", "tflops", "gbps", "floor", "rel_err", "n"),
)
DATE = "%Y-%m-%dT%H:%M:%SZ"
# modes that depend only on a call's duration; every other mode says what was measured
TIMINGS = ("eager", "graph")
MERGE_MARKS = ("<<<<<<<", "|||||||", "=======", ">>>>>>>")
Row = dict[str, Any]


class ResultsError(UserError):
    """A results file is damaged."""


class Subject(NamedTuple):
    """What was measured. Only rows with equal subjects are comparable."""

    gpu: str
    op: str
    impl: str
    mode: str
    shape: str
    dtype: str

    @property
    def repeated(self) -> bool:
        """Whether the row is the second measurement of the first variant."""
        return self.impl.endswith(" again")

    def __str__(self) -> str:
        return f"{self.op}, {self.impl}, {self.mode}, {self.shape}, {self.dtype}"


@dataclass(frozen=True)
class Measurement:
    """One row of a results file. Times are in milliseconds; `tflops`, `gbps` and `floor` are 0 if the cell is empty."""

    subject: Subject
    date: str
    commit: str
    dirty: bool
    p50: float
    p20: float
    p80: float
    tflops: float
    gbps: float
    floor: float

    @property
    def code(self) -> str:
        """The commit, with a note on uncommitted changes."""
        return f"{self.commit}{' + changes' * self.dirty}"


def measurement(cells: Mapping[str, str]) -> Measurement:
    """Check the cells of a row and convert them. An error names the field."""
    for name, cell in cells.items():
        if not cell.isprintable():
            raise ResultsError(f"{name}: expected text, found {cell!r}")
    for name in ("commit", *Subject._fields):
        if not cells[name]:
            raise ResultsError(f"{name}: expected a text, found none")
    if not _is_date(cells["date"]):
        raise ResultsError(f"date: expected one such as 2026-01-31T23:59:59Z, found {cells['date']!r}")
    if cells["dirty"] not in ("0", "1"):
        raise ResultsError(f"dirty: expected 0 or 1, found {cells['dirty']!r}")
    p50, p20, p80 = (_number(name, cells[name]) for name in ("p50", "p20", "p80"))
    for name, value, fits in (("p20", p20, 0 < p20 <= p50), ("p50", p50, p50 > 0), ("p80", p80, p80 >= p50)):
        if not fits:
            raise ResultsError(f"{name}: expected 0 < p20 ≤ p50 ≤ p80, found {value:g} in {p20:g}, {p50:g}, {p80:g}")
    tflops, gbps, floor = (_number(name, cells[name] or "0") for name in ("tflops", "gbps", "floor"))
    subject = Subject(*(cells[name] for name in Subject._fields))
    return Measurement(
        subject, cells["date"], cells["commit"], cells["dirty"] == "1", p50, p20, p80, tflops, gbps, floor
    )


def _is_date(text: str) -> bool:
    try:
        # the format is strict because dates are compared as texts
        return datetime.datetime.strptime(text, DATE).strftime(DATE) == text
    except ValueError:
        return False


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ResultsError(f"{name}: expected a number from 0, found {text!r}")
    return value


def read_results(folder: Path = RESULTS) -> list[Measurement]:
    """Read the rows of all GPUs, sorted by date. An error names the file, the line and the field."""
    found = [row for path in sorted(folder.glob("*.csv")) for row in _read_file(path)]
    return sorted(found, key=lambda row: row.date)


def _read_file(path: Path) -> list[Measurement]:
    # keep invalid UTF-8 in its cell, so that the error can name the field
    text = path.read_bytes().decode(errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith(MERGE_MARKS):
            remedy = "keep the rows of both sides and delete the marks"
            raise ResultsError(f"{path}, line {number}: expected a row, found the merge mark {line[:7]!r}: {remedy}")
    reader = csv.reader(io.StringIO(text, newline=""))
    check_columns(path, COLUMNS)
    found: list[Measurement] = []
    line_number = 1
    try:
        for cells in reader:
            if len(cells) not in (0, len(COLUMNS)):
                end = COLUMNS[min(len(cells), len(COLUMNS)) - 1]
                raise ResultsError(
                    f"{end}: expected {len(COLUMNS)} cells, found {len(cells)}: a row was cut off, or two were joined"
                )
            if cells and line_number > 1:
                found.append(measurement(dict(zip(COLUMNS, cells, strict=True))))
            # the line on which the next row begins; a row with an unclosed quotation mark spans several lines
            line_number = reader.line_num + 1
        if not text.endswith("\n"):
            line_number = reader.line_num
            raise ResultsError(f"{COLUMNS[-1]}: expected a line break at the end: the last row may be cut off")
    except (ResultsError, csv.Error) as error:
        raise ResultsError(
            f"{path}, line {line_number}: {error}: mend this line, or delete it and measure again"
        ) from error
    return found


def rows_since(path: Path, date: str) -> bytes:
    """Returns the header and the rows since `date`, as bytes; nothing if there is no such row."""
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    rows = [line for line in lines if re.match(rb"\d{4}-\d", line) and line[:20] >= date.encode()]
    return header + b"".join(rows) if rows else b""


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Check that a file, if it exists, has these columns."""
    if not path.exists():
        return
    with path.open("rb") as file:
        found = file.readline().decode(errors="replace").strip()
    if found != ",".join(columns):
        raise ResultsError(
            f"{path}, line 1: expected the columns {','.join(columns)}, found {found[:200]!r}: move the file away"
        )


def file_stem(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_")


def append_rows(
    rows: Sequence[Row], surroundings: Row, folder: Path = RESULTS, *, columns: Sequence[str] = COLUMNS
) -> Path | None:
    """Check rows and append them to the GPU's file. Returns the file, or None for a CPU, whose rows are not stored."""
    if surroundings["gpu"] == "cpu":
        return None
    path = folder / f"{file_stem(surroundings['gpu'])}.csv"
    check_columns(path, columns)
    folder.mkdir(parents=True, exist_ok=True)
    made = io.StringIO()
    writer = csv.DictWriter(made, columns, restval="")
    for row in rows:
        cells = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in (surroundings | row).items()}
        if tuple(columns) == COLUMNS:
            measurement(dict.fromkeys(COLUMNS, "") | cells)
        writer.writerow(cells)
    with path.open("a+b") as file:
        # an earlier write may have been cut off: end its line first
        size = file.seek(0, os.SEEK_END)
        torn = size and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
        head = "\r\n" if torn else "" if size else ",".join(columns) + "\r\n"
        # a single write, so that a killed process does not leave half of the rows
        file.write((head + made.getvalue()).encode())
    return path


def gpus(measurements: Iterable[Measurement]) -> list[str]:
    return sorted({measurement.subject.gpu for measurement in measurements})


def newest(measurements: Iterable[Measurement]) -> dict[Subject, Measurement]:
    """Returns subject → its last row. The rows must be sorted by date.

    The modes eager and graph count as one subject, because a call's duration decides between them.
    """
    rows: dict[Subject, Measurement] = {}
    for row in measurements:
        timing = row.subject.mode in TIMINGS
        rows[row.subject._replace(mode="") if timing else row.subject] = row
    return {last.subject: last for last in rows.values()}


def codes_by_age(rows: Iterable[Measurement]) -> list[str]:
    """Returns each `Measurement.code` once, in the order of the rows."""
    return list(dict.fromkeys(row.code for row in rows))


def relative(path: Path) -> str:
    """Returns the path as text, relative to the project's root if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

"""Reading `benchmarks/results/*.csv`: rows by GPU, never mixed, and how far two measurements of one thing are apart."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import COLUMNS, RESULTS, ROOT


class ResultsError(Exception):
    """A results file cannot be read, or does not hold what was asked for."""


class Subject(NamedTuple):
    """What was measured: two rows are comparable only where all of it is equal."""

    gpu: str
    op: str
    impl: str
    mode: str
    shape: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}, {self.impl}, {self.mode}, {self.shape}, {self.dtype}"


@dataclass(frozen=True)
class Measurement:
    """One row.

    Attributes:
        subject: what was measured.
        date: ISO 8601, UTC.
        commit: abbreviated commit of the code.
        dirty: whether the code differed from the commit.
        p50: milliseconds, the median.
        p20: milliseconds.
        p80: milliseconds.
        tflops: arithmetic rate, 10¹² per second; 0 where not given.
        gbps: traffic rate, 10⁹ bytes per second; 0 where not given.
        floor: computed milliseconds that nothing on that GPU can undercut; 0 where not given.
    """

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


def read_results(folder: Path = RESULTS) -> list[Measurement]:
    """All rows of all GPUs, by date.

    Raises:
        ResultsError: a file has other columns, or a cell is no number.
    """
    found: list[Measurement] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ResultsError(f"{path}: expected the columns {', '.join(COLUMNS)}")
            for row in reader:
                try:
                    numbers = [float(row[name] or 0) for name in ("p50", "p20", "p80", "tflops", "gbps", "floor")]
                except (TypeError, ValueError) as error:
                    raise ResultsError(f"{path}, line {reader.line_num}: {error}") from error
                subject = Subject(*(row[name] for name in Subject._fields))
                found.append(Measurement(subject, row["date"], row["commit"], row["dirty"] == "1", *numbers))
    return sorted(found, key=lambda measurement: measurement.date)


def gpus(measurements: Iterable[Measurement]) -> list[str]:
    """The GPUs measured on, by name."""
    return sorted({measurement.subject.gpu for measurement in measurements})


def newest(measurements: Iterable[Measurement]) -> dict[Subject, Measurement]:
    """The last measurement of each subject."""
    return {measurement.subject: measurement for measurement in measurements}


class Change(NamedTuple):
    """A subject before and after.

    Attributes:
        before: the earlier measurement.
        after: the later one.
    """

    before: Measurement
    after: Measurement

    @property
    def ratio(self) -> float:
        """After over before, of the medians."""
        return self.after.p50 / self.before.p50

    @property
    def beyond_spread(self) -> bool:
        """Whether the ranges from p20 to p80 do not touch."""
        return self.after.p20 > self.before.p80 or self.after.p80 < self.before.p20


def compare(measurements: Sequence[Measurement], revision: str) -> list[Change]:
    """The newest measurement of each subject against the last one at a commit, on the same GPU.

    Raises:
        ResultsError: nothing was measured at that commit, or nothing since.
    """
    known = sorted({measurement.commit for measurement in measurements})
    at = [m for m in measurements if m.commit and (m.commit.startswith(revision) or revision.startswith(m.commit))]
    if not at:
        raise ResultsError(
            f"{revision}: nothing was measured at this commit; there are: {', '.join(known) or 'none at all'}"
        )
    earlier = newest(at)
    commit = at[0].commit
    later = newest(m for m in measurements if m.commit != commit and m.date >= min(b.date for b in earlier.values()))
    changes = [Change(before, later[subject]) for subject, before in earlier.items() if subject in later]
    if not changes:
        raise ResultsError(f"{revision}: nothing that was measured there was measured again since")
    return changes


def relative(path: Path) -> str:
    """A path as people read it: from the project's root where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

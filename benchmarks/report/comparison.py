"""Compares the measurements of two commits on the same GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.report.provenance import full_names, named
from benchmarks.report.results import Measurement, ResultsError, Subject, latest


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
        """Whether the ranges from p20 to p80 are disjoint."""
        return self.after.p20 > self.before.p80 or self.after.p80 < self.before.p20


def compare(measurements: Sequence[Measurement], revision: str) -> list[Change]:
    """Compare the latest measurement of each subject with the last one at a commit, on the same GPU.

    Rows with uncommitted changes are never a baseline; they can be compared with one of the same or an earlier commit.

    Args:
        measurements: rows by date.
        revision: a commit as in the results, its beginning, or any revision that git knows.

    Raises:
        ResultsError: the revision is unknown or ambiguous, nothing was measured at it, or nothing since.
    """
    commits = find_commits({m.commit for m in measurements}, revision)
    rows: dict[Subject, list[Measurement]] = {}
    for m in measurements:
        if not m.subject.repeated:
            rows.setdefault(m.subject, []).append(m)
    changes = []
    measured = False
    for own in rows.values():
        clean = [m for m in own if m.commit in commits and not m.dirty]
        measured |= bool(clean)
        since = [m for m in own if clean and m.is_later(clean[-1])]
        if since:
            changes.append(Change(clean[-1], latest(since)))
    if not measured:
        raise ResultsError(
            f"{revision}: measured only with uncommitted changes, which are no baseline: measure the commit itself"
        )
    if not changes:
        raise ResultsError(f"{revision}: nothing measured there was measured again since")
    return changes


def find_commits(known: Iterable[str], revision: str) -> set[str]:
    """The abbreviations of a revision's commit in the rows.

    Raises:
        ResultsError: the revision fits no commit of the rows, or several.
    """
    known = sorted(known)
    name = named(revision) if revision.strip() else ""
    full = full_names(known)
    fits = {commit for commit in known if name and full.get(commit, commit) == name}
    if revision.strip():
        typed = revision.lower()
        fits |= {commit for commit in known if commit.startswith(typed) or full.get(commit, "").startswith(typed)}
        # a full hash, without git
        fits |= {commit for commit in known if typed.startswith(commit)}
    if not fits:
        meant = f"{revision!r}, {name[:12]}" if name else repr(revision)
        there = ", ".join(known) or "none at all"
        raise ResultsError(f"{meant}: expected a commit at which something was measured; there are: {there}")
    if len({full.get(commit, commit) for commit in fits}) > 1:
        raise ResultsError(f"{revision!r}: expected one commit, this fits {', '.join(sorted(fits))}: type more of it")
    return fits

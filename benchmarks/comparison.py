"""How far two measurements of one thing are apart, on one GPU and at two commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.results import Measurement, ResultsError, newest


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

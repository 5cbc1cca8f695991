"""One of a thing is not several."""

import pytest
from submission_example import make_summary

from train.common.wording import counted, duration
from train.submission.summary import summary_text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, "shard"), "0 shards"),
        ((1, "shard"), "1 shard"),
        ((2, "shard"), "2 shards"),
        ((1, "matrix", "matrices"), "1 matrix"),
        ((1234567, "matrix", "matrices"), "1,234,567 matrices"),
    ],
)
def test_numbers_and_nouns_agree(given: tuple[int, str], said: str) -> None:
    assert counted(*given) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (1200, "20 min"), (12000, "3 h 20 min"),
        (float("inf"), "unknown time"),
    ],
)  # fmt: skip
def test_times_to_wait(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_run_of_one_step_says_so() -> None:
    assert "  training   1 step, " in summary_text(make_summary(steps=1))

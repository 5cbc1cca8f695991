"""The estimate on paper of what ranks exchange."""

from pathlib import Path

import pytest

from benchmarks.computed import overlap
from benchmarks.computed.communication import bucket_bytes, exchanged_bytes, main, table
from benchmarks.computed.overlap import Start, hidden_ms
from train.common.errors import UserError
from train.recipes import load_recipe

README = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"


def test_the_readme_holds_what_is_computed() -> None:
    assert table() in README.read_text()


def test_the_bytes_are_those_of_the_collectives_formulas() -> None:
    # 8 ranks, 54 matrices of the baseline in float32: 7/8 of at least all 16,515,072 elements, twice
    sent = exchanged_bytes(load_recipe("baseline").config())
    assert sent["reduce-scatter of matrices"] == sent["all-gather of matrices"]
    assert 7 / 8 * 16_515_072 * 4 <= sent["all-gather of matrices"] < 1.15 * 7 / 8 * 16_515_072 * 4
    assert sent["all-reduce of the rest"] == pytest.approx(2 * 7 / 8 * (17_059_912 - 16_515_072) * 4)


def test_a_bucket_has_room_for_one_of_the_largest_matrices_per_rank() -> None:
    # three buckets without padding, of eight blocks whose matrices are as much as 24 of 1536 x 512
    assert bucket_bytes(load_recipe("sp2048_normuon").config()) == [7 * 1536 * 512 * 4] * 3
    whole = 7 / 8 * 31_752_192 * 4
    assert whole < sum(bucket_bytes(load_recipe("sp8192_sdclip").config())) < 1.25 * whole


def test_what_is_left_of_the_pass_hides_a_transfer_and_the_link_carries_one_at_a_time() -> None:
    starts = [Start((3,), 10.0, 10.0), Start((2,), 11.0, 9.0), Start((1,), 19.0, 1.0), Start((0,), 20.0, 0.0)]
    # the second begins when the first has gone, the third is cut by the end of the pass
    assert hidden_ms(starts, [4.0, 2.0, 3.0, 1.0]) == [4.0, 2.0, 1.0, 0.0]
    assert hidden_ms(starts, [9.5, 2.0, 3.0, 1.0]) == [9.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("way", ["published", "torch+pdl", "foo"])
def test_a_way_without_starts_is_refused(way: str) -> None:
    with pytest.raises(UserError, match=f"way.*{way.replace('+', '.')}"):
        overlap.main(["--way", way])


def test_it_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["--recipe", "baseline"])
    assert "error: unrecognized arguments: --recipe baseline" in capsys.readouterr().err

"""The estimate on paper of what ranks exchange."""

from pathlib import Path

import pytest

from benchmarks.computed.communication import exchanged_bytes, main, table
from train.recipes import load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def test_the_page_holds_what_is_computed() -> None:
    assert table() in PAGE.read_text()


def test_the_bytes_are_those_of_the_collectives_formulas() -> None:
    # 8 ranks, 54 matrices of the baseline in float32: 7/8 of at least all 16,515,072 elements, twice
    sent = exchanged_bytes(load_recipe("baseline").config())
    assert sent["reduce-scatter of matrices"] == sent["all-gather of matrices"]
    assert 7 / 8 * 16_515_072 * 4 <= sent["all-gather of matrices"] < 1.15 * 7 / 8 * 16_515_072 * 4
    assert sent["all-reduce of the rest"] == pytest.approx(2 * 7 / 8 * (17_059_912 - 16_515_072) * 4)


def test_it_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["--recipe", "baseline"])
    assert "error: unrecognized arguments: --recipe baseline" in capsys.readouterr().err

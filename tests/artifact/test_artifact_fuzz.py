"""What fuzzing found is read again: every input gives a result or a `UserError`, and the seeds are understood."""

import base64
import tracemalloc
from pathlib import Path

import fuzz_artifact
import pytest

from train.artifact import container

LINES = (Path(__file__).resolve().parents[1] / "helpers" / "fuzz_artifact_corpus.txt").read_text().split()


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    # one_input lowers the bound; afterwards it must be the published one again
    monkeypatch.setattr(container, "MAX_UNPACKED_BYTES", container.MAX_UNPACKED_BYTES)


@pytest.mark.parametrize("index", range(len(LINES)))
def test_an_input_of_the_corpus_is_read_or_refused(index: int, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        fuzz_artifact.one_input(base64.b64decode(LINES[index]), tmp_path / "input.golf")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_the_fuzz_files_reach_every_codec_and_both_containers() -> None:
    inputs = [base64.b64decode(line) for line in LINES]
    assert {data[0] for data in inputs if data} >= {0, 1, 2}
    assert {data[1] % len(container.CODECS) for data in inputs if data[:1] == b"\2" and len(data) > 3} == set(
        range(len(container.CODECS))
    )


def test_seeds_are_understood(tmp_path: Path) -> None:
    seeds = fuzz_artifact.seeds()
    accepted = [fuzz_artifact.one_input(data, tmp_path / "input.golf") for data in seeds]
    for data, good in zip(seeds, accepted, strict=True):
        assert good or data[0] < 2
    # one holds a whole model; the others are refused only because theirs is not whole
    assert sum(good for data, good in zip(seeds, accepted, strict=True) if data[0] < 2) == 2

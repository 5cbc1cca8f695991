"""Pruning of codes ±1 against a plain sort, and the search for how many must go."""

import zlib

import pytest
import torch

from train.artifact.budget import ArtifactInfo
from train.artifact.pruning import count_ones, prune_ones, prunes_needed, warn_of_large_part
from train.artifact.storage import EncodedArtifact
from train.quantize.tensors import QuantizedTensor, StoredTensors


@pytest.fixture
def tensors() -> StoredTensors:
    draw = torch.Generator().manual_seed(0)

    def coded(rows: int, columns: int, bits: int) -> QuantizedTensor:
        codes = torch.randn(rows, columns, generator=draw).mul(1.5).round().clamp(-31, 31).to(torch.int8)
        # few different scales, so that ties are decided too
        scales = torch.randint(1, 4, (rows,), generator=draw).to(torch.float16) / 32
        return QuantizedTensor(codes, scales, bits)

    return {
        "a": coded(7, 11, 6),
        "half": torch.ones(3, dtype=torch.float16),
        "table": coded(5, 5, 8),
        "b": coded(9, 6, 6),
    }


def by_sorting(tensors: StoredTensors, count: int) -> dict[str, torch.Tensor]:
    """One entry after the other in the order of scale²."""
    entries = [
        (float(tensors[name].scales[row]) ** 2, place, name, row, column)
        for place, (name, row, column) in enumerate(
            (name, row, column)
            for name in ("a", "table", "b")
            for row in range(tensors[name].codes.shape[0])
            for column in range(tensors[name].codes.shape[1])
        )
        if abs(int(tensors[name].codes[row, column])) == 1
    ]
    codes = {name: tensors[name].codes.clone() for name in ("a", "table", "b")}
    for *_, name, row, column in sorted(entries)[:count]:
        codes[name][row, column] = 0
    return codes


@pytest.mark.parametrize("count", [0, 1, 2, 13, 29, 10_000])
def test_the_smallest_rows_go_first(tensors: StoredTensors, count: int) -> None:
    untouched = {name: getattr(tensor, "codes", tensor).clone() for name, tensor in tensors.items()}
    pruned = prune_ones(tensors, count)
    for name, codes in by_sorting(tensors, count).items():
        assert torch.equal(pruned[name].codes, codes)
        assert torch.equal(pruned[name].scales, tensors[name].scales) and pruned[name].bits == tensors[name].bits
    assert pruned["half"] is tensors["half"]
    assert list(pruned) == list(tensors)
    assert all(torch.equal(getattr(tensors[name], "codes", tensors[name]), codes) for name, codes in untouched.items())
    assert count_ones(pruned) == max(count_ones(tensors) - count, 0)


def test_pruning_more_than_a_tenth_of_all_codes_gives_a_warning(tensors: StoredTensors) -> None:
    # 77 + 25 + 54 codes
    for count, warning in ((15, ""), (16, "10 %"), (78, "50 %")):
        notes: list[str] = []
        warn_of_large_part(tensors, count, notes.append)
        assert len(notes) == bool(warning) and all(f"sets {warning} of all codes to 0" in line for line in notes)
    warn_of_large_part({"half": torch.ones(2)}, 0, pytest.fail)


def test_nothing_to_prune_is_no_error() -> None:
    assert prune_ones({"half": torch.ones(2)}, 5).keys() == {"half"}
    assert count_ones({}) == 0


def encode(tensors: StoredTensors) -> EncodedArtifact:
    """An encoder's stand-in: zlib over the codes."""
    coded = [tensor for tensor in tensors.values() if isinstance(tensor, QuantizedTensor)]
    data = b"".join(zlib.compress(tensor.codes.numpy().tobytes(), 9) for tensor in coded)
    return EncodedArtifact(data, ArtifactInfo(1, len(data), 0, 0, (), len(tensors)))


def test_the_search_finds_what_just_fits_and_returns_its_bytes(tensors: StoredTensors) -> None:
    encoded = [encode(prune_ones(tensors, count)).data for count in range(count_ones(tensors) + 1)]
    target = (len(encoded[0]) + len(encoded[-1])) // 2
    notes: list[str] = []
    count, found = prunes_needed(tensors, target, encode, note=notes.append)
    # a line per attempt, the first with every code ±1 pruned
    assert notes[0].startswith(
        f"prune:tried {len(encoded) - 1} codes ±1: model of {len(encoded[-1])} bytes, at most {target} fit, "
    )
    assert any(line.startswith(f"prune:tried {count} codes ±1: model of {len(found.data)} bytes") for line in notes[1:])
    assert 0 < count < len(encoded) - 1
    assert len(encoded[count]) <= target < len(encoded[count - 1])
    assert found.data == encoded[count]


def test_a_model_that_fits_is_left_alone_and_one_that_cannot_loses_all(tensors: StoredTensors) -> None:
    whole, total = encode(tensors), count_ones(tensors)
    assert prunes_needed(tensors, len(whole.data), encode) == (0, whole)
    count, smallest = prunes_needed(tensors, 1, encode, whole)
    assert (count, smallest.data) == (total, encode(prune_ones(tensors, total)).data)


@pytest.mark.parametrize("known", [False, True])
def test_the_search_encodes_few_times_on_a_large_model(known: bool) -> None:
    codes = torch.randint(-1, 2, (256, 1024), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    tensors: StoredTensors = {"a": QuantizedTensor(codes, torch.rand(256).half() + 0.1, 6)}
    probes: list[int] = []

    def size_alone(pruned: StoredTensors) -> EncodedArtifact:
        probes.append(int((pruned["a"].codes != 0).sum()))
        return EncodedArtifact(bytes(probes[-1]), ArtifactInfo(1, probes[-1], 0, 0, (), 1))

    total = count_ones(tensors)
    count, found = prunes_needed(tensors, total // 3, size_alone, size_alone(tensors) if known else None)
    assert 0 <= count - (total - total // 3) < total / 4096 + 1
    assert len(found.data) == total - count
    assert len(probes) <= 2 + 13

"""Files of tensors: whole or absent, and every flipped byte noticed."""

from pathlib import Path

import pytest
import torch

from train.checkpoint import read_tensors, write_tensors
from train.common.errors import UserError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    write_tensors(path, {"a": torch.arange(1000.0), "b": torch.full((3, 5), 7, dtype=torch.bfloat16), "step": 3})
    return path


def test_tensors_come_back_as_they_were(written: Path) -> None:
    found = read_tensors(written)
    assert torch.equal(found["a"], torch.arange(1000.0))
    assert found["b"].dtype == torch.bfloat16 and bool((found["b"] == 7).all())
    assert found["step"] == 3


def test_a_flipped_byte_of_a_tensor_is_noticed(written: Path) -> None:
    data = bytearray(written.read_bytes())
    place = data.find(torch.tensor(500.0).numpy().tobytes())
    assert place > 0
    data[place + 1] ^= 1
    written.write_bytes(data)
    with pytest.raises(UserError, match=r"weights\.pt: damaged .*checksum"):
        read_tensors(written)


@pytest.mark.parametrize("kept", [0, 1, 100, 3000, -1])
def test_a_truncated_file_is_noticed(written: Path, kept: int) -> None:
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"weights\.pt: damaged"):
        read_tensors(written)


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="damaged or not written by this program"):
        read_tensors(tmp_path)

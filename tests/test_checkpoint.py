"""Files of tensors: whole or absent, and every flipped byte noticed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_training import Training, narrow_recipe, write_tokens

from train.checkpoint import Reached, load_checkpoint, read_tensors, save_checkpoint, write_tensors
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.evaluate.scores import EvalResult

SCORE = {"val_loss": 6.9, "val_bpb": 3.0, "tokens": 10, "bytes": 20, "windows": 1, "seconds": 0.1}


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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path]:
    """A short training, and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    training = Training.begin(narrow_recipe("sp8192_sdclip", write_tokens(folder)))
    training.run(2)
    save_checkpoint(folder / "checkpoint.pt", training.parts, Ranks(), Reached(2, 1.5, SCORE, 1))
    return training, folder / "checkpoint.pt"


MUON, ADAMW = (("optimizers", kind) for kind in ("muon", "adamw"))
QUERY, VECTOR = "blocks.0.attention.query", "blocks.0.attn_scale"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("step",), value) for value in ("x", -1, 1.5, 3, None, torch.zeros(3))),
        *((("seconds",), value) for value in ("x", -1.0, math.nan, math.inf, None)),
        *((("first",), value) for value in ([], {}, {"val_loss": 1.0})),
        *((("first", "val_loss"), value) for value in ("x", math.nan)),
        *((("world_size",), value) for value in ("x", 0)),
        *((("parts", name), value) for name in ("model", "optimizers", "loader", "average") for value in ([], {}, None, 3)),
        *((("parts", "model", VECTOR), value) for value in (3, torch.zeros(2), torch.full((64,), math.nan))),
        *((("parts", *MUON, *rest), None) for rest in ((), (QUERY,), (QUERY, "momentum_buffer"))),
        *((("parts", *MUON, QUERY), value) for value in ({}, {"momentum": torch.zeros(64, 64)})),
        (("parts", *MUON, QUERY, "momentum_buffer"), torch.zeros(64, 1)),
        (("parts", *ADAMW, VECTOR, "exp_avg"), torch.zeros(())),
        (("parts", *ADAMW, VECTOR, "exp_avg"), torch.full((64,), math.inf)),
        *((("parts", "loader", "step"), value) for value in ("x", -4, 3)),
        *((("parts", "loader", name), value) for name in ("walks", "random") for value in ([[1]], 5)),
        *((("parts", "average", "average", VECTOR), value) for value in (None, "x", torch.zeros(0))),
    ],
)  # fmt: skip
def test_a_checkpoint_of_the_right_form_with_a_wrong_value_is_named(
    run: tuple[Training, Path], tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    training, whole = run
    saved: Any = read_tensors(whole)
    inner = saved
    for key in place[:-1]:
        inner = inner[key]
    assert place[-1] in inner
    inner[place[-1]] = value
    write_tensors(tmp_path / "checkpoint.pt", saved)
    with pytest.raises(UserError, match="checkpoint"):
        EvalResult.read(load_checkpoint(tmp_path / "checkpoint.pt", training.parts, Ranks(), 20).first, "checkpoint")


def test_a_checkpoint_beyond_the_last_step_stays_of_use(run: tuple[Training, Path]) -> None:
    with pytest.raises(UserError, match=r"is at step 2, but iterations is 1: set ITERATIONS to at least 2$"):
        load_checkpoint(run[1], run[0].parts, Ranks(), 1)
    assert load_checkpoint(run[1], run[0].parts, Ranks(), 2).step == 2


@pytest.mark.parametrize(
    "load", [read_tensors, lambda path: load_checkpoint(path, {"model": torch.nn.Linear(1, 1)}, Ranks(), 20)]
)
def test_a_full_memory_is_no_damage(
    run: tuple[Training, Path], monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], object]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.checkpoint.torch.load", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(run[1])

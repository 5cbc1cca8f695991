"""The data of a run is opened once, however many of its stages read it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_runs import small

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.data.dataset import Dataset, prepare_data, start_compressors
from train.data.manifest import read_manifest
from train.data.shards import find_shards
from train.pipeline import run_pipeline
from train.recipes import load_recipe


def test_a_whole_run_opens_every_shard_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    memmap = np.memmap

    def counted(path: Path, *arguments: Any, **named: Any) -> np.memmap:
        opened[Path(path).name] += 1
        return memmap(path, *arguments, **named)

    monkeypatch.setattr("train.data.shards.np.memmap", counted)
    monkeypatch.setattr("train.artifact.fit_to_target.FIT_TOKENS", 1 << 11)
    # warm-up, training, calibration and the search for row clips read batches; four validations and two scores the text
    folder = run_pipeline(small(dataset, tmp_path, iterations=2, val_loss_every=1, target_bytes=10_000_000))
    log = next(folder.path.glob("train_seed*.log")).read_text()
    assert "gptq:calibrated" in log and "fit:measured on" in log and "final_int6_sliding_window_exact" in log
    shards = [path.name for split in ("train", "val") for path in find_shards(dataset, split)]
    assert len(shards) >= 2 and opened == dict.fromkeys(shards, 1)


def test_the_comparison_is_measured_beside_the_training(dataset: Path, tmp_path: Path) -> None:
    measured = read_manifest(dataset).yardsticks
    assert set(measured) == {"gzip -9", "xz -9"}
    assert start_compressors(small(dataset, tmp_path, corpus="stdlib")) is None
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "yardsticks": {}}))
    # of a text that the run did not build, the user decides
    assert start_compressors(small(copy, tmp_path)) is None
    assert start_compressors(small(copy, tmp_path, corpus="stdlib")).wait() == 0
    assert json.loads((copy / "manifest.json").read_text()) == manifest


def test_loaders_share_the_shards_and_have_positions_of_their_own(dataset: Path, tmp_path: Path) -> None:
    data = Dataset(small(dataset, tmp_path))
    first, second = data.loader(Ranks()), data.loader(Ranks())
    begin = [inputs.tolist() for inputs, _ in first.next_batch()]
    assert [inputs.tolist() for inputs, _ in first.next_batch()] != begin
    assert [inputs.tolist() for inputs, _ in second.next_batch()] == begin
    assert first.order.shards is second.order.shards


def test_what_is_not_asked_for_is_not_read(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for path in dataset.iterdir():
        if "_train_" not in path.name:
            (tmp_path / "text" / path.name).symlink_to(path)
    # a score needs no training shards
    assert len(Dataset(small(tmp_path / "text", tmp_path)).validation.tokens) > 2048


def test_a_misspelt_folder_is_never_replaced_by_the_recipe_s_text(tmp_path: Path) -> None:
    (tmp_path / "books_1024").mkdir()
    config = load_recipe("quickstart").config(data_path=str(tmp_path / "boks_1024"))
    with pytest.raises(UserError, match=r"boks_1024 does not exist; did you mean .*/books_1024\?: make it with"):
        prepare_data(config, Ranks())
    assert [path.name for path in tmp_path.iterdir()] == ["books_1024"]


def test_a_missing_variant_is_named() -> None:
    name = "sp8192_lossless_caps_caseops_v1_reserved"
    config = load_recipe("baseline").config(data_path=f"none/fineweb10B_{name}")
    with pytest.raises(UserError, match=rf"train\.data fineweb --variant {name} \(its"):
        prepare_data(config, Ranks())


def test_the_recipe_s_own_folder_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built: list[tuple[Path, int]] = []
    monkeypatch.setattr("train.data.build.build_stdlib", lambda *given: built.append(given))
    prepare_data(load_recipe("quickstart").config(), Ranks())
    assert built == [(Path("data/stdlib_1024"), 1024)]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("yardsticks",), value) for value in ("x", [1], None, {"gzip": "x"}, {"gzip": float("nan")})),
        (("val", "normalized_bytes"), "x"), (("train", "tokens"), 1.5), (("tokenizer_sha256",), 3), (("name",), []),
    ],
)  # fmt: skip
def test_a_manifest_with_a_value_of_another_type_is_refused_at_the_start(
    dataset: Path, tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (manifest if len(place) == 1 else manifest[place[0]])[place[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"not a dataset's manifest.*{place[-1]}"):
        Dataset(small(copy, tmp_path)).check()


def test_a_pipe_for_a_manifest_is_not_taken_for_none(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: is a device or a pipe"):
        read_manifest(copy)

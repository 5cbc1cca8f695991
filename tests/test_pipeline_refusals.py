"""What the pipeline refuses before it makes anything, and how it says so."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from pipeline_runs import command, flags, small

from train.__main__ import main
from train.common.errors import UserError
from train.data.build import build_dataset
from train.data.corpus import stdlib_documents
from train.data.validation import load_validation
from train.pipeline import preflight, run_pipeline
from train.recipes import load_recipe


def test_a_tokenizer_of_the_same_size_that_made_no_shard_is_refused(dataset: Path, tmp_path: Path) -> None:
    documents = [document for document, _ in zip(stdlib_documents(), range(60), strict=False)][40:]
    build_dataset(documents[1:], documents[:1], tmp_path / "other", 512)
    (other,) = (tmp_path / "other").glob("*.model")
    with pytest.raises(UserError, match=r"not the tokenizer that made the shards.*text_512_bpe\.model"):
        run_pipeline(small(dataset, tmp_path / "runs", tokenizer_path=str(other)))
    shutil.copyfile(next(dataset.glob("*.model")), tmp_path / "same.model")
    load_validation(small(dataset, tmp_path, tokenizer_path=str(tmp_path / "same.model")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("run_id", "said"),
    [("a\nb", "expected the name of a folder"), ("x" * 300, "File name too long: choose another path")],
)
def test_a_name_that_no_folder_has_is_refused(dataset: Path, tmp_path: Path, run_id: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_pipeline(small(dataset, tmp_path / "runs", run_id=run_id))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_missing_dataset_says_how_to_make_it(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python -m train\.data"):
        run_pipeline(small(tmp_path / "none", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_does_not_match_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="512"):
        run_pipeline(small(dataset, tmp_path, vocab_size=1024))


@pytest.mark.parametrize("world_size", ["3", "16"])
def test_a_world_size_that_does_not_divide_8_is_refused(
    world_size: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": world_size, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"WORLD_SIZE: {world_size} processes"):
        run_pipeline(small(dataset, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("CODEC=broli", "codec"),
        ("EMBED_BITS=12", "embed_bits"),
        ("EVAL_STRIDE=5000", "eval_stride"),
        ("BIGRAM_VOCAB_SIZE=1", "bigram_vocab_size"),
        ("TRAIN_BATCH_TOKENS=256", "train_batch_tokens"),
        ("MUON_COEFFICIENTS=nope", "muon_coefficients"),
        ("MUON_COEFFICIENTS=aol", "muon_backend_steps"),
        ("GOLF_BACKEND=bogus", "GOLF_BACKEND"),
        ("RESUME=auto", "RUN_ID"),
    ],
)
def test_bad_settings_end_before_anything_is_made(
    setting: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*setting.split("="))
    monkeypatch.setattr(
        sys, "argv", ["train", "--runs_dir", str(tmp_path / "runs"), "--data_path", str(tmp_path / "data")]
    )
    with pytest.raises(UserError, match=said):
        main()
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_only_the_record_wants_is_missed_before_training(dataset: Path, tmp_path: Path) -> None:
    libraries, runs = tmp_path / "libraries", tmp_path / "runs"
    libraries.mkdir()
    (libraries / "matplotlib.py").write_text("raise ModuleNotFoundError('none', name='matplotlib')\n")
    result = command("train", *flags(small(dataset, runs)), PYTHONPATH=str(libraries))
    assert result.returncode == 2, result.stderr
    assert "\nerror: matplotlib is not installed: pip install matplotlib" in result.stderr
    assert not runs.exists()


@pytest.mark.parametrize("backends", ["newton_schulz=triton", "torch,newton_schulz=triton,muon_step=triton"])
def test_a_backend_forced_for_a_gpu_passes_the_check_before_a_run(
    backends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = load_recipe("quickstart").config(golf_backend=backends)
    preflight(config)
    capability = (7, 5)
    with pytest.raises(UserError, match=r"GOLF_BACKEND forces triton .* this GPU has 7\.5"):
        preflight(config)


def test_bad_data_leaves_no_run_folder(dataset: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(dataset, tmp_path / "data")
    shard = next(broken.glob("*_val_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=shard.name):
        run_pipeline(small(broken, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_graph_without_a_gpu_leaves_no_run_folder(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optimizer_graph: on needs a CUDA GPU"):
        run_pipeline(small(dataset, tmp_path / "runs", optimizer_graph="on"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("limit", [{"max_artifact_bytes": 5000}, {"target_bytes": 5000}, {"target_mb": 0.001}])
def test_a_limit_below_the_code_is_found_before_training(
    dataset: Path, tmp_path: Path, limit: dict[str, float]
) -> None:
    (name,) = limit
    with pytest.raises(
        UserError, match=f"{name}: code and paid prefix alone take [0-9,]+ bytes, expected fewer than .* raise"
    ):
        run_pipeline(small(dataset, tmp_path / "runs", **limit))
    assert not (tmp_path / "runs").exists()

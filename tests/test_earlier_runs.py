"""A run folder and its artifact as 0af82ef wrote them: today's code reads the same settings, scores, weights and bytes.

Made there by a quickstart of 4 steps with vocab_size 352, 2 layers of width 8, quantizer rtn and codec ans; the digests were
computed there, too.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from pipeline_runs import command
from torch import Tensor

from train.artifact.storage import load_model, read_artifact
from train.checkpoint import load_weights, read_tensors
from train.common.retired import RETIRED
from train.evaluate.scores import find_evaluation
from train.quantize.tensors import dequantize_state
from train.run.folder import RunFolder
from train.submission.record import summarize

RUN = Path(__file__).parent / "fixtures/run_0af82ef"
WEIGHTS = "731598c789c209586c90b5794d401a7ea60514cf978b99c7449d85a49d3bf900"
DEQUANTIZED = "e814cad7e76ea0573613a5a542d672e80577d8a3a31eb6b974e3df4d1f5c2e98"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(RUN, tmp_path / "run")))


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].float().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_settings_are_the_same(folder: RunFolder) -> None:
    written = json.loads((RUN / "config.json").read_text())
    del written["crc32"]
    read = folder.read_config().to_dict()
    assert {name: read[name] for name in written if name not in RETIRED} == {
        name: value for name, value in written.items() if name not in RETIRED
    }
    assert read["model_dim"] == 8 and folder.trained_config().recur_layers == (0,)


def test_scores_are_found_and_summed_up(folder: RunFolder) -> None:
    written = json.loads((RUN / "summary.json").read_text())
    assert find_evaluation(folder, folder.read_config())["val_bpb"] == written["val_bpb"]
    summary = summarize(folder)
    assert (summary.val_bpb, summary.bytes_model, summary.steps) == (
        written["val_bpb"], written["bytes_model"], written["steps"],
    )  # fmt: skip


def test_weights_and_dequantized_tensors_are_the_same(folder: RunFolder) -> None:
    assert digest(read_tensors(folder.weights)) == WEIGHTS
    trained = dict(load_weights(folder).named_parameters())
    assert all(torch.equal(trained[name], saved) for name, saved in read_tensors(folder.weights).items())
    tensors = dequantize_state(read_artifact(folder.artifact).tensors)
    assert digest(tensors) == DEQUANTIZED
    loaded = dict(load_model(folder.artifact).named_parameters())
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in tensors.items())


def test_its_weights_make_the_same_artifact(folder: RunFolder, tmp_path: Path) -> None:
    result = command("train.quantize", folder.path, "--out", tmp_path / "again.golf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.golf").read_bytes() == (RUN / "model.golf").read_bytes()

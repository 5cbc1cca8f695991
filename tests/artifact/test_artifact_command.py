"""The command line of artifacts: inspect, verify, diff and convert."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifact_example import ROOMY, assert_same, quantized, tiny

from train.artifact.__main__ import main
from train.artifact.codecs import CODECS
from train.artifact.storage import read_artifact, write_artifact
from train.common.errors import UserError
from train.quantize.tensors import QuantizedTensor, StoredTensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tensors() -> StoredTensors:
    return quantized(tiny())


@pytest.fixture
def file(tmp_path: Path, tensors: StoredTensors) -> Path:
    path = tmp_path / "model.golf"
    write_artifact(path, tensors, tiny(), **ROOMY)
    return path


def test_inspect_and_verify(file: Path, tensors: StoredTensors, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = sum(tensor.shape.numel() for tensor in tensors.values())
    main(["inspect", str(file)])
    text = capsys.readouterr().out
    assert "blocks.*.mlp.up" in text and f"{file.stat().st_size:,}" in text and f"{parameters:,} parameters" in text
    main(["inspect", "--json", str(file)])
    report = json.loads(capsys.readouterr().out)
    assert sum(group["packed_bytes"] for group in report["groups"]) == report["model_bytes"] == file.stat().st_size
    up = next(group for group in report["groups"] if group["group"] == "blocks.*.mlp.up")
    assert (up["type"], up["elements"], up["unpacked_bytes"]) == ("int6", 3 * 32 * 16, 3 * 32 * 16)
    assert up["bits_per_element"] == 8 * up["packed_bytes"] / up["elements"]
    assert report["config"]["num_layers"] == 3
    main(["verify", str(file)])
    assert f"good: {file.stat().st_size:,} bytes" in capsys.readouterr().out
    main(["verify", "--json", str(file)])
    assert json.loads(capsys.readouterr().out)["parameters"] == parameters


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_convert_changes_the_codec_and_nothing_else(
    file: Path, tensors: StoredTensors, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = file.parent / "other.golf"
    main(["convert", str(file), "--codec", codec, "--out", str(out)])
    assert f"{out}: {out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert_same(read_artifact(out).tensors, tensors)
    assert codec in {section.codec for section in read_artifact(out).info.sections}
    assert main(["diff", str(file), str(out)]) == 0
    main(["convert", str(out), "--codec", "brotli", "--out", str(out)])
    assert out.read_bytes() == file.read_bytes()


def test_convert_reports_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.parent / "model.ptz"
    main(["convert", "--json", str(file), "--format", "pr1392", "--out", str(out)])
    report = json.loads(capsys.readouterr().out)
    assert (report["bytes_before"], report["bytes"]) == (file.stat().st_size, out.stat().st_size)
    assert report["codec"] == "brotli"
    assert report["payload_bytes"] < report["pickled_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--codec: needed for format golf: one of .*ans"),
        (["--out", "x", "--format", "pr1471", "--codec", "ans"], "--codec: format pr1471 has its own"),
        (["--out", "./model.golf", "--format", "pr1471"], "--out: model.golf would replace FILE by another format"),
        (["--out", "model.golf", "--from", "pr122"], "--out: model.golf would replace FILE by another format"),
        (["--out", "none/x", "--codec", "ans"], "--out: the folder none does not exist: create it first"),
    ],
)
def test_convert_refuses_what_it_cannot_do(
    file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(UserError, match=message):
        main(["convert", str(file), *arguments])
    assert os.listdir(file.parent) == ["model.golf"]


def test_diff_names_what_differs(file: Path, tensors: StoredTensors, capsys: pytest.CaptureFixture[str]) -> None:
    changed = dict(tensors)
    up, scale = changed["blocks.1.mlp.up"], changed["ve.scale"]
    assert isinstance(up, QuantizedTensor) and isinstance(scale, torch.Tensor)
    codes = up.codes.clone()
    codes[0, 0] = codes[0, 0] - 1 if codes[0, 0] > 0 else codes[0, 0] + 1
    changed["blocks.1.mlp.up"] = QuantizedTensor(codes, up.scales, up.bits)
    changed["ve.scale"] = -torch.zeros_like(scale)
    del changed["skips.gates"], changed["blocks.0.attn_scale"]
    changed["blocks.0.attn_scale"] = torch.ones(3)
    other = file.parent / "other.golf"
    write_artifact(other, changed, tiny(rope_base=500.0), **ROOMY)
    assert main(["diff", str(file), str(other)]) == 1
    text = capsys.readouterr().out
    assert "field rope_base: 10000.0 and 500.0" in text
    assert f"tensor blocks.1.mlp.up: int6 {tuple(codes.shape)}, {100 / codes.numel():.2f} % of the codes" in text
    assert f"weights by up to {up.scales[0].float().item():.4g}" in text
    assert "tensor blocks.0.attn_scale: float16 (16,) and float32 (3,)" in text
    assert f"different in 4 tensors; equal in {len(tensors) - 4} tensors" in text
    main(["diff", "--json", str(file), str(other)])
    report = json.loads(capsys.readouterr().out)
    assert not report["same"]
    assert report["model_bytes"] == [file.stat().st_size, other.stat().st_size]
    assert [sum(sizes) for sizes in zip(*report["groups"].values(), strict=True)] == report["model_bytes"]


def test_diff_sees_the_sign_of_zero(file: Path, tensors: StoredTensors) -> None:
    other = file.parent / "other.golf"
    zeros = dict(tensors) | {"ve.scale": torch.zeros(())}
    write_artifact(file, zeros, tiny(), **ROOMY)
    write_artifact(other, zeros | {"ve.scale": -torch.zeros(())}, tiny(), **ROOMY)
    assert main(["diff", str(file), str(other)]) == 1


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert"])
def test_each_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example: python -m train.artifact {command} runs/" in " ".join(capsys.readouterr().out.split())


def test_the_command_ends_on_a_sentence_and_code_2(tmp_path: Path, file: Path) -> None:
    bad = tmp_path / "bad.golf"
    bad.write_bytes(file.read_bytes()[:-1])
    run = [sys.executable, "-m", "train.artifact", "verify", str(bad)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {bad}: section")
    assert "Traceback" not in done.stderr


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "python -m train.artifact inspect runs/" in capsys.readouterr().out

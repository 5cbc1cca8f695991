"""The scripts in examples/ run and do what they say, in seconds on a CPU."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from submission_runs import narrow

from train.recipes import load_recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# a script that runs with these words in front of it cannot import golf_kernels, wherever it is installed
WITHOUT_PACKAGE = (
    "import runpy, sys; sys.modules['golf_kernels'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
)


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def run_without_package(script: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(script)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_muon_trains_the_small_gpt() -> None:
    example = load("muon_nanogpt")
    losses = example["train"]()
    # a head of zeros predicts every byte alike
    assert losses[0] == pytest.approx(math.log(256), abs=1e-5)
    assert len(losses) == 20 and losses[-1] < 3.5
    assert losses[-1] < example["train"](optimizer="adamw")[-1]


def test_the_fused_head_trains_as_the_plain_one() -> None:
    main = load("fused_head_train_gpt")["main"]
    fused, plain = main("fused"), main("plain")
    assert fused == pytest.approx(plain, abs=1e-4)
    assert fused[0] == pytest.approx(math.log(1024), abs=0.1) and fused[-1] < fused[0] / 2


def test_a_pasted_kernel_runs_without_the_package(tmp_path: Path) -> None:
    source = load("paste_triton")["single_script"]()
    (tmp_path / "single.py").write_text(source)
    ended = run_without_package(tmp_path / "single.py")
    assert ended.returncode == 0, ended.stderr
    ours, plain = (float(word) for word in ended.stdout.replace(",", "").split() if word[0].isdigit())
    assert ours == pytest.approx(plain, rel=1e-5)


def test_a_script_that_needs_the_package_or_computes_something_else_fails(tmp_path: Path) -> None:
    source = load("paste_triton")["single_script"]()
    (tmp_path / "importing.py").write_text(f"{source}\nimport golf_kernels\n")
    assert "ModuleNotFoundError" in run_without_package(tmp_path / "importing.py").stderr
    assert source.count("scale * (lse - picked") == 1
    (tmp_path / "wrong.py").write_text(source.replace("scale * (lse - picked", "scale * (lse + picked"))
    assert "AssertionError" in run_without_package(tmp_path / "wrong.py").stderr


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"muon_nanogpt", "fused_head_train_gpt", "paste_triton"}


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((EXAMPLES / "golf_kernels.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # no window opens
    matplotlib.use("agg")
    small = vars(narrow(dataset, tmp_path, 1, code_form="plain"))
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "SETTINGS" in names and "config" not in names:
            assert load_recipe("quickstart").config(**names["SETTINGS"]).iterations == 200
            names["SETTINGS"] = {
                name: value for name, value in small.items() if name not in ("recipe", "run_id", "runs_dir")
            }
    assert names["run"].artifact.is_file() and str(names["run"].path).startswith("runs/notebook_")
    assert [step for step, _ in names["training"]][-1] == names["config"].iterations
    assert names["validation"][-1][1] < names["validation"][0][1]
    assert names["sample"].startswith("def")
    truth = F.cross_entropy(
        30 * torch.tanh(names["hidden"].double() @ names["weight"].double().T / 30), names["targets"]
    ).item()
    assert [loss for loss, _ in names["compared"].values()] == pytest.approx([truth, truth], rel=1e-5)
    assert len(names["axes"].lines) == 2

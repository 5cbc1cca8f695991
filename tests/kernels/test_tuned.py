"""Which tuned file is used, what it decides, and the warnings about files that are not used."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golf_kernels import dispatch, tuned
from train.pipeline import tuned_kernels
from train.recipes import load_recipe

HERE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "550.54",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "golf_kernels": "0.2.0",
}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A made GPU with an operator that has a Triton and a CUDA kernel."""
    monkeypatch.setenv("GOLF_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "machine", lambda: dict(HERE))
    for name, value in (("_registry", {}), ("_members", {}), ("_logged", set())):
        monkeypatch.setattr(dispatch, name, value)
    for op in ("mlp", "mlp_backward"):
        for backend in ("torch", "triton", "cuda"):
            dispatch.register(op, backend, lambda *args: None)
    dispatch.set_members("mlp", ["mlp", "mlp_backward"])
    tuned.forget()
    yield
    tuned.forget()


def decided(call="triton", step="torch", **changes):
    decision = {
        "call": {"backend": call, "reason": "1.62 x torch"},
        "step": {"backend": step, "reason": "0.97 x in the step"},
    }
    return {"machine": HERE, "tuned": "2026-12-01", "decisions": {"mlp": decision}} | changes


def test_library_calls_take_the_decision_of_calls_and_say_so_once(caplog):
    tuned.write(tuned.path_of(HERE), decided())
    with caplog.at_level(logging.INFO, logger="golf_kernels"):
        for op in ("mlp", "mlp_backward", "mlp"):
            assert dispatch.choose(op, device="cuda") == ("triton", "triton, 1.62 x torch, tuned 2026-12-01")
    assert [record.getMessage() for record in caplog.records] == ["mlp: triton, 1.62 x torch, tuned 2026-12-01"]
    assert tuned.load().line("mlp", "step") == "mlp: torch, 0.97 x in the step, tuned 2026-12-01"


def test_a_variant_is_decided_and_kept_like_its_backend():
    variants = {"big": lambda *args: None}
    for op in ("mlp", "mlp_backward"):
        dispatch.register(op, "triton", lambda *args: None, variants=variants)
    tuned.write(tuned.path_of(HERE), decided(call="triton/big", step="triton/big"))
    assert dispatch.choose("mlp", device="cuda").backend == "triton/big"
    stored, _ = tuned_kernels(load_recipe("quickstart").config(), torch.device("cuda"))
    assert stored == "mlp=triton/big?"
    with dispatch.forced(stored):
        assert dispatch.choose("mlp_backward", device="cuda").backend == "triton/big"
    tuned.write(tuned.path_of(HERE), decided(call="triton/big", failed=["mlp=triton"]))
    tuned.forget()
    with dispatch.forced(stored):
        assert dispatch.choose("mlp", device="cuda").backend == "cuda"


def test_a_kernel_whose_check_failed_runs_only_where_it_is_forced(monkeypatch):
    tuned.write(tuned.path_of(HERE), decided(call="torch", failed=["mlp=triton"]))
    # what a run on another machine has stored
    monkeypatch.setenv("GOLF_BACKEND", "mlp=triton?")
    assert dispatch.choose("mlp_backward", device="cuda") == ("cuda", "triton: named, but its check failed on this GPU")
    monkeypatch.setenv("GOLF_BACKEND", "mlp=triton")
    assert dispatch.choose("mlp_backward", device="cuda").backend == "triton"


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: (path.parent.rmdir(), path.parent.touch())])
def test_a_file_that_cannot_be_read_is_told_and_ignored(make, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("GOLF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    make(tuned.path_of(HERE))
    assert tuned.load() is None and "set GOLF_CACHE to another folder" in caplog.text


def test_a_decision_for_pytorch_keeps_a_cuda_kernel_out():
    assert dispatch.choose("mlp", device="cuda").backend == "cuda"
    tuned.forget()
    tuned.write(tuned.path_of(HERE), decided(call="torch"))
    assert dispatch.choose("mlp", device="cuda").backend == "torch"


def test_the_environment_goes_before_the_tuned_file(monkeypatch):
    tuned.write(tuned.path_of(HERE), decided())
    monkeypatch.setenv("GOLF_BACKEND", "mlp=cuda")
    assert dispatch.choose("mlp", device="cuda") == ("cuda", "forced by GOLF_BACKEND")
    monkeypatch.setenv("GOLF_BACKEND", "")
    assert dispatch.choose("mlp", device="cuda").backend == "triton"
    # tensors on a CPU are not concerned
    assert dispatch.choose("mlp", device="cpu").backend == "torch"


def test_the_trainer_adds_what_the_user_leaves_open():
    preferences = {"mlp": "triton"}
    assert dispatch.with_preferences("", preferences) == "mlp=triton?"
    assert dispatch.with_preferences("mlp=torch", preferences) == "mlp=torch"
    assert dispatch.with_preferences("torch", preferences) == "torch"
    dispatch.register("xsa", "torch", lambda *args: None)
    assert dispatch.with_preferences("xsa=torch", preferences) == "mlp=triton?,xsa=torch"


def test_a_run_takes_and_stores_the_decisions_of_steps(monkeypatch):
    tuned.write(tuned.path_of(HERE), decided(step="triton"))
    cuda, line = torch.device("cuda"), "kernel: mlp: triton, 0.97 x in the step, tuned 2026-12-01"
    config = load_recipe("quickstart").config()
    assert tuned_kernels(config, cuda) == ("mlp=triton?", [line])
    assert tuned_kernels(config, torch.device("cpu")) == ("", [])
    # what was stored with the run, or what the user sets, stays
    for text in ("mlp=torch?", "torch"):
        assert tuned_kernels(config.replace(golf_backend=text), cuda) == (text, [])


def test_without_a_tuned_file_one_line_says_what_to_type(caplog):
    dispatch.register("other", "torch", lambda *args: None)
    dispatch.register("other", "triton", lambda *args: None)
    for op in ("mlp", "other", "mlp_backward"):
        assert dispatch.choose(op, device="cuda").backend == ("torch" if op == "other" else "cuda")
    assert [record.getMessage() for record in caplog.records if "measured" in record.getMessage()] == [
        "no kernel has been measured on this NVIDIA H100 80GB HBM3, so PyTorch runs: type python -m golf_kernels tune"
    ]


@pytest.mark.parametrize("field", ["driver", "torch", "triton", "golf_kernels"])
def test_a_file_of_another_version_is_told_and_not_used(field, caplog):
    other = HERE | {field: "9.9"}
    tuned.write(tuned.path_of(other), decided(machine=other))
    assert tuned.load() is None
    (record,) = caplog.records
    assert (
        f"is for {field} 9.9 (here {HERE[field]}) and not used: type python -m golf_kernels tune" in record.getMessage()
    )
    # of another GPU nothing is said
    tuned.path_of(other).rename(tuned.path_of(other | {"gpu": "NVIDIA A100"}))
    tuned.forget()
    caplog.clear()
    assert tuned.load() is None and not caplog.records


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"machine": {}, "tuned": "x"}', json.dumps(decided(call="fast")), json.dumps(decided(tuned=None))],
)
def test_a_damaged_file_is_told_ignored_and_can_be_written_again(text, caplog):
    path = tuned.path_of(HERE)
    path.write_text(text)
    assert tuned.load() is None
    assert "is damaged" in caplog.text and "python -m golf_kernels tune writes it again" in caplog.text
    tuned.write(path, decided())
    tuned.forget()
    assert tuned.load().data == decided()


def test_shipped_decisions_count_where_nothing_was_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.write(tmp_path / "shipped" / "nvidia-h100-80gb-hbm3.json", decided(call="cuda"))
    assert tuned.load().preferences("call") == {"mlp": "cuda"}
    tuned.write(tuned.path_of(HERE), decided())
    tuned.forget()
    assert tuned.load().preferences("call") == {"mlp": "triton"}


def test_a_failed_write_leaves_the_old_file_and_no_other(monkeypatch):
    path = tuned.path_of(HERE)
    tuned.write(path, decided())
    with pytest.raises(ValueError, match="not JSON compliant"):
        tuned.write(path, decided(findings=float("nan")))
    assert tuned.read(path) == decided() and list(path.parent.iterdir()) == [path]


def test_two_processes_with_one_cache_read_whole_files(tmp_path):
    path = tuned.path_of(HERE)
    tuned.write(path, decided())
    program = (
        "import sys\nfrom pathlib import Path\nfrom golf_kernels import tuned\nfound = tuned.read(Path(sys.argv[1]))\n"
        "for number in range(200):\n    tuned.write(Path(sys.argv[1]), found | {'findings': [number] * 2000})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    while writer.poll() is None:
        assert tuned.read(path)["decisions"] == decided()["decisions"]
    assert writer.returncode == 0 and tuned.read(path)["findings"] == [199] * 2000


def test_the_file_is_named_after_the_machine_and_found_by_xdg(monkeypatch, tmp_path):
    assert tuned.path_of(HERE) == tmp_path / (
        "tuned_nvidia-h100-80gb-hbm3_driver-550.54_torch-2.11.0_triton-3.6.0_golf_kernels-0.2.0.json"
    )
    monkeypatch.delenv("GOLF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuned.folder() == Path("/x/golf_kernels")


def test_a_machine_without_a_gpu_has_no_tuned_file(monkeypatch):
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert tuned.machine() is None and tuned.load() is None
    assert re.fullmatch(r"cuda\d+\.\d+|[\d.]+", tuned.driver())

"""What `golf_kernels.native` says about an extension that is missing, broken or out of date."""

import contextlib
import json
import sys
import types

import pytest

from golf_kernels import native


@pytest.fixture(autouse=True)
def fresh_answers(monkeypatch, tmp_path):
    """A package folder of the test's own, and nothing remembered before or after."""
    monkeypatch.setattr(native, "BUILD_INFO_PATH", tmp_path / "_build_info.json")
    native.missing.cache_clear()
    yield
    native.missing.cache_clear()


def record(**parts):
    native.BUILD_INFO_PATH.write_text(json.dumps({"extension": "_C.so", **parts}))


def test_a_tree_that_was_never_installed():
    for part in ("cpp", "cuda"):
        assert "this source tree was never installed" in native.problem(part)
        assert "pip install --no-build-isolation --no-deps -e ." in native.problem(part)
    with pytest.raises(RuntimeError, match=r"golf_kernels\._C: not built: this source tree was never installed"):
        native.extension()


def test_a_packed_script(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "PACKED_SCRIPT", "train_gpt.py", raising=False)
    said = "a packed script carries no compiled code; PyTorch gives the same values"
    assert native.problem("cpp") == native.problem("cuda") == said


def test_an_extension_that_does_not_import(monkeypatch):
    record(cpp={"built": True}, cuda={"built": False, "reason": "no nvcc", "remedy": "install it"})
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_import_error", "undefined symbol: sorely_missed")
    assert "does not import: undefined symbol: sorely_missed" in native.problem("cpp")
    assert native.problem("cuda") == "not built: no nvcc; to change that, install it"


def test_an_extension_of_other_sources(monkeypatch):
    record(cpp={"built": True}, cuda={"built": True})
    monkeypatch.setattr(native, "_extension", types.SimpleNamespace(abi=native.ABI + 1))
    assert f"ABI {native.ABI + 1}, expected {native.ABI}" in native.problem("cpp")
    monkeypatch.setattr(native, "_extension", types.SimpleNamespace(abi=native.ABI))
    native.missing.cache_clear()
    assert native.problem("cpp") is None
    assert native.extension().abi == native.ABI


def test_a_gpu_that_the_kernels_were_not_built_for(monkeypatch):
    def cuda_probe():
        raise RuntimeError("CUDA error 209: no kernel image is available for execution on the device")

    record(cpp={"built": True}, cuda={"built": True, "archs": ["90a", "compute_80"]})
    monkeypatch.setattr(native, "_extension", types.SimpleNamespace(abi=native.ABI, cuda_probe=cuda_probe))
    assert native.missing("cuda") is None
    monkeypatch.setattr(native.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native.torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(native.torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(native.torch.cuda, "get_device_capability", lambda device: (7, 5))
    native.cuda_problem.cache_clear()
    assert native.problem("cuda") == (
        "CUDA error 209: no kernel image is available for execution on the device (built for sm_90a, compute_80, this GPU is sm_75); "
        "to build for it, run GOLF_CUDA_ARCHS=75 pip install --no-build-isolation --no-deps -e . in the source tree"
    )
    native.cuda_problem.cache_clear()


def test_no_gpu(monkeypatch):
    record(cpp={"built": True}, cuda={"built": True})
    monkeypatch.setattr(native, "_extension", types.SimpleNamespace(abi=native.ABI))
    monkeypatch.setattr(native.torch.cuda, "is_available", lambda: False)
    assert native.problem("cuda") == "PyTorch finds no CUDA GPU"

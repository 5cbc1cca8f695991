"""The doctor: its data, its text, and the exit code when something is broken."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from golf_kernels import __main__ as doctor
from golf_kernels import dispatch, native
from golf_kernels.version import __version__


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("GOLF_BACKEND", raising=False)


def report(capsys, *arguments):
    code = doctor.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_everything_is_reported_and_passes(capsys):
    code, data = report(capsys)
    assert code == 0 and data["passed"] is True
    assert data["versions"]["golf_kernels"] == __version__
    assert data["versions"]["python"] == platform.python_version()
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["operators"]) == set(dispatch.describe())
    assert len(data["gpus"]) == torch.cuda.device_count()
    for part in ("cpp", "cuda"):
        assert data["native"][part]["runs"] == (native.problem(part) is None)


def test_one_operator_of_each_kind_is_checked_on_each_device(capsys):
    checks = report(capsys)[1]["checks"]
    kinds = {
        "newton_schulz",
        "muon_step",
        "leaky_relu2_mlp",
        "mix_rms_norm",
        "qk_norm_rope",
        "xsa",
        "softcapped_cross_entropy",
        "window_nll",
        "int6_dequantize",
        "gptq_block",
    }
    assert {check["op"] for check in checks if check["device"] == "cpu"} == kinds
    # a new operator needs a check of its own
    assert {op for op in dispatch.describe() if not any(op.startswith(kind.split("_de")[0]) for kind in kinds)} == set()
    for check in checks:
        assert check["passed"] and 0 < check["error"] <= check["limit"] and check["problem"] is None


@pytest.mark.parametrize("op", doctor.CHECKS)
def test_a_wrong_result_fails(op, monkeypatch, capsys):
    honest = doctor.CHECKS[op]

    def wrong(device, dtype):
        got, want = honest(device, dtype)
        return [got[0] + 1, *got[1:]], want

    monkeypatch.setitem(doctor.CHECKS, op, wrong)
    code, data = report(capsys)
    assert code == 1 and data["passed"] is False
    assert {check["op"] for check in data["checks"] if not check["passed"]} == {op}
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert f"FAILED  {op}" in text and text.endswith(
        f"{(len(data['gpus']) and 2) or 1} of {len(data['checks'])} checks failed.\n"
    )


def test_a_nan_fails_and_the_data_stay_json(monkeypatch, capsys):
    honest = doctor.CHECKS["window_nll"]
    monkeypatch.setitem(
        doctor.CHECKS, "window_nll", lambda *args: ([honest(*args)[0][0] * float("nan")], honest(*args)[1])
    )
    code, data = report(capsys)
    (failed,) = [check for check in data["checks"] if not check["passed"]]
    assert code == 1 and failed["error"] is None and failed["problem"] == "the result is not finite"


def test_a_forced_back_end_that_cannot_run_is_a_failed_check(monkeypatch, capsys):
    monkeypatch.setenv("GOLF_BACKEND", "newton_schulz=cuda")
    code, data = report(capsys)
    assert code == 1
    chosen = data["operators"]["newton_schulz"]["chosen"]["cpu"]
    assert chosen["backend"] is None and "newton_schulz has no cuda back end, only triton, torch" in chosen["reason"]
    # the step of Muon goes through it
    assert [check["op"] for check in data["checks"] if not check["passed"]] == ["newton_schulz", "muon_step"]
    doctor.main([])
    assert "Operators (GOLF_BACKEND=newton_schulz=cuda)" in capsys.readouterr().out


def test_the_text_says_what_was_not_built_and_what_to_type(monkeypatch, capsys):
    missing = {"built": False, "reason": "no nvcc: not on PATH", "remedy": "install a CUDA toolkit"}
    built = {"built": True, "compiler": "/usr/bin/g++", "version": "g++ 12.2.0", "flags": ["-O3", "-Wall"]}
    monkeypatch.setattr(native, "build_info", lambda: {"extension": "_C.so", "cpp": built, "cuda": missing})
    doctor.main([])
    text = capsys.readouterr().out
    assert "C++   built by /usr/bin/g++ (g++ 12.2.0)\n        -O3 -Wall" in text
    assert "CUDA  not built: no nvcc: not on PATH\n        to change that: install a CUDA toolkit" in text
    assert "newton_schulz               cpu   torch   first choice on cpu" in text
    assert text.endswith(f"All {len(doctor.CHECKS) * (2 if torch.cuda.is_available() else 1)} checks passed.\n")


def test_the_command_and_its_help():
    run = subprocess.run([sys.executable, "-m", "golf_kernels", "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "--json" in run.stdout and "examples:" in run.stdout
    wrong = subprocess.run([sys.executable, "-m", "golf_kernels", "--jsn"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "unrecognized arguments: --jsn" in wrong.stderr


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    end, pipe = os.pipe()
    os.close(end)
    # as in a terminal: what is printed leaves at the end
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open(pipe, "w") as closed:
        run = subprocess.run(
            [sys.executable, "-m", "golf_kernels"], env=environment, stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (run.returncode, run.stderr) == (141, b"")

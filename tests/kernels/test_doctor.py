"""The doctor: its data, its text, and the exit code when something is broken."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from golf_kernels import __main__ as doctor
from golf_kernels import cpu, dispatch, native, operators
from golf_kernels.version import __version__


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("GOLF_BACKEND", raising=False)


@pytest.fixture(scope="module")
def whole():
    """The exit code, the data and the other words of a report of everything."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("GOLF_BACKEND", raising=False)
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = doctor.main(["--json"])
    return code, json.loads(out.getvalue()), said.getvalue()


def report(capsys, *arguments):
    code = doctor.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_everything_is_reported_and_passes(whole):
    code, data, said = whole
    assert said == "python -m golf_kernels: running every operator on every backend\n"
    assert code == 0 and data["passed"] is True
    assert data["versions"]["golf_kernels"] == __version__
    assert data["versions"]["python"] == platform.python_version()
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["operators"]) == set(dispatch.describe())
    assert len(data["gpus"]) == torch.cuda.device_count()
    for part in ("cpp", "cuda"):
        assert data["native"][part]["runs"] == (native.problem(part) is None)


def test_every_operator_is_checked_on_every_backend_that_can_run(whole):
    checks = whole[1]["checks"]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    expected = {
        (name, backend, device)
        for name in operators.declared()
        for device in devices
        for backend in dispatch.available_backends(name, device)
    }
    assert {(check["op"], check["backend"], check["device"]) for check in checks} == expected
    assert {backend for _, backend, _ in expected} >= {"torch", "triton"}
    for check in checks:
        assert check["passed"] and 0 < check["error"] <= check["limit"] and check["problem"] is None


@pytest.mark.parametrize("op", ["newton_schulz", "muon_step"])
def test_products_in_bfloat16_on_a_cpu_have_its_limit(op, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (check,) = doctor.self_check(["cpu"], f"{op}=torch")
    assert check["passed"] and 1e-5 < check["error"] <= check["limit"] == 5e-2


def broken(monkeypatch, op, backend, function):
    """Puts `function(implementation, *args)` in the place of an implementation."""
    implementation = dispatch._registry[op][backend]
    changed = functools.partial(function, implementation.function)
    replaced = {**dispatch._registry[op], backend: dataclasses.replace(implementation, function=changed)}
    monkeypatch.setitem(dispatch._registry, op, replaced)


def failures(data):
    return [(check["op"], check["backend"]) for check in data["checks"] if not check["passed"]]


# a wrong result of any operator behind a name
@pytest.mark.parametrize(("op", "name"), [(op, name) for name in operators.declared() for op in dispatch.members(name)])
def test_a_wrong_result_fails(op, name, monkeypatch, capsys):
    def wrong(function, *args):
        found = function(*args)
        if op == "muon_step":
            args[0][0].add_(1)
            return found
        if isinstance(found, torch.Tensor):
            return found + 1
        return type(found)(tensor + 1 for tensor in found)

    backend = next(b for b in dispatch.available_backends(name, "cpu") if b != "torch")
    broken(monkeypatch, op, backend, wrong)
    code, data = report(capsys, "--only", f"{name}={backend}")
    assert code == 1 and data["passed"] is False and set(failures(data)) == {(name, backend)}


def test_a_nan_and_an_exception_fail_and_the_data_stay_json(monkeypatch, capsys):
    broken(monkeypatch, "window_nll", "triton", lambda function, *args: function(*args) * float("nan"))
    broken(monkeypatch, "xsa_backward", "triton", lambda function, *args: 1 / 0)
    code, data = report(capsys)
    assert code == 1 and failures(data) == [("window_nll", "triton"), ("xsa", "triton")]
    problems = {check["op"]: (check["error"], check["problem"]) for check in data["checks"] if not check["passed"]}
    assert problems["window_nll"] == (None, "the result is not finite")
    assert problems["xsa"] == (None, "ZeroDivisionError: division by zero")
    text = doctor.render(data)
    assert "FAILED  xsa" in text and text.endswith(f"2 of {len(data['checks'])} checks failed.")


def test_a_forced_backend_that_cannot_run_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("GOLF_BACKEND", "newton_schulz=cuda")
    only = "--only", "newton_schulz=triton"
    code, data = report(capsys, *only)
    assert code == 1 and failures(data) == [] and data["without_backend"] == ["newton_schulz"]
    chosen = data["operators"]["newton_schulz"]["chosen"]["cpu"]
    assert chosen["backend"] is None and "newton_schulz has no cuda backend, only triton, torch" in chosen["reason"]
    assert os.environ["GOLF_BACKEND"] == "newton_schulz=cuda"
    assert doctor.main(only) == 1
    text = capsys.readouterr().out
    assert "Operators (GOLF_BACKEND=newton_schulz=cuda)" in text
    assert text.endswith("checks passed.\nGOLF_BACKEND leaves no backend for newton_schulz.\n")


def test_the_text_says_what_was_not_built_and_what_to_type(monkeypatch, capsys):
    missing = {"built": False, "reason": "no nvcc: not on PATH", "remedy": "install a CUDA toolkit"}
    built = {"built": True, "compiler": "/usr/bin/g++", "version": "g++ 12.2.0", "flags": ["-O3", "-Wall"]}
    monkeypatch.setattr(native, "build_info", lambda: {"extension": "_C.so", "cpp": built, "cuda": missing})
    assert doctor.main(["--only", "newton_schulz=torch"]) == 0
    text = capsys.readouterr().out
    assert "C++   built by /usr/bin/g++ (g++ 12.2.0)\n        -O3 -Wall" in text
    assert "CUDA  not built: no nvcc: not on PATH\n        to change that: install a CUDA toolkit" in text
    assert "newton_schulz               cpu   torch   default on cpu" in text
    assert re.search(r"\nAll \d+ checks passed\.\n$", text)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [("--help", 0, ["--json", "examples:"]), ("--jsn", 2, ["unrecognized arguments: --jsn"])],
)
def test_the_command_explains_itself(arguments, code, words, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main([arguments])
    assert ended.value.code == code
    said = "".join(capsys.readouterr())
    assert all(word in said for word in words)


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    end, pipe = os.pipe()
    os.close(end)
    # as in a terminal: what is printed leaves at the end
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open(pipe, "w") as closed:
        command = [sys.executable, "-m", "golf_kernels", "--only", "newton_schulz=torch"]
        run = subprocess.run(command, env=environment, stdout=closed, stderr=subprocess.PIPE, check=False)
    said = b"python -m golf_kernels: running newton_schulz=torch\n"
    assert (run.returncode, run.stderr) == (141, said)

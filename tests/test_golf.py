"""The command `golf`, from a wheel that is installed into an environment of its own and run in a folder with other files."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from golf import command, completion
from golf_kernels.version import __version__
from train.recipes import load_recipe
from train.single_file.modules import find_modules
from train.single_file.sources import package_source

ROOT = Path(__file__).resolve().parents[1]


def failure(exitcode: int) -> ProcessFailure:
    return ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file="none")


# without the folders above the tests, and without what the tests' own interpreter finds
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GOLF_FORCE_CUDA")}


class Installed(NamedTuple):
    golf: Path
    python: Path
    packages: Path
    elsewhere: Path

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([self.golf, *words], cwd=self.elsewhere, env=CLEAN, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of these sources, without compiled code, in an environment that shares only the libraries."""
    folder = tmp_path_factory.mktemp("golf")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.json")
    for name in ("benchmarks", "csrc", "golf", "golf_kernels", "train"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    # no compiler: what it makes is tested in test_build.py
    pip, offline = [sys.executable, "-m", "pip", "-q"], CLEAN | {"PATH": str(folder), "PIP_NO_INDEX": "1"}
    made = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree]
    subprocess.run([*pip, *made], check=True, env=offline)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True, env=offline)
    libraries = {str(Path(module.__file__).parents[1]) for module in (torch, np)}
    (packages / "libraries.pth").write_text("\n".join(libraries))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    # a user's own files, with the packages' names
    for name in ("train", "benchmarks", "golf", "golf_kernels"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('the wrong file')\n")
    return Installed(python.with_name("golf"), python, packages, elsewhere)


def test_a_wheel_puts_neither_train_nor_benchmarks_on_top(installed: Installed) -> None:
    on_top = {path.name.split("-")[0] for path in installed.packages.iterdir()} - {"libraries.pth", "__pycache__"}
    assert on_top == {"golf", "golf_kernels"}


def test_several_processes_run_the_same_command(installed: Installed) -> None:
    result = installed.run("run", "--processes", "2", "--describe", "--recipe", "quickstart")
    assert result.returncode == 0, result.stderr
    # the README's figure; each of the two is this command again
    assert result.stdout.count("recipe quickstart: 4,910,865 parameters") == 2


def test_benchmarks_run_from_any_folder(installed: Installed) -> None:
    result = installed.run("bench", "bench_gptq", "--tiny", "--help")
    assert result.returncode == 0, result.stderr
    assert "usage: python -m benchmarks.bench_gptq" in result.stdout


def test_a_wheel_logs_and_packs_the_sources_of_a_checkout(installed: Installed) -> None:
    program = (
        "import json; from train.single_file.modules import find_modules; from train.recipes import load_recipe; "
        "from train.single_file.sources import package_source; "
        "print(json.dumps([package_source(), *find_modules(load_recipe('quickstart').config())]))"
    )
    apps = installed.packages / "golf_kernels" / "_apps"
    done = subprocess.run(
        [installed.python, "-P", "-c", program], env=CLEAN | {"PYTHONPATH": str(apps)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here = find_modules(load_recipe("quickstart").config())
    source, *carried = json.loads(done.stdout)
    assert carried == [here.sources, here.left_out]
    assert source == package_source()


def golf(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["golf", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    return command.main()


def test_every_room_with_a_command_and_the_benchmarks_are_commands() -> None:
    rooms = {path.parent.name for path in (ROOT / "train").glob("*/__main__.py")}
    modules = set(command.commands().values())
    assert {f"train.{room}" for room in rooms} | {"train", "benchmarks", "golf_kernels"} < modules
    assert {"run", "data", "eval", "quantize", "artifact", "submission", "bench", "doctor"} < set(command.commands())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evla"], "error: evla: no such command; did you mean eval? (there are: run, artifact"),
        (["xyz"], "error: xyz: no such command (there are: run, artifact"),
        (["run", "--processes"], "error: --processes: expected one of 1, 2, 4, 8, got ''"),
        (["run", "--processes", "two"], "error: --processes: expected one of 1, 2, 4, 8, got 'two'"),
        (["eval", "--processes=0", "mine"], "error: --processes: expected one of 1, 2, 4, 8, got '0'"),
        (["bench", "bench_gtpq"], "error: bench_gtpq: no such benchmark; did you mean bench_gptq? (golf bench"),
    ],
)
def test_a_wrong_command_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert golf(*words, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert golf(*words, monkeypatch=monkeypatch) == 0
        assert "\n  eval         python -m train.evaluate\n" in capsys.readouterr().out
    assert golf("bench", monkeypatch=monkeypatch) == 0
    listed = capsys.readouterr().out
    assert "\n  bench_gptq             GPTQ's inner loop on an 11-layer model: one block" in listed
    assert set(re.findall(r"^  (bench_\w+)", listed, re.MULTILINE)) == {
        path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")
    }


def test_help_and_version_come_without_torch() -> None:
    # as installed, torch would be imported by golf_kernels
    program = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['golf', {!r}]; runpy.run_module('golf', run_name='__main__')"
    for word, said in (("--help", "usage: golf COMMAND"), ("--version", f"golf {__version__}\n"), ("bench", "usage: ")):
        done = subprocess.run(
            [sys.executable, "-c", program.format(word)], cwd=ROOT, env=CLEAN, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith(said), done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SignalException("signal", signal.SIGINT), 130, ""),
        (ChildFailedError("golf", {1: failure(exitcode=2)}), 2, ""),
        (ChildFailedError("golf", {1: failure(exitcode=-9)}), 2, "error: process 1 was ended by SIGKILL\n"),
    ],
)
def test_processes_that_end_give_no_traceback(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torchrun(words: list[str]) -> None:
        assert words[1] == "--nproc_per_node=2" and words[-3:] == ["golf", "run", "--describe"]
        raise error

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    for flag in (["--processes", "2"], ["--processes=2"]):
        assert golf("run", *flag, "--describe", monkeypatch=monkeypatch) == code
        assert capsys.readouterr().err == f"golf run: starting 2 processes\n{said}"


def test_a_command_says_something_before_it_loads_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runpy, "run_module", lambda *_, **__: None)
    for words in (["bench", "bench_gptq"], ["doctor"], ["tune"]):
        assert golf(*words, monkeypatch=monkeypatch) == 0
        assert capsys.readouterr().err == f"golf {words[0]}: loading PyTorch\n"


def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_module(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("none", name="numpy.linalg")

    monkeypatch.setattr(runpy, "run_module", run_module)
    assert golf("data", "stdlib", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: numpy is not installed: ")


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_a_shell_completes_commands_subcommands_flags_and_choices(tmp_path: Path) -> None:
    (tmp_path / "golf.bash").write_text(completion.script("bash"))
    program = 'source golf.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _golf; echo "${COMPREPLY[@]}"; shift $#'
    cases = {
        "golf ev": "eval",
        "golf submission c": "code compare check",
        "golf bench bench_g": "bench_gptq",
        "golf artifact convert --form": "--format",
        "golf run --muon_w": "--muon_wd",
        "golf run --seed 3 --recipe qu": "quickstart",
        "golf artifact convert x --format pr14": "pr1471",
        "golf eval runs/mi": "",
    }
    for typed, expected in cases.items():
        done = subprocess.run(
            ["bash", "-c", program, "bash", *typed.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.stdout.strip(), done.stderr) == (expected, ""), typed
    assert completion.script("zsh").endswith((tmp_path / "golf.bash").read_text())

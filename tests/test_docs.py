"""Every command, code block, link and path in the documents is run, parsed, or listed with the reason why not."""

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from documents import ROOT, TEXTS, commands, fences
from pipeline_runs import flags
from submission_runs import narrow
from torch.distributed.run import get_args_parser

from golf.command import commands as golf_commands
from train.common.values import ConfigError
from train.config import Config
from train.sweep.__main__ import read_arguments

# each command is run as `__main__`, also where it is imported already
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
# command → exit code. Run as they stand; training gets the settings of a narrow model in front of the command's own
RUN = {
    "python -m train --recipe quickstart --run_id mine --checkpoint_every 50": 0,
    "python -m train --run_id mine --resume auto": 0,
    "python -m train.runs": 0,
    "python -m train.runs show mine": 0,
    "python -m train.runs compare seed42 seed314": 0,
    "python -m train.quantize runs/mine --matrix_clip_sigmas 10 --out k10.golf": 0,
    "python -m train.artifact diff runs/mine/model.golf k10.golf": 1,
    "python -m train.evaluate runs/mine --stride 32": 0,
    'python -m train.generate runs/mine --prompt "def " --tokens 200 --temperature 0.8 --seed 1': 0,
    "python -m train.export runs/mine --to state_dict": 0,
    "python -m train.submission record runs/mine --github-id NAME": 0,
    "python -m train --recipe quickstart --run_id seed42 --seed 42": 0,
    "python -m train --recipe quickstart --run_id seed314 --seed 314": 0,
    "python -m train --recipe quickstart --run_id seed999 --seed 999": 0,
    # a laptop's record fails the rules of hardware and validation text, and its text is not #1019's
    "python -m train.submission build runs/seed42 runs/seed314 runs/seed999 --out records/mine --single-file wrapped "
    "--github-id NAME": 1,
    "python -m train.submission check records/mine": 1,
    "python -m train.submission compare records/mine 1019": 2,
    "python -m train.submission dashboard runs": 0,
    "python -m train.artifact inspect runs/mine/model.golf": 0,
    "python -m train.artifact verify runs/mine/model.golf": 0,
    "python -m train.artifact diff runs/mine/model.golf runs/seed314/model.golf": 1,
    "python -m train.artifact convert runs/mine/model.golf --codec zstd --out smaller.golf": 0,
    "python -m train.artifact convert runs/mine/model.golf --format pr1471 --out final_model.int6.ptz": 0,
    "python -m train --recipe sp8192_sdclip --describe": 0,
    "GOLF_BACKEND=torch python -m golf_kernels": 0,
    "python examples/paste_triton.py --out single.py": 0,
    "TRITON_INTERPRET=1 python single.py": 0,
}
# command → why no test runs it; those of this project are parsed all the same
NEEDS_NETWORK = {
    "pip install .": "installs torch's requirements; tests/test_build.py builds the package offline",
    "pip install --no-build-isolation --no-deps -e .": "would change the environment; tests/test_build.py does the same in a copy",
    "pip install kernels": "downloads FlashAttention 3",
    "pip install flash-attn-4": "downloads FlashAttention 4",
    "pip install 'golf-kernels[ans]'": "downloads constriction",
    "pip install 'golf-kernels[export]'": "downloads safetensors",
    "python -m train.export runs/mine --to safetensors": "needs safetensors; tests/export runs it where it is installed",
    "python -m train.export runs/mine --to hf": "needs safetensors; tests/export runs it where transformers is installed",
    "pip install 'golf-kernels[loggers]'": "downloads tensorboard and wandb",
    "pip install 'golf-kernels[parquet]'": "downloads pyarrow",
    "pip install 'golf-kernels[sweep]'": "downloads Optuna and submitit",
    "pip install '.[train]'": "downloads what the trainer needs",
    "docker build -t golf_kernels .": "downloads CUDA and torch; tests/test_rent.py checks what the Dockerfile names",
    "docker run --gpus all --shm-size=16g -it golf_kernels": "needs a GPU and the image",
    "pre-commit install": "downloads ruff's hook",
}
NEEDS_NETWORK |= {
    f"python -m train.data fineweb --variant {variant} --train-shards 80{repository}": "downloads 16 GB of shards"
    for variant, repository in [
        ("sp1024", ""),
        ("sp4096", " --repo kevclark/parameter-golf --skip-manifest"),
        ("sp8192", " --repo kevclark/parameter-golf --skip-manifest"),
        ("sp8192_lossless_caps_caseops_v1_reserved", ""),
    ]
}


class Parsed(BaseException):
    """A command's arguments have been read, and nothing has been done."""


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))
RUN = {shlex.join(shlex.split(command)): code for command, code in RUN.items()}
NEEDS_NETWORK = {shlex.join(shlex.split(command)): why for command, why in NEEDS_NETWORK.items()}


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables in front of a command, and its words."""
    words = shlex.split(command)
    count = next(index for index, word in enumerate(words) if not re.fullmatch(r"[A-Z][A-Z_0-9]*=.*", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


@contextmanager
def as_command(module: str, arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        yield
    finally:
        sys.argv = before


def exit_code(module: str, arguments: list[str]) -> int:
    """What `python -m module` would end with, in this process."""
    with as_command(module, arguments):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = argparse.ArgumentParser.parse_known_args

    def parse_args(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> NoReturn:
        _, rest = known(parser, *arguments, **options)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    def parse_known_args(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        # the one command that reads some of its arguments and hands the others on
        return parse_args(parser) if parser.prog == "python -m benchmarks" else known(parser, *arguments, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)


def parse_golf(arguments: list[str]) -> list[str]:
    """The command that `golf` with these arguments runs."""
    name, *rest = arguments
    if name == "--help":
        return ["python", "-m", "golf", *arguments]
    rest = rest[: rest.index(">")] if ">" in rest else rest
    if name == "bench" and rest[0].startswith("bench_"):
        return ["python", "-m", f"benchmarks.{rest[0]}", *rest[1:]]
    if "--processes" in rest:
        del rest[rest.index("--processes") : rest.index("--processes") + 2]
    return ["python", "-m", golf_commands()[name], *rest]


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command's arguments as the command would, and do nothing.

    Raises:
        AssertionError: nothing here can parse it, or it is not understood.
    """
    variables, words = split(command)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words in (["golf", "bench"], ["golf", "--version"]):
        # tests/test_golf.py runs it
        return
    if words[0] == "golf":
        words = parse_golf(words[1:])
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if words[:2] == ["bash", "examples/rent_8xh100.sh"]:
        plan = ["--dry-run", *words[2:]]
        done = subprocess.run(
            ["bash", ROOT / words[1], *plan], env={**os.environ, "PYTHON": sys.executable}, stderr=subprocess.PIPE
        )
        assert done.returncode == 0, done.stderr
        return
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        assert launched.module, f"{command}: expected -m MODULE"
        words = ["python", "-m", launched.training_script, *launched.training_script_args]
    assert words[:2] == ["python", "-m"], f"{command}: run it, parse it, or list it in tests/test_docs.py with a reason"
    module, arguments = words[2], words[3:]
    if module == "pytest":
        assert all((ROOT / name).exists() for name in arguments)
        return
    verbs = {"aot": "benchmarks.aot", "schedule": "benchmarks.computed.step_schedule"}
    if module == "benchmarks" and arguments[0] in verbs:
        module, arguments = verbs[arguments[0]], arguments[1:]
    if module == "train" and "--help" not in arguments:
        assert exit_code(module, [*(word for word in arguments if word != "--describe"), "--describe"]) == 0
        return
    if module == "train.sweep" and "--help" not in arguments:
        read_arguments(arguments)
        return
    stop_after_parsing(monkeypatch)
    with suppress(Parsed):
        assert exit_code(module, arguments) == 0 and "--help" in arguments, (
            f"{command}: its arguments are not understood"
        )


@pytest.fixture(scope="module")
def workspace(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder in which the commands of `RUN` were run in the documents' order, and their exit codes."""
    folder = tmp_path_factory.mktemp("docs")
    small = flags(narrow(dataset, folder / "runs", 1337))
    codes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (command for command in COMMANDS if command in RUN):
            variables, words = split(command)
            with pytest.MonkeyPatch.context() as inner:
                for name, value in variables.items():
                    inner.setenv(name, value)
                if words[1] == "-m":
                    first = small if words[2] == "train" and not {"--describe", "--resume"} & {*words} else []
                    given = {word.partition("=")[0] for word in words}
                    own = [flag for flag in first if flag.partition("=")[0] not in given]
                    codes[command] = exit_code(words[2], [*own, *words[3:]])
                else:
                    script = ROOT / words[1] if (ROOT / words[1]).exists() else folder / words[1]
                    inner.setenv("PYTHONPATH", str(ROOT))
                    codes[command] = subprocess.run([sys.executable, script, *words[2:]]).returncode
    return folder, codes


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_runs_or_parses_or_says_what_it_needs(
    command: str, workspace: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command in RUN:
        assert workspace[1][command] == RUN[command]
    elif command not in NEEDS_NETWORK or command.startswith("python"):
        parse(command, monkeypatch)


@pytest.mark.parametrize(
    "module",
    ["train", *(f"train.{path.parent.name}" for path in sorted(ROOT.glob("train/*/__main__.py"))), "golf_kernels"],
)
def test_every_command_explains_itself(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(module, ["--help"]) == 0
    said = capsys.readouterr().out
    assert "example" in said and f"python -m {module}" in said


def test_no_table_holds_a_command_that_no_document_has() -> None:
    assert set(RUN) <= set(COMMANDS)
    assert set(NEEDS_NETWORK) <= set(COMMANDS)
    assert not set(RUN) & set(NEEDS_NETWORK)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m train --recipe quickstart --mun_wd 1",
        "python -m train.submission build --single-file wraped --out x y",
        "python -m train.evaluate runs/mine --strid 3 --nothing",
        "python -m golf_kernels tune --minuts 9",
        "torchrun --standalone --nproc_per_nod=8 --nothing -m train",
        "make rum",
        "golf evl runs/mine",
        "golf sweep --set matrx_lr=0.02,0.04",
        "golf eval runs/mine --strid 3 --nothing",
        "rm -rf runs",
        "bash examples/rent_8xh100.sh --seed 42",
    ],
)
def test_a_wrong_command_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ConfigError, KeyError, SystemExit)):
        parse(wrong, monkeypatch)


def execute(text: str, names: dict[str, Any]) -> list[str]:
    """Run a document's code; the names that were assigned twice in one block, to tensors that agree."""
    compared = []
    for block in fences(text, "python"):
        before: dict[str, Any] = {}
        for statement in ast.parse(block).body:
            exec(compile(ast.Module([statement], []), "document", "exec"), names)
            targets = ast.walk(ast.Tuple(statement.targets)) if isinstance(statement, ast.Assign) else []
            for name in [node.id for node in targets if isinstance(node, ast.Name)]:
                if isinstance(names[name], torch.Tensor) and name in before:
                    torch.testing.assert_close(names[name], before[name], rtol=1e-5, atol=1e-5)
                    compared.append(name)
                before[name] = names[name]
    return compared


def test_the_kernels_before_and_after_agree() -> None:
    torch.manual_seed(0)
    text = TEXTS["docs/kernels.md"]
    assert execute(text, {}) == ["y", "loss", "nll", "q_hat", "k_hat", "z", "mixed", "normed"]
    with pytest.raises(AssertionError, match="not close"):
        execute(text.replace("softcap=30.0)  # after", "softcap=29.0)  # after"), {})


def test_the_front_pages_code_runs(workspace: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace[0])
    names: dict[str, Any] = {}
    exec(fences(TEXTS["docs/kernels.md"], "python")[0], names)
    assert execute(TEXTS["README.md"], names) == ["loss"]
    assert names["logits"].shape == (1, 3, names["model"].config.vocab_size)


def test_the_librarys_code_runs(workspace: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace[0])
    names: dict[str, Any] = {}
    execute(TEXTS["docs/library.md"], names)
    assert 0 < names["score"].val_bpb < 10 and 5 < names["loss"] < 8


def test_the_example_recipe_is_one() -> None:
    names: dict[str, Any] = {}
    execute(TEXTS["docs/recipes.md"], names)
    assert Config(**names["SETTINGS"]).model_dim == 192

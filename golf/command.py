"""The command `golf`, which runs the trainer and the benchmarks from any folder.

Their packages `train` and `benchmarks` are not on Python's path. A checkout has them beside golf_kernels, a wheel in
golf_kernels/_apps.
"""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

_KERNELS = Path(__file__).parents[1] / "golf_kernels"
_APPS = _KERNELS / "_apps"
ROOT = _APPS if _APPS.is_dir() else _KERNELS.parent
"""The folder that contains the packages `train` and `benchmarks`."""

# folder of train → name of its command, if that is different
_SHORT = {"evaluate": "eval"}
# commands that take --processes
_SHARED = ("run", "quantize", "eval")
_PROCESSES = ("1", "2", "4", "8")

USAGE = """usage: golf COMMAND [ARGUMENT ...]

Run a command of the trainer or the benchmarks. `golf COMMAND --help` explains one. {shared} take --processes N (1, 2, 4 or 8).

examples:
  golf run --recipe quickstart
  golf run --processes 8 --recipe sp8192_sdclip --seed 42
  golf eval runs/mine --stride 32
  golf bench              list the benchmarks
  golf completion bash    print a script that completes commands and flags
  golf --version

commands:
{commands}
"""


def commands() -> dict[str, str]:
    """Returns command → module that the command runs."""
    rooms = sorted(path.parent.name for path in (ROOT / "train").glob("*/__main__.py"))
    named = {_SHORT.get(room, room): f"train.{room}" for room in rooms}
    return {
        "run": "train",
        **named,
        "bench": "benchmarks",
        "doctor": "golf_kernels",
        "tune": "benchmarks.tune",
        "completion": "golf.completion",
    }


def benchmarks() -> dict[str, str]:
    """Returns benchmark → the first line of its documentation."""
    texts = {path.stem: path.read_text() for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))}
    return {name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0] for name, text in texts.items()}


def main() -> int:
    """Runs the given command's module as `__main__`. Returns 2 if the command or an argument is wrong, otherwise 0."""
    found = commands()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {command:<12} python -m {module}" for command, module in found.items())
        print(USAGE.format(shared=", ".join(_SHARED), commands=listed), end="")
        return 0
    if name == "--version":
        print(f"golf {runpy.run_path(str(_KERNELS / 'version.py'))['__version__']}")
        return 0
    if name not in found:
        return _refuse(f"{name}: no such command{_hint(name, found)} (there are: {', '.join(found)})")
    module = found[name]
    if name == "bench" and not arguments:
        print(
            "usage: golf bench BENCHMARK [ARGUMENT ...]; also golf bench schedule, aot or report, see golf bench --help\n"
        )
        print("\n".join(f"  {benchmark:<22} {about}" for benchmark, about in benchmarks().items()))
        return 0
    if name == "bench" and arguments[0].isidentifier():
        if (ROOT / "benchmarks" / f"{arguments[0]}.py").is_file():
            module = f"benchmarks.{arguments.pop(0)}"
        elif arguments[0].startswith("bench"):
            return _refuse(
                f"{arguments[0]}: no such benchmark{_hint(arguments[0], benchmarks())} (golf bench lists them)"
            )
    # first in the path, so that another train.py is not imported instead of the trainer
    sys.path.insert(0, str(ROOT))
    # lets processes that the command starts import the same packages
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        if name in _SHARED and (given := [word for word in arguments if word.partition("=")[0] == "--processes"]):
            place = arguments.index(given[0])
            _, equals, number = arguments.pop(place).partition("=")
            if not equals:
                number = "".join(arguments[place : place + 1])
                del arguments[place : place + 1]
            if number not in _PROCESSES:
                return _refuse(f"--processes: expected one of {', '.join(_PROCESSES)}, got {number!r}")
            return _share(int(number), [name, *arguments])
        sys.argv = [name, *arguments]
        if module.startswith(("benchmarks.", "golf_kernels")):
            # these import PyTorch, which takes seconds, before they can say anything; the others speak first
            print(f"golf {name}: loading PyTorch", file=sys.stderr, flush=True)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        # while a library is imported
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "train", "benchmarks", "golf", "golf_kernels"):
            raise
        return _refuse(
            f"{package} is not installed: install golf_kernels again with what the trainer needs: '.[train]'"
        )
    return 0


def _share(processes: int, words: list[str]) -> int:
    """Runs a command of `golf` in several processes by torchrun. Returns the exit code, without torchrun's traceback."""
    print(f"golf {words[0]}: starting {processes} processes", file=sys.stderr, flush=True)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # -P keeps Python from importing files of the current folder
    command = [sys.executable, "-u", "-P", "-m", "golf", *words]
    try:
        torchrun(["--standalone", f"--nproc_per_node={processes}", "--no-python", *command])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # a process that ends by itself has said why
        if failure.exitcode < 0:
            return _refuse(f"process {rank} was ended by {failure.signal_name()}")
        return failure.exitcode
    return 0


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2

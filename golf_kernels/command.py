"""The command `golf`, which runs the trainer and the benchmarks from any folder.

Their packages `train` and `benchmarks` are not on Python's path. A checkout has them beside golf_kernels, a wheel in
golf_kernels/_apps.
"""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from pathlib import Path

_APPS = Path(__file__).with_name("_apps")
ROOT = _APPS if _APPS.is_dir() else _APPS.parents[1]
"""The folder that contains the packages `train` and `benchmarks`."""

# folder of train → name of its command, if that is different
_SHORT = {"evaluate": "eval"}
# commands that take --processes
_SHARED = ("run", "quantize", "eval")

USAGE = """usage: golf COMMAND [ARGUMENT ...]

Run a command of the trainer or the benchmarks. `golf COMMAND --help` explains one. {shared} take --processes N (1, 2, 4 or 8).

examples:
  golf run --recipe quickstart
  golf run --processes 8 --recipe sp8192_sdclip --seed 42
  golf eval runs/mine --stride 32
  golf completion bash    print a script that completes commands and flags

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
        "completion": "golf_kernels.completion",
    }


def main() -> int:
    """Runs the given command's module as `__main__`. Returns 2 if the command or an argument is wrong, otherwise 0."""
    found = commands()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {command:<12} python -m {module}" for command, module in found.items())
        print(USAGE.format(shared=", ".join(_SHARED), commands=listed), end="")
        return 0
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return _refuse(f"{name}: no such command{hint} (there are: {', '.join(found)})")
    module = found[name]
    if name == "bench" and arguments and (ROOT / "benchmarks" / f"{arguments[0]}.py").is_file():
        module = f"benchmarks.{arguments.pop(0)}"
    # first in the path, so that another train.py is not imported instead of the trainer
    sys.path.insert(0, str(ROOT))
    # lets processes that the command starts import the same packages
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if name in _SHARED and "--processes" in arguments:
        place = arguments.index("--processes")
        number = "".join(arguments[place + 1 : place + 2])
        if not number.isdecimal():
            return _refuse(f"--processes: expected a whole number, got {number!r}")
        del arguments[place : place + 2]
        # -P keeps Python from importing files of the current folder
        again = [sys.executable, "-u", "-P", "-m", "golf_kernels.command", name, *arguments]
        module = "torch.distributed.run"
        arguments = ["--standalone", f"--nproc_per_node={number}", "--no-python", *again]
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "train", "benchmarks", "golf_kernels"):
            raise
        return _refuse(
            f"{package} is not installed: install golf_kernels again with what the trainer needs: '.[train]'"
        )
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

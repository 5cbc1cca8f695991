"""Reads and writes tuned files, which say which backend of each operator is the fastest on a machine.

`python -m golf_kernels tune` measures the kernels and writes a tuned file. There is one file per GPU model, driver,
torch, Triton and package version. The folder is `GOLF_CACHE`, by default `~/.cache/golf_kernels`. A tuned file is JSON:

    {"machine": {"gpu": …, "driver": …, "torch": …, "triton": …, "golf_kernels": …}, "tuned": "2026-12-01",
     "findings": {…}, "failed": ["xsa=triton"],
     "decisions": {"leaky_relu2_mlp": {"call": {"backend": "triton", "reason": "1.62 x torch"},
                                       "step": {"backend": "triton", "reason": "1.41 x in the step"}}},
     "attention": {"48x2048x8/4x64 bfloat16": {"backend": "cudnn", "reason": "fastest, ms forward + backward: …"}}}

`findings` has the result of each measurement. `failed` lists the kernels whose check failed. `decisions` has the chosen
backend of each operator and the reason. The decision `step` is for the trainer, `call` for all other callers. If a
machine has no tuned file, it uses the file for its GPU model in `golf_kernels/shipped`, if there is one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from golf_kernels.backend_names import PREFERENCE, Backend, without_variant
from golf_kernels.version import __version__

Use = Literal["call", "step"]
USES: tuple[Use, ...] = ("call", "step")
COMMAND = "python -m golf_kernels tune"
SHIPPED = Path(__file__).parent / "shipped"
_logger = logging.getLogger("golf_kernels")


class Tuned(NamedTuple):
    """A tuned file: its path and its contents."""

    path: Path
    data: Mapping[str, Any]

    def preferences(self, use: Use) -> dict[str, Backend]:
        """Returns operator → chosen backend. Operators are named as in `GOLF_BACKEND`."""
        return {op: decision[use]["backend"] for op, decision in self.data["decisions"].items() if use in decision}

    def line(self, op: str, use: Use) -> str:
        """Describes a decision in one line: operator, backend, reason and date."""
        decision = self.data["decisions"][op][use]
        return f"{op}: {decision['backend']}, {decision['reason']}, tuned {self.data['tuned']}"


def driver() -> str:
    """Returns the version of NVIDIA's driver or, if that is unknown, the newest CUDA version that it supports."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text()):
            return found[1]
    # a torch built without CUDA lacks this function
    version: int = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"cuda{version // 1000}.{version % 1000 // 10}"


def machine() -> dict[str, str] | None:
    """Returns this machine's GPU model, driver version and package versions; None without a GPU.

    A tuned file is valid only on machines for which all of these are equal.
    """
    if not torch.cuda.is_available():
        return None
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton,
        "golf_kernels": __version__,
    }


def folder() -> Path:
    """Returns the folder of tuned files: `GOLF_CACHE` if set, otherwise `golf_kernels` in the user's cache folder."""
    chosen = os.environ.get("GOLF_CACHE")
    return Path(
        chosen or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "golf_kernels")
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def path_of(here: Mapping[str, str]) -> Path:
    """Returns the path of the tuned file for a machine. `here` is a result of `machine`."""
    rest = "_".join(f"{name}-{_slug(value)}" for name, value in here.items() if name != "gpu")
    return folder() / f"tuned_{_slug(here['gpu'])}_{rest}.json"


def read(path: Path) -> dict[str, Any]:
    """Reads a tuned file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        found = [
            (without_variant(decision[use]["backend"]) in PREFERENCE, isinstance(decision[use]["reason"], str))
            for decision in data["decisions"].values()
            for use in USES
            if use in decision
        ]
        found += [
            (isinstance(one["backend"], str), isinstance(one["reason"], str))
            for one in data.get("attention", {}).values()
        ]
        fine = isinstance(data["machine"], dict) and isinstance(data["tuned"], str) and all(map(all, found))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected machine, tuned and decisions: {error!r}") from error
    if not fine:
        raise ValueError(f"expected the backends {', '.join(PREFERENCE)}, each with a reason")
    return dict(data)


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Replaces a tuned file in one step. Other processes read the old file or the complete new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tuned_")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@functools.cache
def load() -> Tuned | None:
    """Returns the tuned file of this machine, otherwise the shipped file for its GPU, otherwise None.

    Warns about a damaged file, and about files for the same GPU with other versions. Reads the files only once.
    """
    here = machine()
    if here is None:
        return None
    wanted = path_of(here)
    try:
        return Tuned(wanted, read(wanted))
    except FileNotFoundError:
        pass
    except ValueError as error:
        _logger.warning("%s is damaged (%s) and ignored: %s writes it again", wanted, error, COMMAND)
    except OSError as error:
        _logger.warning("%s: the tuned file is ignored: set GOLF_CACHE to another folder", error)
    for other in sorted(wanted.parent.glob(f"tuned_{_slug(here['gpu'])}_*.json")):
        if other != wanted:
            differ = _differences(other, here)
            _logger.warning("%s is for %s and not used: type %s", other, differ, COMMAND)
    shipped = SHIPPED / f"{_slug(here['gpu'])}.json"
    return Tuned(shipped, read(shipped)) if shipped.is_file() else None


@functools.cache
def of_calls(names: tuple[str, ...]) -> tuple[Backend, str] | None:
    """Returns the backend that was chosen for calls of an operator, and the reason. None: nothing was chosen.

    The choice is logged once.

    Args:
        names: the operator's name and the names of its groups. The first name with a decision counts.
    """
    found = load()
    preferences = found.preferences("call") if found else {}
    for name in names:
        if found and name in preferences:
            line = found.line(name, "call")
            _log(line)
            return preferences[name], line.partition(": ")[2]
    return None


# cached, so that an operator and its backward pass log their common line once
@functools.cache
def _log(line: str) -> None:
    _logger.info("%s", line)


@functools.cache
def failed(names: tuple[str, ...], backend: str) -> bool:
    """Whether an operator's kernel failed its check on this machine. `names` are the operator's name and its groups."""
    found = load()
    return found is not None and any(f"{name}={backend}" in found.data.get("failed", ()) for name in names)


@functools.cache
def tell() -> None:
    """Warns, at the first call only, if this GPU has no tuned file. The warning says what to type."""
    if load() is None and (here := machine()):
        _logger.warning("no kernel has been measured on this %s, so PyTorch runs: type %s", here["gpu"], COMMAND)


def forget() -> None:
    """Forgets the tuned files that were read, so that the next call reads them again."""
    for cached in (load, of_calls, failed, tell, _log):
        cached.cache_clear()


def _differences(path: Path, here: Mapping[str, str]) -> str:
    try:
        found = read(path)["machine"]
    except (OSError, ValueError):
        return "another version"
    return ", ".join(
        f"{name} {found.get(name)} (here {value})" for name, value in here.items() if found.get(name) != value
    )

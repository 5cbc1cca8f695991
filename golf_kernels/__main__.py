"""The doctor: `python -m golf_kernels` reports versions, builds and each operator's backend, and tests all backends."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from golf_kernels import cpu, dispatch, native, operators
from golf_kernels.version import __version__

EXAMPLES = """examples:
  python -m golf_kernels              the report; exit code 1 if a check fails
  python -m golf_kernels --json       the report as data
  python -m golf_kernels --only xsa=triton
                                      the check of one operator on one backend
  python -m golf_kernels tune         check and measure every kernel on this GPU, and remember which to use
  GOLF_BACKEND=int6=torch python -m golf_kernels
                                      what each operator runs on where the int6 operators are forced to PyTorch"""

# largest relative error that passes; on a CPU, Newton-Schulz errs most: 1.5e-6 in float32, 2.5e-2 in bfloat16
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# time limit of a check that runs in a process of its own
SECONDS = 120


def versions() -> dict[str, str]:
    """Returns the versions of golf_kernels, Python, torch, Triton and CUDA, with a note in place of a missing one."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "golf_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none: this torch is built without CUDA",
    }


def gpus() -> list[dict[str, Any]]:
    """Returns name, compute capability and memory of every GPU that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    return found


def choices(devices: Sequence[str]) -> dict[str, Any]:
    """Returns, for each operator, the backend chosen on each device and the reason, and the state of every backend."""
    report: dict[str, Any] = {}
    for op, backends in dispatch.describe().items():
        chosen = {}
        for device in devices:
            try:
                backend, reason = dispatch.choose(op, device=device)
            except dispatch.BackendError as error:
                chosen[device] = {"backend": None, "reason": str(error)}
            else:
                chosen[device] = {"backend": backend, "reason": reason}
        report[op] = {"chosen": chosen, "backends": backends}
    return report


def self_check(devices: Sequence[str], only: str = "") -> list[dict[str, Any]]:
    """Runs every operator on every backend of this machine and compares the results with PyTorch in float64 on the CPU.

    Args:
        devices: device types.
        only: `OP=BACKEND` runs this check alone, in this process. Otherwise each check on a GPU runs in its own
            process, so that a kernel that crashes or hangs fails only its own check.

    Returns:
        For each check a dictionary with op, backend, device, dtype, error, limit, passed and problem. `error` is the
        largest ‖got − want‖ / ‖want‖ among the operator's results and gradients.
    """
    rows = []
    for device, operator in itertools.product(devices, operators.declared().values()):
        dtype = operator.gpu_dtype if device == "cuda" else torch.float32
        for backend in dispatch.available_backends(operator.name, device):
            row: dict[str, Any] = {"op": operator.name, "backend": backend, "device": device}
            wide = device == "cuda" or not (operator.bfloat16_on_cpu and cpu.multiplies_bfloat16())
            limit = LIMITS[dtype if wide else torch.bfloat16]
            row |= {"dtype": str(dtype).removeprefix("torch."), "error": None, "limit": limit}
            if only in ("", f"{operator.name}={backend}"):
                rows.append((operator, row, dtype))
    alone = [bool(only) or row["device"] == "cpu" for _, row, _ in rows]
    with ThreadPoolExecutor(4) as pool:
        begun = [None if own else pool.submit(_check_apart, row) for own, (_, row, _) in zip(alone, rows, strict=True)]
        return [
            row | (future.result() if future else _check(operator, row, dtype))
            for future, (operator, row, dtype) in zip(begun, rows, strict=True)
        ]


def _check_apart(row: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "golf_kernels", "--only", f"{row['op']}={row['backend']}", "--json"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        checks = {check["device"]: check for check in json.loads(run.stdout)["checks"]}
        return {name: checks[row["device"]][name] for name in ("error", "passed", "problem")}
    except subprocess.TimeoutExpired:
        problem = f"it was stopped after {SECONDS} s"
    except (ValueError, KeyError):
        problem = (
            f"its process ended with code {run.returncode}: {(run.stderr.strip() or 'no output').splitlines()[-1]}"
        )
    return {"passed": False, "problem": problem}


def _check(operator: operators.Operator, row: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    make = operators.random_tensors(row["device"], dtype)
    inputs = operator.inputs(make)
    try:
        with dispatch.forced("torch"):
            upstream = operators.upstream_gradients(operator.function, inputs, make)
            exact_inputs, exact_upstream = operators.exact([inputs, upstream], device="cpu")
            want = operators.run(operator.function, exact_inputs, exact_upstream)
        with dispatch.forced(f"torch,{operator.name}={row['backend']}"):
            got = operators.run(operator.function, inputs, upstream)
        errors = [_relative_error(g, w) for g, w in zip(got, want, strict=True)]
    # a broken kernel or compiler may raise any exception; the check has then failed
    except Exception as error:
        return {"passed": False, "problem": f"{type(error).__name__}: {error}"}
    # JSON cannot hold NaN, and max() can overlook it
    if not all(math.isfinite(error) for error in errors):
        return {"passed": False, "problem": "the result is not finite"}
    return {"error": max(errors), "passed": max(errors) <= row["limit"], "problem": None}


def _relative_error(got: Tensor, want: Tensor) -> float:
    wide = want.double()
    return float((got.cpu().double() - wide).norm() / wide.norm())


def report(only: str = "") -> dict[str, Any]:
    """Runs all checks, or the check `only`, and returns the report as a dictionary."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    checks, chosen = self_check(devices, only), choices(devices)
    without = [op for op, entry in chosen.items() if any(c["backend"] is None for c in entry["chosen"].values())]
    information = native.build_info()
    return {
        "versions": versions(),
        "gpus": gpus(),
        "native": {
            part: {**information[part], "runs": native.problem(part) is None, "problem": native.problem(part)}
            for part in ("cpp", "cuda")
        },
        "golf_backend": os.environ.get(dispatch.ENVIRONMENT_VARIABLE, ""),
        "operators": chosen,
        "without_backend": without,
        "checks": checks,
        "passed": not without and all(check["passed"] for check in checks),
    }


def render(data: dict[str, Any]) -> str:
    """Formats the report as text."""
    lines = ["Versions", *(f"  {name:<14}{version}" for name, version in data["versions"].items()), "", "GPU"]
    for gpu in data["gpus"]:
        lines.append(f"  {gpu['name']}, {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    if not data["gpus"]:
        lines.append("  none that torch can see; every operator runs on the CPU")
    lines += ["", "Native code"]
    for part, title in (("cpp", "C++"), ("cuda", "CUDA")):
        record = data["native"][part]
        if record["built"]:
            targets = f" for {native.architectures(record)}" if "archs" in record else ""
            lines.append(f"  {title:<6}built{targets} by {record['compiler']} ({record['version']})")
            lines.append(f"        {' '.join(record['flags'])}")
            if record["problem"]:
                lines.append(f"        does not run here: {record['problem']}")
        else:
            lines += [f"  {title:<6}not built: {record['reason']}", f"        to change that: {record['remedy']}"]
    forced = data["golf_backend"]
    lines += ["", f"Operators ({dispatch.ENVIRONMENT_VARIABLE}{f'={forced}' if forced else ' is not set'})"]
    for op, entry in data["operators"].items():
        for device, choice in entry["chosen"].items():
            lines.append(f"  {op:<28}{device:<6}{choice['backend'] or 'none':<8}{choice['reason']}")
        for backend, state in entry["backends"].items():
            if state != dispatch.AVAILABLE:
                lines.append(f"  {'':<28}{'':<6}{backend:<8}not available: {state}")
    lines += ["", "Self-check against float64"]
    for check in data["checks"]:
        verdict = "ok" if check["passed"] else "FAILED"
        result = check["problem"] or f"error {check['error']:.1e}, at most {check['limit']:.0e}"
        lines.append(
            f"  {verdict:<8}{check['op']:<28}{check['backend']:<8}{check['device']:<6}{check['dtype']:<10}{result}"
        )
    failed = sum(not check["passed"] for check in data["checks"])
    total = len(data["checks"])
    lines += ["", f"{failed} of {total} checks failed." if failed else f"All {total} checks passed."]
    if data["without_backend"]:
        lines.append(f"{dispatch.ENVIRONMENT_VARIABLE} leaves no backend for {', '.join(data['without_backend'])}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report. Returns 1 if a check failed or a forced backend cannot run, otherwise 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["tune"]:
        # golf_kernels must not import the tuner, so the tuner is run by the name of its command
        sys.argv = ["golf", *arguments]
        runpy.run_module("golf", run_name="__main__")
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m golf_kernels",
        description="Reports what is installed and built, the backend of each operator and the reason for it, and checks "
        "every backend of this machine against PyTorch in float64.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--only", default="", metavar="OP=BACKEND", help="check one operator on one backend")
    options = parser.parse_args(arguments)
    known = [f"{op}={b}" for op in operators.declared() for b in dispatch.available_backends(op)]
    if options.only and options.only not in known:
        parser.error(f"--only {options.only}: expected one of {', '.join(known)}")
    what = options.only or "every operator on every backend"
    print(f"python -m golf_kernels: running {what}", file=sys.stderr, flush=True)
    data = report(options.only)
    print(json.dumps(data, indent=2) if options.json else render(data))
    return 0 if data["passed"] else 1


if __name__ == "__main__":
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader (`… | head`) closed the pipe; without this line Python would report it again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)

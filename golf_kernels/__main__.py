"""The doctor: `python -m golf_kernels` says what is installed and built, what each operator runs on, and checks them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from golf_kernels import dispatch, int6, native
from golf_kernels.gptq_block import gptq_block
from golf_kernels.leaky_relu2_mlp import leaky_relu2_mlp
from golf_kernels.mix_rms_norm import mix_rms_norm
from golf_kernels.muon import Muon, learning_rate_ratio
from golf_kernels.newton_schulz import COEFFICIENTS, newton_schulz
from golf_kernels.qk_norm_rope import qk_norm_rope
from golf_kernels.softcapped_cross_entropy import softcapped_cross_entropy
from golf_kernels.version import __version__
from golf_kernels.window_nll import window_nll
from golf_kernels.xsa import xsa

EXAMPLES = """examples:
  python -m golf_kernels              the report; exit code 1 if a check fails
  python -m golf_kernels --json       the same as data
  GOLF_BACKEND=int6=torch python -m golf_kernels
                                      the same with the int6 operators forced to PyTorch"""

# Newton-Schulz is the largest: these inputs give 1.1e-6 in float32 and 1.9e-2 in bfloat16 on a CPU
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

# what an operator gave, and what its float64 reference gives
Results = tuple[list[Tensor], list[Tensor]]


def versions() -> dict[str, str]:
    """Version of everything that matters here, or what is missing."""
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
    """Name, compute capability and memory of every GPU that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    return found


def operators(devices: Sequence[str]) -> dict[str, Any]:
    """For each operator what was chosen on each device and why, and the state of all its back ends."""
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
        report[op] = {"chosen": chosen, "back_ends": backends}
    return report


def _random(*shape: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def _truth(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to("cpu", torch.float64) for tensor in tensors]


def _check_newton_schulz(device: str, dtype: torch.dtype) -> Results:
    shapes = ((24, 40), (40, 24), (2, 24, 40), (1, 7))
    matrices = [_random(*s, seed=i, device=device, dtype=torch.float32) for i, s in enumerate(shapes)]
    schedule = [value for triple in COEFFICIENTS["quintic"].schedule() for value in triple]
    exact = _truth(*matrices)
    want = dispatch.run_on("torch", "newton_schulz", exact, schedule, 1e-7, "frobenius", torch.float64)
    return newton_schulz(matrices, compute_dtype=dtype), want


def _check_muon_step(device: str, dtype: torch.dtype) -> Results:
    shapes = ((24, 40), (40, 24), (2, 24, 40))
    weights = [_random(*s, seed=i, device=device, dtype=torch.float32).requires_grad_() for i, s in enumerate(shapes)]
    for index, weight in enumerate(weights):
        weight.grad = _random(*weight.shape, seed=index + 5, device=device, dtype=torch.float32)
    schedule = [value for triple in COEFFICIENTS["quintic"].schedule() for value in triple]
    # momentum only scales the first step's gradient, and Newton-Schulz takes the scale away
    exact = _truth(*(weight.grad for weight in weights if weight.grad is not None))
    steps = dispatch.run_on("torch", "newton_schulz", exact, schedule, 1e-7, "frobenius", torch.float64)
    rates = [0.5 * learning_rate_ratio(None, *weight.shape[-2:]) for weight in weights]
    want = [0.95 * w - rate * step for w, rate, step in zip(_truth(*weights), rates, steps, strict=True)]
    Muon(weights, lr=0.5, weight_decay=0.1, compute_dtype=dtype).step()
    return list(weights), want


def _check_mlp(device: str, dtype: torch.dtype) -> Results:
    shapes = ((37, 32), (128, 32), (32, 128), (37, 32), (32,))
    leaves = [_random(*s, seed=i, device=device, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    x, w_up, w_down, residual, scale = leaves
    y = leaky_relu2_mlp(x, w_up, w_down, norm_eps=1e-6, residual=residual, scale=scale)
    dy = _random(37, 32, seed=9, device=device, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, w_up, w_down, scale], dy)]
    x, w_up, w_down, residual, scale = _truth(*leaves)
    saved = dispatch.run_on("torch", "leaky_relu2_mlp", x, w_up, w_down, residual, scale, 0.5, 1e-6, 1.0, False, True)
    inputs = (*_truth(dy), x, w_up, w_down, scale, *saved[1:], 0.5, True, 1.0, False)
    return got, [saved[0], *dispatch.run_on("torch", "leaky_relu2_mlp_backward", *inputs)]


def _check_mix_rms_norm(device: str, dtype: torch.dtype) -> Results:
    shapes = ((2, 19, 48), (2, 19, 48), (2, 48))
    leaves = [_random(*s, seed=i, device=device, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    x, x0, mix = leaves
    mixed = mix_rms_norm(x, x0, mix, eps=1e-6, gain=0.5)
    upstream = [_random(*s, seed=i + 5, device=device, dtype=dtype) for i, s in enumerate(shapes[:2])]
    got = [*mixed, *torch.autograd.grad(mixed, leaves, upstream)]
    inputs = (*_truth(*leaves), 1e-6, 0.5)
    outputs = dispatch.run_on("torch", "mix_rms_norm", *inputs)
    return got, [*outputs, *dispatch.run_on("torch", "mix_rms_norm_backward", *_truth(*upstream), *inputs)]


def _check_qk_norm_rope(device: str, dtype: torch.dtype) -> Results:
    shapes = ((2, 19, 4, 16), (2, 19, 2, 16), (4,))
    leaves = [_random(*s, seed=i, device=device, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    angles = _random(19, 1, 4, seed=3, device=device, dtype=dtype)
    cosine, sine = angles.cos(), angles.sin()
    q, k, gain = leaves
    rotated = qk_norm_rope(q, k, cosine, sine, gain, eps=1e-6)
    upstream = [_random(*s, seed=i + 5, device=device, dtype=dtype) for i, s in enumerate(shapes[:2])]
    got = [*rotated, *torch.autograd.grad(rotated, leaves, upstream)]
    q, k, gain = _truth(*leaves)
    arguments = (*_truth(cosine, sine), gain)
    *outputs, rstd = dispatch.run_on("torch", "qk_norm_rope", q, k, *arguments, 1e-6)
    backward = (*_truth(*upstream), *outputs, *arguments, rstd)
    return got, [*outputs, *dispatch.run_on("torch", "qk_norm_rope_backward", *backward)]


def _check_xsa(device: str, dtype: torch.dtype) -> Results:
    shapes = ((2, 19, 4, 16), (2, 19, 2, 16))
    leaves = [_random(*s, seed=i, device=device, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    y = xsa(*leaves)
    dy = _random(*shapes[0], seed=9, device=device, dtype=dtype)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    exact = _truth(*leaves)
    want = dispatch.run_on("torch", "xsa", *exact)
    return got, [want, *dispatch.run_on("torch", "xsa_backward", *_truth(dy), *exact)]


def _head(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, 129, (53,), generator=torch.Generator().manual_seed(2)).to(device)
    hidden = _random(53, 32, seed=0, device=device, dtype=dtype)
    return hidden, _random(129, 32, seed=1, device=device, dtype=dtype), targets


def _check_cross_entropy(device: str, dtype: torch.dtype) -> Results:
    hidden, weight, targets = _head(device, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = softcapped_cross_entropy(hidden, weight, targets)
    got = [loss, *torch.autograd.grad(loss, [hidden, weight])]
    arguments = (*_truth(hidden, weight), targets.cpu(), 30.0, True, -100, 0.0, True, True)
    return got, list(dispatch.run_on("torch", "softcapped_cross_entropy", *arguments))


def _check_window_nll(device: str, dtype: torch.dtype) -> Results:
    hidden, weight, targets = _head(device, dtype)
    want = dispatch.run_on("torch", "window_nll", *_truth(hidden, weight), targets.cpu(), 30.0, False)
    return [window_nll(hidden, weight, targets)], [want]


def _check_int6(device: str, dtype: torch.dtype) -> Results:
    codes = torch.randint(-31, 32, (5, 67), dtype=torch.int8, generator=torch.Generator().manual_seed(3)).to(device)
    scales = _random(5, seed=4, device=device, dtype=torch.float32).abs() + 0.5
    packed = int6.int6_pack(codes)
    values = int6.int6_dequantize(packed, scales, 67)
    got = [int6.int6_unpack(packed, codes.numel()), values, int6.int6_fake_quantize(values, scales)]
    exact = codes.cpu().double() * scales.cpu().double().unsqueeze(1)
    return got, [codes.cpu().flatten(), exact, exact]


def _check_gptq_block(device: str, dtype: torch.dtype) -> Results:
    work = 0.1 * _random(2, 7, 37, seed=5, device=device, dtype=dtype)
    factor = _random(2, 7, 7, seed=6, device=device, dtype=dtype) / 7 + torch.eye(7, device=device, dtype=dtype)
    scales = torch.full((2, 37), 0.0625, device=device, dtype=dtype)
    want = dispatch.run_on("torch", "gptq_block", *_truth(work, factor, scales), 31)
    return list(gptq_block(work, factor, scales, 31)), list(want)


# the operator that stands for each kind, and its check
CHECKS: dict[str, Callable[[str, torch.dtype], Results]] = {
    "newton_schulz": _check_newton_schulz,
    "muon_step": _check_muon_step,
    "leaky_relu2_mlp": _check_mlp,
    "mix_rms_norm": _check_mix_rms_norm,
    "qk_norm_rope": _check_qk_norm_rope,
    "xsa": _check_xsa,
    "softcapped_cross_entropy": _check_cross_entropy,
    "window_nll": _check_window_nll,
    "int6_dequantize": _check_int6,
    "gptq_block": _check_gptq_block,
}


def self_check(devices: Sequence[str]) -> list[dict[str, Any]]:
    """Runs one operator of each kind on each device and compares it with its float64 reference.

    Returns:
        Per check: op, device, dtype, error (largest ‖got − want‖ / ‖want‖ of its results), limit, passed and problem.
    """
    rows = []
    for device in devices:
        for op, check in CHECKS.items():
            dtype = torch.bfloat16 if device == "cuda" and not op.startswith(("int6", "gptq")) else torch.float32
            row: dict[str, Any] = {"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"error": None, "limit": LIMITS[dtype], "passed": False, "problem": None}
            try:
                got, want = check(device, dtype)
                errors = [_relative_error(g, w) for g, w in zip(got, want, strict=True)]
            except (RuntimeError, ValueError) as error:
                row["problem"] = str(error)
            else:
                # JSON knows no NaN, and a NaN hides behind max()
                if all(math.isfinite(error) for error in errors):
                    row |= {"error": max(errors), "passed": max(errors) <= LIMITS[dtype]}
                else:
                    row["problem"] = "the result is not finite"
            rows.append(row)
    return rows


def _relative_error(got: Tensor, want: Tensor) -> float:
    exact = want.double()
    return float((got.detach().cpu().double() - exact).norm() / exact.norm())


def report() -> dict[str, Any]:
    """Everything the doctor knows, as data."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    checks = self_check(devices)
    information = native.build_info()
    return {
        "versions": versions(),
        "gpus": gpus(),
        "native": {
            part: {**information[part], "runs": native.problem(part) is None, "problem": native.problem(part)}
            for part in ("cpp", "cuda")
        },
        "golf_backend": os.environ.get(dispatch.ENVIRONMENT_VARIABLE, ""),
        "operators": operators(devices),
        "checks": checks,
        "passed": all(check["passed"] for check in checks),
    }


def render(data: dict[str, Any]) -> str:
    """The report as text."""
    lines = ["Versions", *(f"  {name:<14}{version}" for name, version in data["versions"].items()), "", "GPU"]
    for gpu in data["gpus"]:
        lines.append(f"  {gpu['name']}, {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    if not data["gpus"]:
        lines.append("  none that torch can see; every operator runs on the CPU")
    lines += ["", "Native code"]
    for part, title in (("cpp", "C++"), ("cuda", "CUDA")):
        record = data["native"][part]
        if record["built"]:
            targets = f" for sm_{', sm_'.join(record['archs'])}" if record.get("archs") else ""
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
        for backend, state in entry["back_ends"].items():
            if state != dispatch.AVAILABLE:
                lines.append(f"  {'':<28}{'':<6}{backend:<8}not available: {state}")
    lines += ["", "Self-check against float64"]
    for check in data["checks"]:
        verdict = "ok" if check["passed"] else "FAILED"
        result = check["problem"] or f"error {check['error']:.1e}, at most {check['limit']:.0e}"
        lines.append(f"  {verdict:<8}{check['op']:<28}{check['device']:<6}{check['dtype']:<10}{result}")
    failed = sum(not check["passed"] for check in data["checks"])
    total = len(data["checks"])
    lines += ["", f"{failed} of {total} checks failed." if failed else f"All {total} checks passed."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m golf_kernels",
        description="Says what is installed and built, what each operator runs on and why, and checks one of each kind "
        "against its float64 reference.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    options = parser.parse_args(arguments)
    data = report()
    print(json.dumps(data, indent=2) if options.json else render(data))
    return 0 if data["passed"] else 1


if __name__ == "__main__":
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader (`… | head`) has seen enough; python would complain once more while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)

"""Compile every kernel for sm_90 without a GPU, and check the machine code: `python -m benchmarks.aot`.

`benchmarks.computed.launches` launches each Triton kernel on tensors without data, and Triton compiles the kernel
instead of running it. The CUDA kernels are in `csrc/*.cu`. No kernel may spill registers, exceed Hopper's shared memory
or serialize wgmma. Triton kernels with 16-bit products must use wgmma, and kernels with tensor descriptors must use
TMA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT_BYTES = 232_448
ARCHITECTURE = "90a"
NVCC_FLAGS = ["-O3", "-std=c++17", "-gencode", f"arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"]
INSTRUCTIONS = {"wgmma": "wgmma.mma_async.sync", "tma": "cp.async.bulk.tensor."}

EPILOG = "exit codes: 0 all checks passed, 1 a check failed, 2 a compiler is missing, so some kernels were not compiled"


class Missing(Exception):
    """A compiler is not installed. The message says how to install it."""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel in one configuration.

    Registers and spilled bytes (stores and loads) are per thread, shared bytes per block. For CUDA kernels the shared
    bytes exclude dynamic memory. `wgmma` and `tma` count instructions in the PTX. `broken` lists the failed checks.
    """

    file: str
    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    tma: int
    broken: tuple[str, ...]


def judge(
    file: str, name: str, ptx: str, log: str, shared_bytes: int | None = None, promises: Iterable[str] = ()
) -> Compiled:
    """Check the PTX of a kernel and `log`, the output of `ptxas -v` for that kernel.

    If `shared_bytes` is None, the static shared memory in `log` counts. `promises` names the `INSTRUCTIONS` that the
    PTX must contain.
    """
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"{file}, {name}: no register count in the output of ptxas -v: {log!r}")
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    static = re.search(r"(\d+) bytes smem", log)
    shared = shared_bytes if shared_bytes is not None else int(static[1]) if static else 0
    counts = {kind: ptx.count(instruction) for kind, instruction in INSTRUCTIONS.items()}
    broken = [f"no {kind}" for kind in promises if not counts[kind]]
    # the text of a warning by ptxas
    if "wgmma.mma_async instructions are serialized" in log:
        broken.append("wgmma serialized")
    if spilled:
        broken.append(f"{spilled} spilled bytes")
    if shared > SHARED_LIMIT_BYTES:
        broken.append(f"{shared} bytes of shared memory, more than {SHARED_LIMIT_BYTES}")
    return Compiled(file, name, int(registers[1]), spilled, shared, **counts, broken=tuple(broken))


def compile_triton(paths: Sequence[Path]) -> list[Compiled]:
    """Compile the Triton kernels of these files, in every configuration that `benchmarks.computed.launches` uses."""
    if importlib.util.find_spec("triton") is None:
        raise Missing("triton is not installed: pip install 'triton==3.6.0'")
    if not paths:
        return []
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from benchmarks.computed import launches

    kernels = {str(path.resolve()): path for path in paths}
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_alone(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if kernel.fn.__code__.co_filename in kernels:
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **named)
            found[compiled.hash] = compiled

    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver = mock.patch.object(triton.runtime.driver, "_active", hopper)
    with driver, mock.patch.object(JITFunction, "run", compile_alone):
        launches.launch_everything()
    rows = []
    for file, path in kernels.items():
        own = [compiled for compiled in found.values() if compiled.src.fn.fn.__code__.co_filename == file]
        names = set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
        if idle := names - {compiled.src.fn.__name__ for compiled in own}:
            raise SystemExit(
                f"error: {path.name}: no recipe and no case of a declared operator launches {', '.join(sorted(idle))}: "
                "add cases to its operators.declare"
            )
        rows += [_judge_triton(path.name, compiled) for compiled in own]
    return rows


def _judge_triton(file: str, compiled: Any) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas

    kernel, kinds, ptx = compiled.src.fn, " ".join(map(str, compiled.src.signature.values())), compiled.asm["ptx"]
    constants = {kernel.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    parts = [kernel.__name__.removesuffix("_kernel"), *re.findall(r"bf16|fp16|fp32", kinds)[:1]]
    for name, value in constants.items():
        # name only constants in capitals, because Triton also turns integer arguments that equal 1 into constants
        if name.isupper() and value is not False:
            parts.append(name.lower() if value is True else f"{name.lower()}={value}")
    promises = ["tma"] if "tensordesc" in kinds else []
    # float32 products do not use tensor cores
    if re.search(r"tt\.dot .*: tensor<\w+x(bf16|f16)> \*", compiled.asm["ttir"]):
        promises.append("wgmma")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(ptx)
        log = _run(get_ptxas(90).path, "-v", f"--gpu-name=sm_{ARCHITECTURE}", str(text), "-o", os.devnull)
    return judge(file, " ".join(parts), ptx, log, compiled.metadata.shared, promises)


def find_nvcc() -> str:
    """The path of nvcc: in CUDA_HOME if that is set, otherwise in PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise Missing(f"no {' and no '.join(places)}: install a CUDA toolkit and set CUDA_HOME to it")
    return nvcc


def compile_cuda(paths: Sequence[Path]) -> list[Compiled]:
    nvcc = find_nvcc()
    found = []
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            keep = ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin"]
            log = _run(nvcc, *NVCC_FLAGS, "-cubin", "-Xptxas", "-v", *keep, str(path))
            ptx = "".join(file.read_text() for file in Path(folder).glob("*.ptx"))
        found += judge_cuda(path.name, ptx, log)
    return found


def judge_cuda(file: str, ptx: str, log: str) -> list[Compiled]:
    """Apply `judge` to each kernel of one .cu file."""
    texts = dict(re.findall(r"\.entry\s+(\w+)(.*?)(?=\.entry\s|\Z)", ptx, re.DOTALL))
    parts = re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL)
    return [judge(file, _readable(name), texts[name], part) for name, part in parts]


def _readable(name: str) -> str:
    filt = shutil.which("c++filt")
    text = _run(filt, name).strip() if filt else name
    return re.sub(r"^void |\(anonymous namespace\)::|\(.*", "", text)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def render(rows: Sequence[Compiled]) -> str:
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{'kernel':<{width}}  registers  spilled B  shared B  wgmma  tma  file"]
    for row in rows:
        numbers = f"{row.registers:>9}  {row.spilled_bytes:>9}  {row.shared_bytes:>8}  {row.wgmma:>5}  {row.tma:>3}"
        verdict = f"  BROKEN: {', '.join(row.broken)}" if row.broken else ""
        lines.append(f"{row.name:<{width}}  {numbers}  {row.file}{verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description="Compile every Triton kernel in every configuration that is launched, and every CUDA kernel, for sm_90, "
        "without a GPU. List registers, spills, shared memory, wgmma and TMA instructions, and check them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="*_triton.py and *.cu; default: all that ship")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    # kernels imported with TRITON_INTERPRET=1 cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    files = options.files or sorted([*ROOT.glob("golf_kernels/*_triton.py"), *ROOT.glob("csrc/*.cu")])
    rows: list[Compiled] = []
    missing: dict[str, str] = {}
    for part, suffix, compile_all in (("triton", ".py", compile_triton), ("cuda", ".cu", compile_cuda)):
        try:
            rows += compile_all([file for file in files if file.suffix == suffix])
        except Missing as absence:
            missing[part] = str(absence)
    if options.json:
        print(json.dumps({"kernels": [asdict(row) for row in rows], "missing": missing}, indent=2))
    else:
        print(render(rows))
    for part, why in missing.items():
        print(f"{part}: not compiled: {why}", file=sys.stderr)
    broken = sum(bool(row.broken) for row in rows)
    print(f"{len(rows)} kernels compiled for sm_{ARCHITECTURE}, {broken} with a failed check", file=sys.stderr)
    return 1 if broken else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every kernel for a GPU without having one, and check the machine code: `python -m benchmarks aot`.

`benchmarks.computed.launches` launches each Triton kernel on tensors without data, and Triton compiles the kernel
instead of running it. The CUDA kernels are in `csrc/*.cu`: sm_90 GPUs run their machine code, and for other GPUs the
driver compiles their PTX for compute capability 8.0. `--arch` names the GPUs by compute capability, 90 for 9.0.

No kernel may spill registers or exceed the shared memory of its GPU. Triton kernels with 16-bit products must use the
tensor cores, and kernels with tensor descriptors must use TMA. On sm_90 two more checks concern wgmma
instructions, which run asynchronously:

- No wgmma may read its first operand from registers while a later one is pending, because the program may overwrite these
  registers too early (Triton 3.6, triton-lang/triton#9433). PTX leaves the result of such a product undefined.
- ptxas must not serialize wgmma instructions. That is only slow, not wrong, so a kernel must not avoid it by breaking
  the first rule.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""GPU architectures, and the most shared memory of a block on each, in KiB (NVIDIA's CUDA C++ Programming Guide)."""
NVCC_FLAGS = ["-O3", "-std=c++17"]
TENSOR_CORES = {9: ("wgmma", "wgmma.mma_async.sync"), 10: ("tcgen05", "tcgen05.mma")}
"""Major compute capability → the instruction of products, its short name and its PTX name. Other GPUs use `MMA`."""
MMA = ("mma", "mma.sync")
TMA = "cp.async.bulk.tensor."

EPILOG = "exit codes: 0 all checks passed, 1 a check failed, 2 a compiler is missing, so some kernels were not compiled"


class Missing(Exception):
    """A compiler is not installed. The message says how to install it."""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel in one configuration.

    Registers and spilled bytes (stores and loads) are per thread, shared bytes per block. For CUDA kernels the shared
    bytes exclude dynamic memory. `products` counts the PTX's tensor-core instructions, `tma` its TMA instructions.
    `broken` lists the failed checks.
    """

    arch: int
    file: str
    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: int
    tma: int
    broken: tuple[str, ...]


def judge(
    file: str,
    name: str,
    ptx: str,
    log: str,
    shared_bytes: int | None = None,
    *,
    arch: int = 90,
    promises: Iterable[str] = (),
    ttgir: str = "",
) -> Compiled:
    """Check the PTX of a kernel, its TTGIR (Triton only) and `log`, the output of `ptxas -v` for that kernel.

    If `shared_bytes` is None, the static shared memory in `log` counts. `promises` names what the PTX must contain:
    "products" means products on tensor cores, "tma" means TMA instructions.
    """
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"{file}, {name}: no register count in the output of ptxas -v: {log!r}")
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    static = re.search(r"(\d+) bytes smem", log)
    shared = shared_bytes if shared_bytes is not None else int(static[1]) if static else 0
    short, instruction = TENSOR_CORES.get(arch // 10, MMA)
    counts = {"products": ptx.count(instruction), "tma": ptx.count(TMA)}
    broken = [f"no {short if kind == 'products' else kind}" for kind in promises if not counts[kind]]
    # a product whose first operand is in registers and not in shared memory, and a wait that leaves products pending
    if re.search(r"warp_group_dot %.* : tensor<", ttgir) and re.search(
        r"warp_group_dot_wait .*pendings = [1-9]", ttgir
    ):
        broken.append("registers of a pending wgmma may be overwritten")
    # the text of a warning from ptxas
    if "wgmma.mma_async instructions are serialized" in log:
        broken.append("wgmma serialized")
    if spilled:
        broken.append(f"{spilled} spilled bytes")
    if shared > (limit := SHARED_KIB[arch] << 10):
        broken.append(f"{shared} bytes of shared memory, more than {limit}")
    return Compiled(arch, file, name, int(registers[1]), spilled, shared, **counts, broken=tuple(broken))


@contextlib.contextmanager
def _gpu(arch: int) -> Iterator[None]:
    """Make torch and Triton work as if this machine had a GPU of an architecture."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        # Triton keeps compiled kernels per device
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    capability = mock.patch.multiple(
        torch.cuda, is_available=lambda: True, get_device_capability=lambda device=None: divmod(arch, 10)
    )
    with mock.patch.object(triton.runtime.driver, "_active", driver), capability:
        yield


@contextlib.contextmanager
def _ptxas_logs() -> Iterator[None]:
    """Make Triton keep what `ptxas -v` prints with each compiled kernel, as `metadata.ptxas_log`."""
    from triton import knobs

    def keep_log(_backend: Any, stages: dict[str, Any], *_: Any) -> None:
        make = stages["cubin"]

        def make_with_log(ptx: str, metadata: dict[str, Any]) -> Any:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                cubin = make(ptx, metadata)
            metadata["ptxas_log"] = printed.getvalue()
            return cubin

        stages["cubin"] = make_with_log

    with knobs.runtime.scope(), knobs.nvidia.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = keep_log
        knobs.nvidia.dump_ptxas_log = True
        # kernels that are already in the usual cache folder have no log
        knobs.cache.dir = os.path.join(knobs.cache.dir, "aot")
        yield


def refused(arch: int) -> dict[str, str]:
    """Returns operator → why its Triton kernels cannot run on an architecture, for the operators that cannot."""
    from golf_kernels import dispatch, operators

    with_triton = {op for op, backend, _ in dispatch.registered() if backend == "triton"}
    with _gpu(arch):
        reasons = {
            name: dispatch.refusal(op, "triton")
            for name in operators.declared()
            for op in dispatch.members(name)
            if op in with_triton
        }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compile_triton(paths: Sequence[Path], arch: int = 90) -> list[Compiled]:
    """Compile the Triton kernels of these files, in every configuration that `benchmarks.computed.launches` uses."""
    if importlib.util.find_spec("triton") is None:
        raise Missing("triton is not installed: pip install 'triton==3.6.0'")
    if not paths:
        return []
    from triton.runtime.jit import JITFunction

    from benchmarks.computed import launches

    kernels = {str(path.resolve()): path for path in paths}
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_alone(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if kernel.fn.__code__.co_filename in kernels:
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **named)
            found[compiled.hash] = compiled

    without = refused(arch)
    with _gpu(arch), _ptxas_logs(), mock.patch.object(JITFunction, "run", compile_alone):
        launches.launch_everything(without)
    rows = []
    for file, path in kernels.items():
        own = [compiled for compiled in found.values() if compiled.src.fn.fn.__code__.co_filename == file]
        names = set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
        idle = names - {compiled.src.fn.__name__ for compiled in own}
        if idle and path.stem.removesuffix("_triton") not in without:
            raise SystemExit(
                f"error: {path.name}: no recipe and no case of a declared operator launches {', '.join(sorted(idle))}: "
                "add cases to its operators.declare"
            )
        rows += [_judge_triton(path.name, compiled, arch) for compiled in own]
    return rows


def _judge_triton(file: str, compiled: Any, arch: int) -> Compiled:
    kernel, kinds = compiled.src.fn, " ".join(map(str, compiled.src.signature.values()))
    constants = {kernel.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    parts = [kernel.__name__.removesuffix("_kernel"), *re.findall(r"bf16|fp16|fp32", kinds)[:1]]
    for name, value in constants.items():
        # the source's constants are in capitals; Triton also makes constants of integer arguments that equal 1
        if name.isupper() and value is not False:
            parts.append(name.lower() if value is True else f"{name.lower()}={value}")
    promises = ["tma"] if "tensordesc" in kinds else []
    # float32 products do not use tensor cores
    if re.search(r"tt\.dot .*: tensor<\w+x(bf16|f16)> \*", compiled.asm["ttir"]):
        promises.append("products")
    texts = {"ptx": compiled.asm["ptx"], "ttgir": compiled.asm["ttgir"], "log": compiled.metadata.ptxas_log}
    return judge(file, " ".join(parts), shared_bytes=compiled.metadata.shared, arch=arch, promises=promises, **texts)


def find_nvcc() -> str:
    """Returns the path of nvcc: in CUDA_HOME if that is set, otherwise in PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise Missing(f"no {' and no '.join(places)}: install a CUDA toolkit and set CUDA_HOME to it")
    return nvcc


def compile_cuda(paths: Sequence[Path], arch: int = 90) -> list[Compiled]:
    nvcc = find_nvcc()
    # machine code for sm_90, as in setup.py; for others, the PTX of setup.py, compiled here instead of by the driver
    code = "arch=compute_90a,code=sm_90a" if arch == 90 else f"arch=compute_80,code=sm_{arch}"
    found = []
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            keep = ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin"]
            log = _run(nvcc, *NVCC_FLAGS, "-gencode", code, "-cubin", "-Xptxas", "-v", *keep, str(path))
            ptx = "".join(file.read_text() for file in Path(folder).glob("*.ptx"))
        found += judge_cuda(path.name, ptx, log, arch)
    return found


def judge_cuda(file: str, ptx: str, log: str, arch: int) -> list[Compiled]:
    """Apply `judge` to each kernel of one .cu file."""
    texts = dict(re.findall(r"\.entry\s+(\w+)(.*?)(?=\.entry\s|\Z)", ptx, re.DOTALL))
    parts = re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL)
    return [judge(file, _readable(name), texts[name], part, arch=arch) for name, part in parts]


def _readable(name: str) -> str:
    filt = shutil.which("c++filt")
    text = _run(filt, name).strip() if filt else name
    return re.sub(r"^void |\(anonymous namespace\)::|\(.*", "", text)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def render(rows: Sequence[Compiled], without: Mapping[int, Mapping[str, str]]) -> str:
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{'kernel':<{width}}  arch  registers  spilled B  shared B  products  tma  file"]
    for row in rows:
        numbers = f"{row.registers:>9}  {row.spilled_bytes:>9}  {row.shared_bytes:>8}  {row.products:>8}  {row.tma:>3}"
        verdict = f"  BROKEN: {', '.join(row.broken)}" if row.broken else ""
        lines.append(f"{row.name:<{width}}  {row.arch:>4}  {numbers}  {row.file}{verdict}")
    for arch, reasons in without.items():
        lines += [f"sm_{arch}: {name} refused: {reason}" for name, reason in reasons.items()]
    return "\n".join(lines)


def _architectures(text: str) -> list[int]:
    known = ", ".join(map(str, SHARED_KIB))
    names = text.split(",")
    if unknown := [name for name in names if name not in map(str, SHARED_KIB)]:
        raise argparse.ArgumentTypeError(
            f"expected architectures among {known}, separated by commas, found {unknown[0]!r}"
        )
    return [int(name) for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks aot",
        description="Compile every Triton kernel in every configuration that is launched, and every CUDA kernel, without a "
        "GPU. List registers, spills, shared memory, tensor-core and TMA instructions, and check them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="*_triton.py and *.cu; default: all that ship")
    parser.add_argument(
        "--arch",
        type=_architectures,
        default=[90],
        help=f"GPU architectures among {', '.join(map(str, SHARED_KIB))}; default: 90",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    # kernels imported with TRITON_INTERPRET=1 cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    files = options.files or sorted([*ROOT.glob("golf_kernels/*_triton.py"), *ROOT.glob("csrc/*.cu")])
    rows: list[Compiled] = []
    missing: dict[str, str] = {}
    for part, suffix, compile_all in (("triton", ".py", compile_triton), ("cuda", ".cu", compile_cuda)):
        try:
            for arch in options.arch:
                rows += compile_all([file for file in files if file.suffix == suffix], arch)
        except Missing as absence:
            missing[part] = str(absence)
    without = {} if "triton" in missing else {arch: refused(arch) for arch in options.arch}
    if options.json:
        report = {"kernels": [asdict(row) for row in rows], "refused": without, "missing": missing}
        print(json.dumps(report, indent=2))
    else:
        print(render(rows, without))
    for part, why in missing.items():
        print(f"{part}: not compiled: {why}", file=sys.stderr)
    broken = sum(bool(row.broken) for row in rows)
    names = ", ".join(f"sm_{arch}" for arch in options.arch)
    print(f"{len(rows)} kernels compiled for {names}, {broken} with a failed check", file=sys.stderr)
    return 1 if broken else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

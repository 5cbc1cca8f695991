"""Every kernel that ships is compiled for sm_90, some for other GPUs, and their promises are checked; broken ones are seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot

ROOT = Path(__file__).resolve().parents[2]


KERNELS = """
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def square_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * n + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    y = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(4):
        y = tl.dot(x, tl.trans(x), y)
    tl.store(y_ptr + at, y)

@triton.jit
def other_kernel(x_ptr):
    tl.store(x_ptr, 0.0)

@triton.jit
def _load(desc, batch, time, head, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    return tl.reshape(desc.load([batch, time, head, 0]), (BLOCK_M, DIM)).to(tl.float32)

@triton.jit
def _along(x, direction):
    return tl.sum(x * direction, axis=1)[:, None]

# the forward kernel of an operator that was removed for its race (xsa_linear, at 0af82ef)
@triton.jit
def xsa_linear_kernel(
    output_desc, value_desc, weight_desc, y_desc, length, columns, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK_N)
    stretch, n = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK_N
    stretches = tl.cdiv(length, BLOCK_M)
    batch, time = stretch // stretches, stretch % stretches * BLOCK_M
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(HEADS):
        value = _load(value_desc, batch, time, head // GROUP, BLOCK_M, DIM)
        output = _load(output_desc, batch, time, head, BLOCK_M, DIM)
        direction = value * (1.0 / tl.maximum(tl.sqrt(_along(value, value)), eps))
        z = output - _along(output, direction) * direction
        product = tl.dot(z.to(weight_desc.dtype), weight_desc.load([n, head * DIM]).T, product)
    y_desc.store([batch, time, n], tl.reshape(product.to(y_desc.dtype), (1, BLOCK_M, BLOCK_N)))

def described(shape, block):
    return TensorDescriptor.from_tensor(torch.empty(shape, dtype=torch.bfloat16, device="meta"), block)

def launch(other):
    x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
    for block in (16, 64, 256):
        square_kernel[(1,)](x, torch.empty_like(x, dtype=torch.float32), 256, BLOCK=block, num_warps=4)
    heads, value = described((4, 1024, 8, 64), [1, 128, 1, 64]), described((4, 1024, 4, 64), [1, 128, 1, 64])
    weight, y = described((512, 512), [128, 64]), described((4, 1024, 512), [1, 128, 128])
    xsa_linear_kernel[(1,)](
        heads, value, weight, y, 1024, 512, 1e-6, HEADS=8, GROUP=2, DIM=64, BLOCK_M=128, BLOCK_N=128, num_warps=8
    )
    if other:
        other_kernel[(1,)](x)
"""
# one process, because importing torch and Triton takes seconds: all that ships for sm_90, a sample for the others, KERNELS
COMPILE = """
import contextlib, io, json, torch
from benchmarks import aot
from benchmarks.computed import launches
from golf_kernels import operators

def report(arch, *files):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            code = aot.main(["--json", "--arch", arch, *files])
    except SystemExit as error:
        return {"error": str(error)}
    return {"code": code, **json.loads(printed.getvalue())}

def one_case(name, wanted):
    operator = operators.declared()[name]
    case = next(case for case in operator.cases if wanted.items() <= case.items())

    def launch(without):
        assert name not in without
        with launches.on_backend("triton"):
            launches.launch_case(operator, case, launches._empty)

    launches.launch_everything = launch

found = {"shipped": report("90")}
wide = {"width": 512, "slope": 0.5, "norm_eps": 1e-6, "residual": "x"}
every_phase = {"coefficients": "aol", "compute_dtype": torch.bfloat16}
for arch, name, case in (("80", "newton_schulz", every_phase), ("100", "leaky_relu2_mlp", wide), ("120", "leaky_relu2_mlp", wide)):
    one_case(name, case)
    found[arch] = report(arch, f"golf_kernels/{name}_triton.py")
import square_triton
for name, other in (("broken", True), ("idle", False)):
    launches.launch_everything = lambda without: square_triton.launch(other)
    found[name] = report("90", square_triton.__file__)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "square_triton.py").write_text(KERNELS)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def broken(report, suffix):
    return [(row["name"], row["broken"]) for row in report["kernels"] if row["broken"] and row["file"].endswith(suffix)]


def test_triton_kernels_keep_their_promises(reports):
    report = reports["shipped"]
    assert report.get("error") is None
    assert "triton" not in report["missing"] and broken(report, ".py") == [] and report["refused"] == {"90": {}}
    listed = {row["file"] for row in report["kernels"]}
    assert {path.name for path in ROOT.glob("golf_kernels/*_triton.py")} <= listed
    # a launch whose address or size is sometimes a multiple of 16 and sometimes not compiles for nothing
    names = [row["name"] for row in report["kernels"] if row["file"].endswith(".py")]
    assert len(set(names)) == len(names)


def test_cuda_kernels_keep_their_promises(reports):
    report = reports["shipped"]
    if "cuda" in report["missing"]:
        pytest.skip(report["missing"]["cuda"])
    assert broken(report, ".cu") == []
    assert {path.name for path in ROOT.glob("csrc/*.cu")} <= {row["file"] for row in report["kernels"]}


def test_other_gpus_get_tiles_and_registers_of_their_own(reports):
    for arch, limit in (("80", 163), ("100", 227), ("120", 99)):
        report = reports[arch]
        assert (report.get("error"), report["code"], broken(report, ".py")) == (None, 0, [])
        # 99, 163 and 227 KB: table "Technical Specifications per Compute Capability" of NVIDIA's CUDA guide
        assert all(row["arch"] == int(arch) and row["shared_bytes"] <= limit * 1024 for row in report["kernels"])
        assert any(row["products"] for row in report["kernels"])
    assert set(reports["80"]["refused"]["80"]) == {"leaky_relu2_mlp", "linear_residual"} and reports["120"][
        "refused"
    ] == {"120": {}}
    # sm_120 has no room for the wide tile
    widths = [{row["name"].partition("block_n=")[2][:3] for row in reports[arch]["kernels"]} for arch in ("100", "120")]
    assert widths == [{"", "256"}, {"", "128"}]


def test_broken_promises_of_triton_kernels_are_seen(reports):
    report = reports["broken"]
    rows = {row["name"]: row for row in report["kernels"]}
    small, good, large = (rows.pop(f"square bf16 block={block}") for block in (16, 64, 256))
    assert report["code"] == 1 and report["missing"] == {} and rows.pop("other bf16")["broken"] == []
    assert good["broken"] == [] and good["products"] > 0 and good["spilled_bytes"] == 0
    assert good["shared_bytes"] > 0 and 16 < good["registers"] <= 255
    # fewer rows than a warp group's instruction has
    assert small["broken"] == ["no wgmma"]
    # what spills accumulators serializes products too
    assert large["broken"] == ["wgmma serialized", f"{large['spilled_bytes']} spilled bytes"]
    # this kernel has no other fault: it waits for no wgmma, and so overwrites what a wgmma still reads
    ((name, racing),) = rows.items()
    assert name.startswith("xsa_linear bf16") and racing["broken"] == [
        "registers of a pending wgmma may be overwritten"
    ]
    assert reports["idle"]["error"].startswith(
        "error: square_triton.py: no recipe and no case of a declared operator launches other_kernel: add"
    )


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_broken_promises_of_cuda_kernels_are_seen(tmp_path, monkeypatch, capsys):
    # main removes it, and the tests after this one need it
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    source = tmp_path / "spill.cu"
    lines = [f"    float v{i} = p[{i}];" for i in range(300)]
    lines += ["    __syncthreads();", *(f"    p[{i}] = v{i} * v{(i + 7) % 300};" for i in range(300))]
    body = "\n".join(lines)
    small = (
        "__global__ void fits(float* p) { __shared__ float s[32]; s[threadIdx.x] = *p; __syncthreads(); *p = s[1]; }"
    )
    source.write_text(f"{small}\n__global__ void spills(float* p) {{\n{body}\n}}\n")
    assert aot.main(["--json", str(source)]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["kernels"]}
    assert rows["fits"]["broken"] == [] and rows["fits"]["shared_bytes"] == 128
    assert rows["spills"]["spilled_bytes"] > 0 and rows["spills"]["broken"]
    source.write_text("not C++")
    with pytest.raises(SystemExit, match="not C"):
        aot.main(["--json", str(source)])


def test_a_missing_compiler_is_named(tmp_path, monkeypatch, capsys):
    source = tmp_path / "empty.cu"
    source.write_text("")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert aot.main(["--json", str(source)]) == 2
    output, errors = capsys.readouterr()
    report = json.loads(output)
    assert report["kernels"] == []
    assert "no /nowhere/bin/nvcc: install a CUDA toolkit" in errors and "cuda" in report["missing"]
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aot.Missing, match=r"pip install 'triton==3\.6\.0'"):
        aot.compile_triton([])


def test_shared_memory_beyond_the_gpus_is_a_broken_promise():
    log = "Used 32 registers, used 1 barriers, 12 bytes spill stores, 8 bytes spill loads"
    row = aot.judge("f.cu", "k", "", log, 232_449)
    assert row.broken == ("20 spilled bytes", "232449 bytes of shared memory, more than 232448")
    assert aot.judge("f.cu", "k", "", "Used 8 registers", 232_448).broken == ()
    (said,) = aot.judge("f.cu", "k", "", "Used 8 registers", 101_377, arch=120).broken
    assert said == "101377 bytes of shared memory, more than 101376"
    for arch, instruction, short in (
        (90, "wgmma.mma_async.sync", "wgmma"),
        (100, "tcgen05.mma", "tcgen05"),
        (89, "mma.sync", "mma"),
    ):
        for ptx, missing in ((instruction, ("no tma",)), ("cp.async.bulk.tensor.", (f"no {short}",))):
            row = aot.judge("f.cu", "k", ptx, "Used 8 registers", 0, arch=arch, promises=["products", "tma"])
            assert row.broken == missing
    log = "Used 8 registers\nPotential Performance Loss: wgmma.mma_async instructions are serialized due to branches"
    assert aot.judge("f.cu", "k", "", log, 0).broken == ("wgmma serialized",)
    with pytest.raises(ValueError, match="no register count"):
        aot.judge("f.cu", "k", "", "", 0)


def test_an_unknown_architecture_is_named(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--arch", "90,75"])
    assert "among 80, 86, 89, 90, 100, 120, separated by commas, found '75'" in capsys.readouterr().err

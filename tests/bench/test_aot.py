"""Every kernel that ships is compiled for sm_90, and its promises are checked; broken ones are seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, command=("-m", "benchmarks.aot"), **environment):
    kept = {name: value for name, value in os.environ.items() if name not in environment}
    line = [sys.executable, *command, "--json", *map(str, arguments)]
    result = subprocess.run(line, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
    report = json.loads(result.stdout) if result.stdout.startswith("{") else None
    return result.returncode, report, result.stderr


@pytest.fixture(scope="module")
def shipped():
    return run()


def broken(report, suffix):
    return [(row["name"], row["broken"]) for row in report["kernels"] if row["broken"] and row["file"].endswith(suffix)]


def test_triton_kernels_keep_their_promises(shipped):
    _, report, errors = shipped
    assert report is not None, errors
    assert "triton" not in report["missing"] and broken(report, ".py") == []
    listed = {row["file"] for row in report["kernels"]}
    assert {path.name for path in ROOT.glob("golf_kernels/*_triton.py")} <= listed
    # a launch whose address or size is sometimes a multiple of 16 and sometimes not compiles for nothing
    names = [row["name"] for row in report["kernels"] if row["file"].endswith(".py")]
    assert len(set(names)) == len(names)


def test_cuda_kernels_keep_their_promises(shipped):
    _, report, errors = shipped
    assert report is not None, errors
    if "cuda" in report["missing"]:
        pytest.skip(report["missing"]["cuda"])
    assert broken(report, ".cu") == []
    assert {path.name for path in ROOT.glob("csrc/*.cu")} <= {row["file"] for row in report["kernels"]}


KERNELS = """
import torch
import triton
import triton.language as tl

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

def launch():
    x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
    for block in (16, 64, 256):
        square_kernel[(1,)](x, torch.empty_like(x, dtype=torch.float32), 256, BLOCK=block, num_warps=4)
    other_kernel[(1,)](x)
"""
LAUNCHED = """
import importlib, sys
from benchmarks import aot
from benchmarks.computed import launches
launches.launch_everything = lambda: importlib.import_module("square_triton").launch()
sys.exit(aot.main())
"""


def test_broken_promises_of_triton_kernels_are_seen(tmp_path):
    source = tmp_path / "square_triton.py"
    source.write_text(KERNELS)
    surroundings = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code, report, _ = run(source, command=("-c", LAUNCHED), **surroundings)
    rows = {row["name"]: row for row in report["kernels"]}
    small, good, large = (rows[f"square bf16 block={block}"] for block in (16, 64, 256))
    assert (
        code == 1
        and report["missing"] == {}
        and set(rows) == {row["name"] for row in (small, good, large)} | {"other bf16"}
    )
    assert good["broken"] == [] and good["wgmma"] > 0 and good["spilled_bytes"] == 0
    assert good["shared_bytes"] > 0 and 16 < good["registers"] <= 255
    # fewer rows than a warp group's instruction has
    assert small["broken"] == ["no wgmma"]
    # what spills accumulators serializes products too
    assert large["broken"] == ["wgmma serialized", f"{large['spilled_bytes']} spilled bytes"]
    source.write_text(KERNELS.replace("    other_kernel[(1,)](x)\n", ""))
    code, report, errors = run(source, command=("-c", LAUNCHED), **surroundings)
    assert code == 1 and report is None
    assert "square_triton.py: no recipe and no case of a declared operator launches other_kernel" in errors


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


def test_shared_memory_beyond_hopper_is_a_broken_promise():
    log = "Used 32 registers, used 1 barriers, 12 bytes spill stores, 8 bytes spill loads"
    row = aot.judge("f.cu", "k", "", log, aot.SHARED_LIMIT_BYTES + 1)
    assert row.broken == ("20 spilled bytes", "232449 bytes of shared memory, more than 232448")
    assert aot.judge("f.cu", "k", "", "Used 8 registers", aot.SHARED_LIMIT_BYTES).broken == ()
    assert aot.judge("f.cu", "k", "wgmma.mma_async.sync", "Used 8 registers", 0, ["wgmma", "tma"]).broken == ("no tma",)
    log = "Used 8 registers\nPotential Performance Loss: wgmma.mma_async instructions are serialized due to branches"
    assert aot.judge("f.cu", "k", "", log, 0).broken == ("wgmma serialized",)
    with pytest.raises(ValueError, match="no register count"):
        aot.judge("f.cu", "k", "", "", 0)

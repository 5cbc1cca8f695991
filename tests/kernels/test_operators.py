"""What an operator's file declares reaches everything that goes through all operators, without another file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_truth import random

from golf_kernels import dispatch, operators

ROOT = Path(__file__).resolve().parents[2]


def test_every_registered_operator_is_declared():
    declared = operators.declared()
    assert sorted(op for name in declared for op in dispatch.members(name)) == sorted(dispatch.describe())
    # an operator with Triton kernels says where it is called, or nothing would measure a step with it
    assert all(o.called_by for o in declared.values() if "triton" in dispatch.available_backends(o.name))


@pytest.mark.parametrize(
    ("capability", "without"),
    [
        ((7, 5), {"newton_schulz", "muon_step", "softcapped_cross_entropy", "window_nll", "mix_rms_norm", "qk_norm_rope", "qkv_norm_rope", "xsa", "leaky_relu2_mlp", "linear_residual"}),
        ((8, 0), {"leaky_relu2_mlp", "linear_residual"}),
        ((8, 9), {"leaky_relu2_mlp", "linear_residual"}),
        ((9, 0), set()),
        ((10, 0), set()),
        ((12, 0), set()),
    ],
)  # fmt: skip
def test_each_gpu_has_the_triton_kernels_that_it_can_run(capability, without, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with_triton = {op for op, backend, _ in dispatch.registered() if backend == "triton"}
    refused = {
        name: dispatch.refusal(op, "triton")
        for name in operators.declared()
        for op in dispatch.members(name)
        if op in with_triton
    }
    assert {name for name, reason in refused.items() if reason} == without
    needed = "8.0" if capability < (8, 0) else "9.0 for TMA"
    said = f"its Triton kernels need compute capability {needed}, this GPU has {capability[0]}.{capability[1]}"
    with_tma = ("leaky_relu2_mlp", "linear_residual")
    assert {reason for name, reason in refused.items() if reason and name not in with_tma} <= {said}
    assert all(refused[name] in (None, said.replace("8.0,", "9.0 for TMA,")) for name in with_tma)


def test_results_and_gradients_of_a_call():
    def function(x, pair, count):
        return x * pair[0] + count, pair[1].detach()

    x, first, second = (random(3, seed=seed).requires_grad_(seed < 2) for seed in range(3))
    inputs = {"x": x, "pair": [first, second], "count": 2}
    upstream = operators.upstream_gradients(function, inputs, lambda *shape: torch.full(shape, 3.0))
    results = operators.run(function, inputs, upstream)
    assert all(torch.equal(*pair) for pair in zip(results, (x * first + 2, second, 3 * first, 3 * x), strict=True))
    assert not any(result.requires_grad for result in results)


def test_exact_inputs_are_float64_leaves():
    x = torch.tensor([1 / 3], dtype=torch.float32).requires_grad_()
    given = {"x": x, "indices": [torch.tensor([1])], "slope": 0.5}
    found = operators.exact(given)
    assert found["x"].dtype == torch.float64 and found["x"].item() == x.item()
    assert found["x"].requires_grad and found["x"].is_leaf
    assert found["indices"][0].dtype == torch.int64 and found["slope"] == 0.5
    assert operators.exact(given, rounded_to=torch.bfloat16)["x"].item() == x.bfloat16().item()


# as the docstring of dispatch.py asks for them; the tests and the row of the README have no reader here
NEW_FILES = {
    "golf_kernels/halved.py": '''
import torch

from golf_kernels import dispatch, operators


def halved(x):
    """Half of x."""
    return torch.ops.golf.halved(x)


def _triton(x):
    from golf_kernels import halved_triton

    return halved_triton.halved(x)


def _supports(*args):
    return dispatch.triton_problem() or (dispatch.elementwise_problem("x", args[0]) if args else None)


def _inputs(make, rows=5, width=7):
    return {"x": make(rows, width).requires_grad_()}


dispatch.define("halved", "(Tensor x) -> Tensor", reference=lambda x: x / 2, fake=torch.empty_like)
dispatch.define_backward(
    "halved",
    "(Tensor dy) -> Tensor",
    reference=lambda dy: dy / 2,
    fake=torch.empty_like,
    setup_context=lambda ctx, inputs, output: None,
    backward=lambda ctx, dy: torch.ops.golf.halved_backward(dy.contiguous()),
)
for _op in ("halved", "halved_backward"):
    dispatch.register(_op, "triton", _triton, supports=_supports)
operators.declare(
    operators.Operator(
        "halved",
        halved,
        _inputs,
        cases=[{"rows": 4096, "width": 512}],
        members=("halved", "halved_backward"),
        called_by="model",
    )
)
''',
    "golf_kernels/halved_triton.py": """
import torch
import triton
import triton.language as tl


@triton.jit
def halve_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < count) * 0.5, mask=at < count)


def halved(x):
    y = torch.empty_like(x)
    halve_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y
""",
    "benchmarks/bench_halved.py": '''
"""Half of a tensor."""

from typing import NamedTuple

from benchmarks.measure.chains import Chain


class Shape(NamedTuple):
    rows: int
    width: int


CHAIN = Chain(
    "halved",
    plain=lambda x: x / 2,
    traffic=lambda shape: {"triton": dict.fromkeys(("forward", "backward"), 4.0 * shape.rows * shape.width)},
    shapes=(Shape(4096, 512),),
    tiny=Shape(5, 7),
)

if __name__ == "__main__":
    CHAIN.main("bench_halved", "Half of a tensor.", None)
''',
}
LAUNCH_CASES = """
import sys
from benchmarks import aot
from benchmarks.computed import launches
launches.launch_everything = launches.launch_cases
sys.exit(aot.main())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the packages with an operator more."""
    tree = tmp_path_factory.mktemp("tree")
    for package in ("golf_kernels", "benchmarks"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "train").symlink_to(ROOT / "train")
    for path, text in NEW_FILES.items():
        (tree / path).write_text(text)
    with open(tree / "golf_kernels" / "__init__.py", "a") as file:
        file.write("from golf_kernels.halved import halved\n")
    return tree


def run(tree, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "1", "GOLF_BACKEND": "", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_the_doctor_checks_a_new_operator_and_golf_backend_knows_it(tree):
    found = run(tree, "-m", "golf_kernels", "--json", GOLF_BACKEND="halved=triton")
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout)
    checks = {(check["op"], check["backend"], check["device"]) for check in data["checks"] if check["passed"]}
    assert {("halved", "torch", "cpu"), ("halved", "triton", "cpu")} <= checks
    for op in ("halved", "halved_backward"):
        assert data["operators"][op]["chosen"]["cpu"] == {"backend": "triton", "reason": "forced by GOLF_BACKEND"}
    assert "golf_kernels.halved" not in sys.modules and "halved" not in dispatch.describe()


def test_a_new_kernel_is_compiled_ahead_of_time(tree):
    found = run(tree, "-c", LAUNCH_CASES, "--json", tree / "golf_kernels" / "halved_triton.py")
    assert found.returncode == 0, found.stderr
    (row,) = json.loads(found.stdout)["kernels"]
    assert (row["file"], row["name"], row["broken"]) == ("halved_triton.py", "halve bf16 block=1024", [])


def test_a_new_kernel_is_measured(tree):
    found = run(tree, "-m", "benchmarks.bench_halved", "--device", "cpu", "--tiny", "--rounds", "1", "--warmup-ms", "1")
    assert found.returncode == 0, found.stderr
    assert "triton is" in found.stdout and "times as fast as 'compile'" in found.stdout


def test_a_misspelt_name_of_a_new_operator_is_found(tree):
    found = run(tree, "-c", "from golf_kernels import dispatch; dispatch.validate()", GOLF_BACKEND="halfed=triton")
    assert found.returncode == 1 and "unknown operator 'halfed'; did you mean 'halved'?" in found.stderr

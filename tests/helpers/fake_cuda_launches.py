"""Tests of every kernel's launch and of the captured optimizer step, on tensors without data.

`test_fake_cuda.py` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fake_cuda import GRAPHS, Batches, Graph, empty, gpu_config, gpu_model, recorded_capture
from torch import Tensor

import golf_kernels
from benchmarks.computed.fake_cuda import tensors_without_data
from benchmarks.computed.launches import launch_case, on_backend
from golf_kernels import dispatch, operators
from train.loop import training_step
from train.optimize.groups import build_optimizers


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with tensors_without_data():
        yield


class Launch:
    """Replaces a Triton kernel and checks the grid and the arguments of each launch."""

    seen: ClassVar[set[str]] = set()

    def __init__(self, kernel: Any) -> None:
        self.name = kernel.__name__
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert isinstance(grid, tuple) and all(isinstance(n, int) and n > 0 for n in grid)
        assert grid[0] < 2**31 and all(n < 2**16 for n in grid[1:])

        def launch(*arguments: Any, **named: Any) -> None:
            given = dict(zip(self.arg_names, arguments, strict=False)) | named
            options = set(given) - set(self.arg_names)
            assert set(self.arg_names) <= set(given), (self.name, set(self.arg_names) - set(given))
            assert options <= {"num_warps", "num_stages", "maxnreg"}
            tensors = [getattr(value, "base", value) for value in given.values()]
            devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor)}
            assert devices == {GUARDS[-1]}, (self.name, devices, GUARDS)
            Launch.seen.add(self.name)

        return launch


GUARDS: list[torch.device] = []
WAITS: list[Any] = []
# the kernel files are found by name, so a new one is tested too
MODULES = sorted(
    path.name.removesuffix("_triton.py") for path in Path(golf_kernels.__file__).parent.glob("*_triton.py")
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Replace every kernel by a `Launch`.

    Yields a dict in which a test says whether the stream is capturing a graph.
    """
    stream = {"capturing": False}

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        GUARDS.append(tensor.device)
        yield
        GUARDS.pop()

    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream["capturing"])
    monkeypatch.setattr(dispatch, "triton_problem", lambda **_: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Tensor, "data_ptr", address_of)
    for name in MODULES:
        module = importlib.import_module(f"golf_kernels.{name}_triton")
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, Launch(kernel))
        if hasattr(module, "KERNELS"):
            replaced = {product: Launch(kernel) for product, kernel in module.KERNELS.items()}
            monkeypatch.setattr(module, "KERNELS", replaced)
    monkeypatch.setattr(torch.cuda, "Event", lambda: types.SimpleNamespace(record=lambda on: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda on: types.SimpleNamespace(wait_event=WAITS.append))
    Launch.seen.clear()
    WAITS.clear()
    yield stream
    # these caches would keep tensors of this test
    newton_schulz_triton = importlib.import_module("golf_kernels.newton_schulz_triton")
    muon_triton = importlib.import_module("golf_kernels.muon_triton")
    for cached in (newton_schulz_triton.make_plan, newton_schulz_triton._send, muon_triton.ratio_table):
        cached.cache_clear()


def address_of(tensor: Tensor) -> int:
    # an allocator's addresses are multiples of 512
    storage: int = tensor.untyped_storage()._cdata
    return 512 * (storage % 2**40) + int(tensor.storage_offset()) * tensor.element_size()


def test_every_launch_has_a_grid_all_arguments_and_the_device_of_its_tensors(launches: dict[str, bool]) -> None:
    # a device that is not the current one, unless this machine has only one
    second = torch.device("cuda", int(torch.cuda.device_count() != 1))

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=second)

    with on_backend("triton"):
        for operator in operators.declared().values():
            if "triton" in dispatch.available_backends(operator.name):
                for case in ({}, *operator.cases):
                    results = launch_case(operator, case, make)
                    assert {result.device for result in results} == {second} and not GUARDS
    kernels = {
        attribute
        for name in MODULES
        for attribute in vars(importlib.import_module(f"golf_kernels.{name}_triton"))
        if attribute.endswith("_kernel")
    }
    assert Launch.seen == kernels


@torch.no_grad()
def test_who_finds_a_table_waits_until_it_has_arrived(launches: dict[str, bool]) -> None:
    arguments = ([empty(70, 150)], (3.4, -4.8, 2.0), 1e-7, "frobenius", torch.bfloat16)
    for capturing, waits in ((False, 1), (False, 2), (True, 2)):
        launches["capturing"] = capturing
        dispatch.run_on("triton", "newton_schulz", *arguments)
        assert len(WAITS) == waits and len(set(map(id, WAITS))) == 1


@torch.no_grad()
def test_nothing_new_is_copied_into_a_graph(launches: dict[str, bool]) -> None:
    matrices, coefficients = [empty(70, 150)], (3.4, -4.8, 2.0)
    launches["capturing"] = True
    # the kernel must refuse a new shape and then, when the shape is known, a new address
    for _ in range(2):
        with pytest.raises(RuntimeError, match="run once with the same tensors before"):
            dispatch.run_on("triton", "newton_schulz", matrices, coefficients, 1e-7, "frobenius", torch.bfloat16)
        launches["capturing"] = False
        dispatch.run_on("triton", "newton_schulz", [empty(70, 150)], coefficients, 1e-7, "frobenius", torch.bfloat16)
        launches["capturing"] = True


@pytest.mark.parametrize(
    ("system", "backend", "graph"),
    [("sp2048", "triton", "auto"), ("sp4096", "triton", "auto"), ("sp2048", "torch", "on")],
)
def test_a_captured_step_is_replayed_from_the_third_one_on(
    system: str, backend: str, graph: str, launches: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        launches["capturing"] = True
        with recorded_capture(graph, capture_error_mode):
            yield
        launches["capturing"] = False

    GRAPHS.clear()
    monkeypatch.setenv("GOLF_BACKEND", f"torch,muon_step={backend}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    config = gpu_config(system, optimizer_graph=graph)
    model = gpu_model(config)
    optimizers = build_optimizers(model, config)
    replays = []
    for step in range(5):
        training_step(optimizers, model, Batches(), False, 1.0 - step / 10, 0.9 + step / 100)
        replays.append(sum(graph.replays for graph in GRAPHS))
    assert replays == [0, 1, 2, 3, 4] and len(GRAPHS) == 1
    # after the warm-up the run uses the warm-up's graph
    optimizers.reset()
    training_step(optimizers, model, Batches(), False, 1.0, 0.9)
    assert len(GRAPHS) == 1 and GRAPHS[0].replays == 5

"""The kernels that torch.compile would generate for an H100, read from Inductor's schedule without a GPU.

Inductor gets the properties of an H100 and plans as usual, from decompositions to fusion. Then the model calls, instead
of compiled code, a function that returns tensors without data. `benchmarks.computed.recorder` lists the kernels of
golf_kernels' operators.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.computed.recorder import operator_kernels
from benchmarks.measure.devices import Kernel

# the properties of an H100 SXM that Inductor reads; an H200 differs only in memory
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    is_integrated=0,
    gcnArchName="",
)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Scheduled(types.SimpleNamespace):
    """One node of Inductor's schedule.

    An operator of golf_kernels may have several kernels, any other node has at most one. `reads` and `writes` map
    buffer names to bytes.
    """

    kernels: list[Kernel]
    reads: dict[str, float]
    writes: dict[str, float]


class _OnHost(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {}))


@contextlib.contextmanager
def planning_for_an_absent_gpu(
    plan: Callable[[list[Scheduled]], Callable[[], None]],
) -> Iterator[None]:
    """Let torch.compile plan for an H100 on any machine.

    `plan` gets the schedule of each compiled graph and returns a function. That function is called whenever the graph
    would run.
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.graph import GraphLowering

    fold = UniformValueConstantFolder.run

    def fold_on_host(folder: Any, *args: Any) -> Any:
        with _OnHost():
            return fold(folder, *args)

    def read(graph: Any) -> Any:
        graph._update_scheduler()
        called = plan(read_schedule(graph))
        output = next(node for node in graph.module.graph.nodes if node.op == "output")

        def call(args: list[Any]) -> list[Any]:
            args.clear()
            called()
            return [_without_data(node) for node in output.args[0]]

        return types.SimpleNamespace(call=call)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
            (torch.cuda, "get_device_capability", lambda device=None: (PROPERTIES.major, PROPERTIES.minor)),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            # CudaInterface keeps its own reference to this function
            (CudaInterface, "get_device_properties", staticmethod(lambda device=None: PROPERTIES)),
            (CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=True: True)),
            (UniformValueConstantFolder, "run", fold_on_host),
            (GraphLowering, "compile_to_module", read),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(config.patch(force_disable_caches=True))
        yield


def _without_data(node: Any) -> Any:
    value = node.meta["val"] if isinstance(node, torch.fx.Node) else node
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def read_schedule(graph: Any) -> list[Scheduled]:
    """Returns the nodes of a scheduled graph, in order.

    A generated kernel reads each addressed element once, and writes the values that later kernels read. Values that
    stay inside a kernel do not count.
    """
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    with V.set_graph_handler(graph):
        found = []
        for node in graph.scheduler.nodes:
            if isinstance(node, NopKernelSchedulerNode):
                # an empty buffer, or a concatenation whose inputs were written in place
                found.append(Scheduled(kernels=[], reads={}, writes=dict.fromkeys(node.get_buffer_names(), 0.0)))
            elif not node.is_extern():
                found.append(_compiled(node, graph))
            elif not isinstance(node.node, ir.MultiOutput):
                found.append(_extern(node))
        return found


def _bytes(node: Any, elements: float | None = None) -> float:
    size = math.prod(int(length) for length in node.get_size())
    return float((size if elements is None else min(size, elements)) * node.get_dtype().itemsize)


def _elements(dep: Any) -> int:
    """Returns the number of elements that a kernel addresses. For an indirect index, counts the lookups."""
    from torch._inductor.dependencies import MemoryDep

    if isinstance(dep, MemoryDep) and dep.is_indirect():
        return math.prod(int(size) for size in dep.size)
    return int(dep.numel_hint())


def _compiled(node: Any, graph: Any) -> Scheduled:
    from torch._inductor.dependencies import MemoryDep, WeakDep
    from torch._inductor.utils import get_fused_kernel_name

    inside = {n.get_name() for n in node.get_nodes()}
    own = set(node.get_buffer_names())
    reads: dict[str, float] = {}
    writes: dict[str, float] = {}
    addressed: dict[str, dict[Any, int]] = {}
    for dep in node.read_writes.reads:
        if dep.name not in own and not isinstance(dep, WeakDep):
            # a buffer to which the kernel adds in place is also read; its dependency has no index
            index = dep.index if isinstance(dep, MemoryDep) else None
            addressed.setdefault(dep.name, {})[index] = _elements(dep)
    for name, indices in addressed.items():
        buffer = _buffer(graph, name)
        if buffer is not None:
            reads[name] = _bytes(buffer, sum(indices.values()))
    for output in node.get_outputs():
        users = {user.node.get_name() for user in output.users}
        if not users - inside:
            continue
        name = output.get_name()
        changed = output.get_mutations()
        target = _buffer(graph, changed[0]) if changed else output.node
        addressed_here = sum(_elements(dep) for dep in node.read_writes.writes if dep.name == name)
        writes[name] = _bytes(target, addressed_here or None)
    kind = "red" if node.is_reduction() else "poi"
    name = f"triton_{kind}_{get_fused_kernel_name(node.get_nodes(), 'original_aten')}"
    return Scheduled(
        kernels=[Kernel(name, 0.0, sum(reads.values()) + sum(writes.values()))], reads=reads, writes=writes
    )


def _buffer(graph: Any, name: str) -> Any:
    found = graph.name_to_buffer.get(name) or graph.graph_inputs.get(name)
    return found if hasattr(found, "get_size") else None


def _extern(node: Any) -> Scheduled:
    from torch._inductor import ir

    called = node.node
    overload = getattr(called, "op_overload", None)
    inputs = {i.get_name(): _bytes(i) for i in called.inputs if isinstance(i, ir.IRNode) and hasattr(i, "get_size")}
    if isinstance(called.layout, ir.MultiOutputLayout):
        written = [user.node.node for user in node.outputs[0].users if hasattr(user.node, "node")]
        outputs = {o.get_name(): _bytes(o) for o in written if isinstance(o, ir.MultiOutput)}
    else:
        outputs = {called.get_name(): _bytes(called)}
    if getattr(overload, "namespace", "") in ("golf", "fa3"):
        origin = next(node for node in called.origins if node.target is overload)
        values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in origin.args]
        with next(v.fake_mode for v in values if isinstance(v, FakeTensor)):
            kernels = operator_kernels(overload, values)
        return Scheduled(kernels=kernels, reads=inputs, writes=outputs)
    name = (called.python_kernel_name or str(overload)).rpartition(".")[2]
    name = name if overload is None else overload._overloadpacket.__name__
    flops = 0.0
    if name in _PRODUCTS:
        left = called.inputs[-2]
        *_, depth = (int(n) for n in left.get_size())
        flops = 2.0 * math.prod(int(length) for length in called.get_size()) * depth
    return Scheduled(
        kernels=[Kernel(f"aten::{name}", flops, sum(inputs.values()) + sum(outputs.values()))],
        reads=inputs,
        writes=outputs,
    )

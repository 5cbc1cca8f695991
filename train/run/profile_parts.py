"""Puts ranges into a profiler's trace that name the part of the model that launches each kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.profiler import record_function


@contextlib.contextmanager
def named_ranges(model: nn.Module) -> Iterator[None]:
    """Inside the context, put a range with the module's name around each module's forward pass.

    `model` is not compiled.
    """
    ranges: list[Any] = []

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            ranges.append(record_function(name))
            ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class KernelRanges:
    """Opens the trace ranges of one call of a compiled graph.

    The compiled code makes and calls this object. If no profiler runs, the object does nothing.
    """

    def __init__(self) -> None:
        self._range: record_function | None = None

    def part(self, name: str) -> None:
        """Close the open range. If `name` is not empty, open a range with that name."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if name and torch._C._autograd._profiler_enabled():
            self._range = record_function(name)
            self._range.__enter__()


@functools.cache
def name_compiled_kernels(device: str) -> str | None:
    """Make torch.compile add ranges, named after parts of the model, to the graphs that it compiles for a device type.

    This affects all graphs that this process compiles from now on. A range surrounds the launches of consecutive
    kernels of one part, in the forward or backward pass. The kernels do not change. Graphs with ranges are not cached.

    Returns:
        None, or the reason why this version of torch is not supported.
    """
    # imported here, because only a profile of a compiled model needs these modules
    try:
        from torch._functorch import config as autograd_config
        from torch._inductor import config, debug
        from torch._inductor.codegen import common
        from torch._inductor.codegen.wrapper import PythonWrapperCodegen
        from torch._inductor.virtualized import V

        common.init_backend_registration()
        known = common.device_codegens[device]
        for owner, name in (
            (known, "wrapper_codegen"),
            (PythonWrapperCodegen, "write_provenance_debug_handle"),
            (PythonWrapperCodegen, "generate_return"),
            (debug, "_inductor_triton_kernel_to_post_grad_node_info"),
            (config.trace, "provenance_tracking_level"),
            (autograd_config, "enable_autograd_cache"),
        ):
            getattr(owner, name)
    except (ImportError, AttributeError, KeyError) as error:
        return f"the code generator of torch {torch.__version__} is not supported ({error})"

    class RangeWrapper(PythonWrapperCodegen):
        supports_caching = False

        def __init__(self) -> None:
            super().__init__()
            self._part = ""
            self.add_import_once(f"from {__name__} import KernelRanges")

        @staticmethod
        def create(is_subgraph: bool, *arguments: Any, **named: Any) -> PythonWrapperCodegen:
            if is_subgraph:
                subgraph: PythonWrapperCodegen = PythonWrapperCodegen.create(is_subgraph, *arguments, **named)
                return subgraph
            return RangeWrapper()

        # Inductor calls this before it writes a kernel's call
        def write_provenance_debug_handle(self, kernel_name: str, debug_handle: int | None = None) -> None:
            # look the table up at each call, because Inductor replaces it
            made_of = debug._inductor_triton_kernel_to_post_grad_node_info.get(f"{kernel_name}:{debug_handle}", [])
            nodes = {node.name: node for node in V.graph.graph.nodes}
            name = part_of(nodes[node] for node in made_of if node in nodes)
            if V.graph.is_backward:
                name += " backward"
            if name != self._part:
                if not self._part:
                    self.writeline("kernel_ranges = KernelRanges()")
                self.writeline(f"kernel_ranges.part({name!r})")
                self._part = name
            super().write_provenance_debug_handle(kernel_name, debug_handle)

        def generate_return(self, output_refs: list[str]) -> None:
            if self._part:
                self.wrapper_call.writeline("kernel_ranges.part('')")
            super().generate_return(output_refs)

    common.device_codegens[device] = dataclasses.replace(known, wrapper_codegen=RangeWrapper)
    # with this level, Inductor records the graph nodes of each kernel
    config.trace.provenance_tracking_level = 2
    # on torch 2.11 this cache may return graphs compiled without ranges
    autograd_config.enable_autograd_cache = False
    return None


def part_of(nodes: Iterable[fx.Node]) -> str:
    """Return the name of the model's part that a kernel computes. `nodes` are the graph nodes of the kernel.

    Nodes that are views are ignored unless all are views. The part "blocks.0" includes the part "blocks.0.mlp". If a
    kernel computes two parts, return both names. For more parts, return the first name and the number of other parts.
    For none, return "model".
    """
    nodes = list(nodes)
    names = {module_of(node) for node in nodes if not getattr(node.target, "is_view", False)} - {""}
    names = names or {module_of(node) for node in nodes} - {""}
    parts = sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))
    if not parts:
        return "model"
    return " + ".join(parts) if len(parts) < 3 else f"{parts[0]} + {len(parts) - 1} more"


def module_of(node: fx.Node) -> str:
    """Return the name of the module that a graph node belongs to, in the forward or backward pass; "" for the model."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values())), "")
    return re.sub(r"^L\['\w+'\]\.?", "", path)

"""A fake CUDA graph for a CPU. A capture records the operations, and a replay runs them on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class FakeGraph:
    """Replaces `torch.cuda.CUDAGraph`.

    A replay uses the Python numbers of the capture, but reads every tensor again.

    Attributes:
        launches: function, arguments, keyword arguments and result tensors of each operation.
        replays: the number of replays.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, places in self.launches:
            results = [leaf for leaf in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for place, result in zip(places, results if places else [], strict=True):
                place.copy_(result)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.launches = graph.launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        assert func.namespace != "c10d", f"{name}: a collective inside a graph"
        assert name != "_local_scalar_dense", "the host would wait inside a graph"
        if func.is_view or name.startswith(("empty", "detach")):
            return func(*args, **kwargs)
        if not func._schema.is_mutable:
            # a real capture computes nothing; here a first result gives the tensor that replays write to
            result = func(*args, **kwargs)
            places = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            self.launches.append((func, args, kwargs, places))
            return result
        self.launches.append((func, args, kwargs, []))
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return changed[0] if func._schema.returns else None


@contextlib.contextmanager
def _capture(graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    launch: Any = None
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from triton.runtime.interpreter import GridExecutor

            # kernels in Triton's interpreter are no operations of PyTorch, so their launches are recorded here
            def launch(self: Any, *args: Any, **kwargs: Any) -> None:
                graph.launches.append((run, (self, *args), kwargs, []))

            run = GridExecutor.__call__
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        stack.enter_context(_Capture(graph))
        yield


@contextlib.contextmanager
def fake_graphs() -> Iterator[list[FakeGraph]]:
    """Let `torch.cuda.CUDAGraph()` make `FakeGraph`s. Yields the list of those made."""
    made: list[FakeGraph] = []

    def make() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    with mock.patch.object(torch.cuda, "CUDAGraph", make), mock.patch.object(torch.cuda, "graph", _capture):
        yield made

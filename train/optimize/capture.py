"""The same work again and again, as a CUDA graph for as long as it touches the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Captured:
    """Calls a function, and replays a CUDA graph of it once it has run with the same tensors before.

    The first call with new tensors runs as it is: kernels are compiled and tables uploaded then. Numbers that change
    from call to call must be tensors on the device.

    Args:
        run: launches the work on the current stream.
        tensors: all tensors that outlive a call and whose memory the work touches, in a fixed order.
    """

    def __init__(self, run: Callable[[], object], tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._run = run
        self._tensors = tensors
        self._addresses: tuple[int, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        addresses = tuple(tensor.data_ptr() for tensor in self._tensors())
        if addresses != self._addresses:
            self._graph = None
            self._run()
            # the first step of an optimizer makes its moments
            self._addresses = tuple(tensor.data_ptr() for tensor in self._tensors())
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a loader's, may call CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
            self._graph = graph
        self._graph.replay()

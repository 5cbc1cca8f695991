"""The same work again and again, as a CUDA graph for as long as it touches the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from golf_kernels import dispatch
from train.common.errors import UserError
from train.config import Config


class GraphChoice(NamedTuple):
    """Whether the optimizer's step is replayed as CUDA graphs, and why."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'} ({self.reason})"


def choose_graph(config: Config, device: torch.device) -> GraphChoice:
    """What `optimizer_graph` means on a device, the same on every rank.

    Raises:
        UserError: a graph is asked for where there is no CUDA.
    """
    if config.optimizer_graph == "off":
        return GraphChoice(False, "as set")
    if device.type != "cuda":
        if config.optimizer_graph == "on":
            raise UserError(
                f"optimizer_graph: on needs a CUDA GPU, and this run is on {device.type}: set OPTIMIZER_GRAPH=auto or off"
            )
        return GraphChoice(False, "needs a CUDA GPU")
    if config.optimizer_graph == "on":
        return GraphChoice(True, "as set")
    if dispatch.choose("muon_step", device=device.type).backend == "triton":
        return GraphChoice(True, "muon_step runs on Triton")
    return GraphChoice(False, "muon_step runs on PyTorch, for which no graph has been measured")


class Captured:
    """Calls a function, and replays a CUDA graph of it once it has run with the same tensors before.

    The first call with new tensors runs as it is: kernels are compiled and tables uploaded then. Numbers that change
    from call to call must be tensors on the device.

    Args:
        run: launches the work on the current stream.
        tensors: all tensors that outlive a call and whose memory the work touches, in a fixed order.

    Attributes:
        run: as given.
    """

    def __init__(self, run: Callable[[], object], tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.run = run
        self._tensors = tensors
        self._addresses: tuple[int, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        addresses = tuple(tensor.data_ptr() for tensor in self._tensors())
        if addresses != self._addresses:
            self._graph = None
            self.run()
            # the first step of an optimizer makes its moments
            self._addresses = tuple(tensor.data_ptr() for tensor in self._tensors())
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a loader's, may call CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run()
            self._graph = graph
        self._graph.replay()

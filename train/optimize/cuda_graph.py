"""Replays a function as a CUDA graph, as long as its tensors keep their addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from golf_kernels import dispatch
from train.common.errors import UserError
from train.config import Config


class GraphChoice(NamedTuple):
    """Whether the optimizer's step is replayed as CUDA graphs, and the reason."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'} ({self.reason})"


def choose_graph(config: Config, device: torch.device) -> GraphChoice:
    """Decide what the setting `optimizer_graph` means on this device. All ranks decide the same.

    Raises:
        UserError: the setting is `on`, but the device is not CUDA.
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
    return GraphChoice(False, "muon_step runs on PyTorch, where no graph has been measured")


class Captured:
    """Calls a function; from the second call with the same tensors on, it replays a CUDA graph instead.

    The first call with new tensors has no graph: it compiles kernels and uploads tables. Numbers that change between
    calls must be tensors on the device.

    Args:
        run: the function, which launches kernels on the current stream.
        tensors: function that returns, in a fixed order, all tensors that `run` uses and does not free.
    """

    def __init__(self, run: Callable[[], object], tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.run = run
        self._tensors = tensors
        self._addresses: tuple[int, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        addresses = tuple(tensor.data_ptr() for tensor in self._tensors())
        if addresses != self._addresses:
            self._graph = None
            self.run()
            # get the addresses after the call, because an optimizer allocates its moments in its first step
            self._addresses = tuple(tensor.data_ptr() for tensor in self._tensors())
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # another thread, such as the data loader's, may call CUDA during the capture
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run()
            self._graph = graph
        self._graph.replay()

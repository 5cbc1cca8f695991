"""Helpers for tests on a CUDA device whose tensors have no data: tensors, narrow models, and a fake CUDA graph.

Without data `.item()`, `bool(tensor)` and `nonzero` raise an error. So code that passes does not make the host wait for
the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from model_systems import SHALLOW, narrow_config
from torch import Tensor

from train.common.distributed import MICRO_BATCHES
from train.config import Config
from train.model.gpt import GPT

CUDA = torch.device("cuda", 0)


def gpu_config(system: str, **changes: Any) -> Config:
    # the flash kernels take head dimensions in multiples of 8
    narrow: dict[str, Any] = {
        "model_dim": 64,
        "device": "cuda",
        "grad_clip_norm": 1.0,
        "train_batch_tokens": MICRO_BATCHES * 2 * 16,
    }
    return narrow_config(system, **(SHALLOW[system] | narrow | changes))


def gpu_model(config: Config) -> GPT:
    with CUDA:
        model = GPT(config)
    assert model.compute_dtype == torch.bfloat16
    assert {parameter.device for parameter in model.parameters()} == {CUDA}
    return model


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


class Batches:
    """A loader of one micro-batch on the GPU."""

    def next_batch(self) -> list[tuple[Tensor, Tensor]]:
        tokens = torch.zeros(2, 17, dtype=torch.int64, device=CUDA)
        return [(tokens[:, :-1], tokens[:, 1:])]


class Graph:
    """Replaces `torch.cuda.CUDAGraph` and counts replays."""

    def __init__(self) -> None:
        self.replays = 0
        GRAPHS.append(self)

    def replay(self) -> None:
        self.replays += 1


GRAPHS: list[Graph] = []


@contextlib.contextmanager
def recorded_capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
    # this mode lets a loader's thread copy during the capture
    assert capture_error_mode == "thread_local"
    yield

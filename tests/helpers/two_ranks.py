"""Runs a function on two ranks, which are two processes of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from train.common.distributed import Ranks, start_ranks

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    values = (rank, rank, world_size, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(VARIABLES, values, strict=True)}


def on_two_ranks(work: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """The results of `work` on rank 0 and rank 1. `folder` gets a file from each rank."""
    spawn(_work, args=(work, free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _work(rank: int, work: Callable[[Ranks], Any], port: int, folder: Path) -> None:
    os.environ.update(torchrun_variables(rank, 2, port))
    torch.set_num_threads(1)
    with start_ranks("cpu") as ranks:
        result = work(ranks)
    torch.save(result, folder / f"{rank}.pt")

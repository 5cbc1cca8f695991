"""The ranks (processes) of a run: numbers, devices, process group, and communication."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# import this before a process group exists: otherwise default arguments of its functions would keep the group alive
# after the interpreter's exit, where gloo aborts
import torch.distributed.nn

from train.common import hardware
from train.common.errors import UserError, file_error_text
from train.common.wording import counted

# number of micro-batches per step; 1, 2, 4 or 8 ranks divide them
MICRO_BATCHES = 8

# compilation before the first step may take minutes
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank, device and process group."""

    rank: int = 0
    local_rank: int = 0  # rank on this machine, which is also the number of its GPU
    world_size: int = 1  # a divisor of 8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # process group of all ranks, with gloo for CPU tensors and NCCL for CUDA tensors; None for one process
    group: dist.ProcessGroup | None = None

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per rank and step."""
        return MICRO_BATCHES // self.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's files."""
        return self.rank == 0

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` on every rank. It must be small and picklable."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the `value` of each rank, in rank order, on every rank. The values must be small and picklable."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 while the other ranks wait. Return the result, small and picklable, on every rank.

        Raises:
            UserError: `work` raised a UserError. Every rank raises it, so that no rank keeps waiting.
        """
        return _results([self.broadcast(_attempt(work) if self.is_main else ([], ""))])[0]

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank. Return all results, small and picklable, in rank order, on every rank.

        Raises:
            UserError: `work` raised a UserError on some rank. Every rank raises the error of the first such rank, so
                that no rank keeps waiting.
        """
        return _results(self.gather(_attempt(work)))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (any shape, dtype and device) over the ranks in place, and return it."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    @torch.no_grad()
    def copy_from(self, source: int, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` with the same tensors of rank `source`. Shapes, dtypes and device types must match."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=source, group=self.group)

    def barrier(self) -> None:
        """Wait until every rank has called this method and its device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # sum a CPU tensor, which always uses gloo: dist.barrier may use NCCL if the group has both backends
        self.sum(torch.zeros(1))


@contextmanager
def start_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that torchrun's environment variables describe. Destroy it at the end of the context.

    A process that was started without torchrun gets no group. `device` is "auto" (cuda if there is a GPU), "cpu" or
    "cuda".

    Raises:
        UserError: a variable is missing or not a number, the world size does not divide 8, or the GPU does not exist.
    """
    world_size = _number("WORLD_SIZE", 1)
    if world_size < 1 or MICRO_BATCHES % world_size:
        if os.environ.get("RANK", "0") != "0":
            # rank 0 says it
            raise SystemExit(2)
        raise UserError(
            f"WORLD_SIZE: {world_size} processes cannot split the {MICRO_BATCHES} micro-batches of a step evenly: "
            "start 1, 2, 4 or 8 (torchrun --nproc_per_node)"
        )
    rank = _number("RANK", 0 if world_size == 1 else None)
    local_rank = _number("LOCAL_RANK", 0 if world_size == 1 else None)
    if not 0 <= rank < world_size or local_rank < 0:
        raise UserError(
            f"RANK {rank}, LOCAL_RANK {local_rank}: expected a RANK in 0..{world_size - 1} for WORLD_SIZE {world_size} "
            "and a LOCAL_RANK from 0: let torchrun set them"
        )
    own_device = choose_device(device, local_rank)
    if world_size == 1:
        yield Ranks(rank, local_rank, world_size, own_device)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"{name}: WORLD_SIZE is {world_size}, but {name} is not set: start the processes with torchrun"
            )
    if not 0 <= _number("MASTER_PORT", None) < 65536:
        raise UserError(f"MASTER_PORT: expected 0 to 65535, found {os.environ['MASTER_PORT']}: let torchrun set it")
    # gloo lets ranks exchange CPU tensors without waiting for the GPU
    backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=TIMEOUT,
            rank=rank,
            world_size=world_size,
            device_id=own_device if own_device.type == "cuda" else None,
        )
    except dist.DistNetworkError as error:
        raise UserError(
            f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}: rank {rank} cannot "
            f"join the others there ({error}): check the address, or choose a free port with torchrun --master_port"
        ) from error
    kernels = logging.getLogger("golf_kernels")
    level = kernels.level
    if rank:
        # rank 0 gives the same warnings about kernels
        kernels.setLevel(logging.ERROR)
    try:
        yield Ranks(rank, local_rank, world_size, own_device, dist.group.WORLD)
    finally:
        kernels.setLevel(level)
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Return the device of this process, and make it the current device.

    `device` is "auto" (cuda if there is a GPU), "cpu" or "cuda".

    Raises:
        UserError: there is no GPU, or there are fewer GPUs than processes on this machine.
    """
    if (hardware.auto_device() if device == "auto" else device) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "DEVICE=cuda, but torch finds no CUDA GPU on this machine: set DEVICE=cpu, or see python -m golf_kernels"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK {local_rank}: this machine has {counted(torch.cuda.device_count(), 'GPU')}: start at most that many processes "
            "(torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _attempt(work: Callable[[], T]) -> tuple[list[T], str]:
    """Call `work`. Return ([result], ""), or ([], message) after an error that the user can fix."""
    try:
        return [work()], ""
    except UserError as error:
        return [], str(error)
    except OSError as error:
        # for example a full disk: without the message, the other ranks would end with a traceback of the process group
        text = file_error_text(error)
        if text is None:
            raise
        return [], text


def _results(attempts: Sequence[tuple[list[T], str]]) -> list[T]:
    """Return the results of all attempts. If an attempt failed, raise a UserError with the first message."""
    for done, problem in attempts:
        if not done:
            raise UserError(problem)
    return [result for done, _ in attempts for result in done]


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name}: not set, though WORLD_SIZE is: start the processes with torchrun")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}: expected a whole number, found {text!r}: let torchrun set it") from None

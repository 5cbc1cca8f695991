"""Gradients that leave while the backward pass still runs: the matrices in buckets, each sent once it is full."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from golf_kernels.sharding import newton_schulz_cost
from train.common.wording import counted
from train.optimize.reduction import Reduction

# whose last backward pass of a step runs: a compiled pass calls `start_bucket` with tensors and numbers alone; and not one
# for each thread, because autograd has threads of its own
_listening: OverlappedReduction | None = None


class OverlappedReduction(Reduction):
    """A `Reduction` whose matrices travel in several buckets, each as soon as its gradients are there.

    Buckets follow the order in which gradients arrive, that of the model from its end. A model that is not compiled tells
    of each gradient by a hook; a compiled one starts the buckets from inside its backward pass
    (`train.optimize.backward_graph`). In whatever order they fill, they start by their number, so that all ranks call the
    same collectives. What no backward pass has filled leaves in `reduce_gradients`, where the replicated parameters do.

    Owners change places among matrices that cost the same (`spread`). Sums are those of one reduce-scatter, but for the
    order in which a back end adds more than two ranks.

    Args:
        replicated, matrices, owners: as `Reduction` takes them.
        group: process group of all ranks.
    """

    def __init__(
        self,
        replicated: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        owners: Sequence[int],
        group: dist.ProcessGroup,
    ) -> None:
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
        self._numbers = cut(shapes, dist.get_world_size(group))
        super().__init__(replicated, matrices, spread(owners, shapes, self._numbers), group, buckets=self._numbers)
        self._bucket_of = {number: index for index, bucket in enumerate(self._numbers) for number in bucket}
        self._awaited: list[set[int]] = []
        self._compiled = False
        # a reduction that its own matrices' hooks held would never be freed, nor its process group before the process ends
        reduction = weakref.ref(self)
        for number, matrix in enumerate(matrices):
            matrix.register_post_accumulate_grad_hook(functools.partial(_arrived, reduction, number))

    def __str__(self) -> str:
        return f"overlapped in {counted(len(self._numbers), 'bucket')}"

    def compiler(self, options: Mapping[str, Any]) -> Callable[..., Any]:
        # imported here: only a compiled model needs it
        from train.optimize.backward_graph import overlapping_compiler

        self._compiled = True
        return overlapping_compiler(self._matrices, self._numbers, options)

    @contextmanager
    def last_micro_batch(self) -> Iterator[None]:
        """The context of a step's last backward pass, which starts the buckets.

        Raises:
            RuntimeError: more than one backward pass was taken in it, or a compiled one started nothing.
        """
        global _listening
        # of a step that was given up, whose buffers must not be touched before
        self._finish_scattering()
        self._awaited = [set(bucket) for bucket in self._numbers]
        _listening = self
        try:
            yield
        finally:
            _listening = None
        if self._compiled and self._numbers and not self._packed:
            raise RuntimeError(
                f"the compiled backward pass started no transfer of gradients, torch {torch.__version__} may compile it in "
                "another way: set GRADIENT_REDUCTION=after"
            )

    def start(self, numbers: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Send a bucket with what the last micro-batch adds to the gradients of these of its matrices."""
        added = {self._matrices[number]: gradient for number, gradient in zip(numbers, gradients, strict=True)}
        self._fill(self._bucket_of[numbers[0]], added)

    def _count(self, number: int) -> None:
        # a compiled pass hands all gradients over at its end, when they have left
        if self._compiled:
            return
        bucket = self._bucket_of[number]
        self._awaited[bucket].discard(number)
        if not self._awaited[bucket]:
            self._fill(bucket, {})

    @torch.no_grad()
    def _fill(self, bucket: int, added: Mapping[Tensor, Tensor]) -> None:
        if bucket in self._packed:
            raise RuntimeError("last_micro_batch: expected one backward pass in it, found a second one")
        self._pack(bucket, [_sum(matrix, added.get(matrix)) for matrix in self._buckets[bucket].matrices])


def _arrived(reduction: weakref.ref[OverlappedReduction], number: int, _: Tensor) -> None:
    if _listening is not None and _listening is reduction():
        _listening._count(number)


def start_bucket(gradients: list[Tensor], numbers: list[int]) -> None:
    """What a compiled backward pass calls; nothing happens in the micro-batches before the last."""
    if _listening is not None:
        _listening.start(numbers, gradients)


def cut(shapes: Sequence[tuple[int, int]], world_size: int) -> list[list[int]]:
    """Buckets of matrices, the last one first, each closed once it is as large as `world_size` of the largest matrices.

    A matrix travels to its owner whole, and each rank has as much room in a bucket as the fullest one needs: below this
    size a bucket with one of the largest matrices is mostly padding.

    Args:
        shapes: (rows, columns) of each matrix, in the model's order.
        world_size: number of ranks.

    Returns:
        Numbers of matrices.
    """
    sizes = [rows * columns for rows, columns in shapes]
    buckets: list[list[int]] = []
    room = 0
    for number in reversed(range(len(sizes))):
        if room <= 0:
            buckets.append([])
            room = world_size * max(sizes)
        buckets[-1].append(number)
        room -= sizes[number]
    return buckets


def spread(
    owners: Sequence[int], shapes: Sequence[tuple[int, int]], buckets: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Owners that have the same work, dealt anew so that the ranks' shares of each bucket are about as large.

    Args:
        owners: the rank of each matrix.
        shapes: (rows, columns) of each matrix; those whose orthogonalization costs the same may change places.
        buckets: numbers of matrices.

    Returns:
        One rank per matrix; every rank has as many matrices of each cost as before.
    """
    costs = [newton_schulz_cost(*shape) for shape in shapes]
    left: dict[int, Counter[int]] = {}
    for cost, owner in zip(costs, owners, strict=True):
        left.setdefault(cost, Counter())[owner] += 1
    dealt = list(owners)
    for bucket in buckets:
        load: Counter[int] = Counter()
        for number in sorted(bucket, key=lambda n: (-shapes[n][0] * shapes[n][1], n)):
            free = left[costs[number]]
            owner = min((rank for rank in free if free[rank]), key=lambda rank: (load[rank], -free[rank], rank))
            free[owner] -= 1
            load[owner] += shapes[number][0] * shapes[number][1]
            dealt[number] = owner
    return tuple(dealt)


def _sum(matrix: Tensor, added: Tensor | None) -> Tensor:
    before = matrix.grad
    if before is None:
        return torch.zeros_like(matrix) if added is None else added
    return before if added is None else before + added

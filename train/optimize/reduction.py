"""Gradients to their mean over ranks, clipping, and weights back to all ranks, without the host waiting for a number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.common.wording import counted

_Collective = Callable[..., dist.Work]


class Bucket(NamedTuple):
    """Matrices whose gradients travel in one reduce-scatter.

    Attributes:
        matrices: owner by owner.
        views: where their gradients leave from, in `source`.
        source: as much room for every rank as the fullest one needs.
        own: where the sum of this rank's share arrives.
    """

    matrices: list[Tensor]
    views: list[Tensor]
    source: Tensor
    own: Tensor


class Reduction:
    """What the ranks of a run exchange in a step: mean gradients before the optimizers, changed weights after them.

    Replicated parameters (embeddings, vectors, scalars) travel together in one all-reduce, and every rank updates them
    by itself. Each matrix has one rank that updates it, its owner: the gradients of all matrices travel in one
    reduce-scatter, after which the owner holds the mean and the others hold nothing, and the changed weights come back
    in one all-gather. A step's gradient is then the mean over all micro-batches if each rank has accumulated its own
    with the factor 1 / accumulation. A parameter without a gradient counts as one with a zero gradient, whatever the
    number of ranks, so that weight decay does not depend on how the graph was cut.

    Args:
        replicated: parameters that every rank updates by itself.
        matrices: parameters that one rank updates for all.
        owners: for each of `matrices`, the rank that updates it; not looked at without a group.
        group: process group of all ranks; None for one process, which then owns everything.
        buckets: numbers of matrices whose gradients travel in a reduce-scatter of their own; None: all in one.
        others: without a group, matrices that other ranks would update, where one rank's share is measured alone: they
            count for the norm, as what those ranks would send.
        fixed: the reduced gradients have the same places in every step, as a CUDA graph of what follows needs it; with
            a group they always have.

    Attributes:
        owned: the matrices that this rank updates, in their order.
        norm: what `scale_gradients` returned last.
    """

    def __init__(
        self,
        replicated: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        owners: Sequence[int] = (),
        group: dist.ProcessGroup | None = None,
        *,
        buckets: Sequence[Sequence[int]] | None = None,
        others: Sequence[nn.Parameter] = (),
        fixed: bool = False,
    ) -> None:
        self.owned: list[Tensor] = list(matrices)
        self._replicated: list[Tensor] = list(replicated)
        self._matrices: list[Tensor] = list(matrices)
        self._others: list[Tensor] = list(others)
        self._group = group
        self._rank = dist.get_rank(group) if group is not None else 0
        self._world_size = dist.get_world_size(group) if group is not None else 1
        self._buckets: list[Bucket] = []
        self._packed: set[int] = set()
        self._scattering: list[dist.Work] = []
        self._gathering: dist.Work | None = None
        parameters = [*self._replicated, *self._matrices]
        self._square, self.norm = _buffer(parameters, 2).unbind()
        self._places = [torch.empty_like(p, requires_grad=False) for p in parameters] if fixed and group is None else []
        if group is not None:
            if len(owners) != len(self._matrices) or not all(0 <= owner < self._world_size for owner in owners):
                raise ValueError(
                    f"owners: expected one rank in 0..{self._world_size - 1} for each of {len(self._matrices)} matrices, "
                    f"got {list(owners)}"
                )
            if buckets is None:
                buckets = [range(len(self._matrices))] if self._matrices else []
            self._lay_out(owners, buckets)

    def _lay_out(self, owners: Sequence[int], buckets: Sequence[Sequence[int]]) -> None:
        """Make room for what travels."""

        def shares_of(numbers: Sequence[int]) -> list[list[Tensor]]:
            return [[self._matrices[n] for n in numbers if owners[n] == rank] for rank in range(self._world_size)]

        self._flat = _buffer(self._replicated, sum(p.numel() for p in self._replicated))
        self._flat_views = _views(self._flat, self._replicated)
        self._flat_places = _places_for(self._flat_views, self._replicated)
        shares = shares_of(range(len(self._matrices)))
        self.owned = shares[self._rank]
        self._by_owner = [matrix for share in shares for matrix in share]
        longest = _longest(shares)
        bucket_shares = [shares_of(bucket) for bucket in buckets]
        rooms = [_longest(bucket) for bucket in bucket_shares]
        # gradients have left before weights come back, so they share the room
        room = _buffer(self._matrices, self._world_size * max(longest, sum(rooms)))
        self._gathered, self._gathered_views = _rows(room, shares, longest)
        # gradients stay readable after a step, so weights leave from a place of their own
        self._own_gradients, self._own_weights = (_buffer(self._matrices, size) for size in (sum(rooms), longest))
        self._own_weight_views = _views(self._own_weights, self.owned)
        gradients: dict[Tensor, Tensor] = {}
        start = 0
        for bucket, size in zip(bucket_shares, rooms, strict=True):
            source, views = _rows(room[start * self._world_size :], bucket, size)
            own = self._own_gradients[start : start + size]
            self._buckets.append(Bucket([matrix for share in bucket for matrix in share], views, source, own))
            gradients |= zip(bucket[self._rank], _views(own, bucket[self._rank]), strict=True)
            start += size
        self._own_gradient_views = [gradients[matrix] for matrix in self.owned]
        self._own_places = _places_for(self._own_gradient_views, self.owned)

    def __str__(self) -> str:
        if self._group is None:
            return "none (one process: nothing to reduce)"
        return f"after the backward pass in {counted(len(self._buckets), 'bucket')}"

    def last_micro_batch(self) -> AbstractContextManager[None]:
        """The context of a step's last backward pass: from there on gradients may leave before `reduce_gradients`."""
        return nullcontext()

    def compiler(self, options: Mapping[str, Any]) -> Callable[..., Any] | None:
        """The back end of torch.compile for the model whose gradients these are, with Inductor's switches; None: Inductor itself."""
        return None

    def _pack(self, number: int, gradients: list[Tensor]) -> None:
        """Put a bucket's gradients where they leave from; it starts once all buckets before it have, the same on all ranks."""
        torch._foreach_copy_(self._buckets[number].views, gradients)
        self._packed.add(number)
        while (first := len(self._scattering)) in self._packed:
            bucket = self._buckets[first]
            self._scattering.append(_reduce_scatter(bucket.own, bucket.source, self._group))

    def _finish_scattering(self) -> None:
        for work in self._scattering:
            work.wait()
        self._scattering.clear()
        self._packed.clear()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Replace `.grad` by the mean over ranks: of replicated parameters everywhere, of a matrix at its owner.

        At the other ranks a matrix's `.grad` becomes None. Gradients with fixed places are overwritten by the next call.
        """
        for parameter in (*self._replicated, *self._matrices):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._group is None:
            if self._places:
                parameters = [*self._replicated, *self._matrices]
                _set_gradients(parameters, _gradients(parameters), self._places)
            return
        # the larger transfer goes first, so that packing the smaller one overlaps it
        for number, bucket in enumerate(self._buckets):
            if number not in self._packed:
                self._pack(number, _gradients(bucket.matrices))
        if self._replicated:
            torch._foreach_copy_(self._flat_views, _gradients(self._replicated))
            dist.all_reduce(self._flat, op=dist.ReduceOp.SUM, group=self._group)
            # a sum and a power of two give the exact mean, which not every back end and version has as an operation
            self._flat.mul_(1 / self._world_size)
            _set_gradients(self._replicated, self._flat_views, self._flat_places)
        if self._matrices:
            self._finish_scattering()
            self._own_gradients.mul_(1 / self._world_size)
            for matrix in self._matrices:
                matrix.grad = None
            _set_gradients(self.owned, self._own_gradient_views, self._own_places)

    @property
    def exchanges(self) -> bool:
        """Whether anything comes from other ranks, be it made up."""
        return self._group is not None or bool(self._others)

    @torch.no_grad()
    def measure_gradients(self) -> None:
        """Sum the squares of the reduced gradients that this rank counts: the first of three pieces of clipping."""
        # each matrix is counted at its owner, and what all ranks hold is counted by the first
        counted = [*self._replicated, *self.owned] if self._rank == 0 else self.owned
        self._square.zero_()
        self._add_squares(_gradients(counted))

    @torch.no_grad()
    def sum_squares(self) -> None:
        """Add up what the ranks have measured: the piece that needs them."""
        if self._group is not None:
            dist.all_reduce(self._square, op=dist.ReduceOp.SUM, group=self._group)
        self._add_squares([matrix.grad for matrix in self._others if matrix.grad is not None])

    def _add_squares(self, gradients: list[Tensor]) -> None:
        if gradients:
            norms = torch._foreach_norm(gradients, 2, self._square.dtype)
            self._square.add_(torch.stack(norms).square().sum())

    @torch.no_grad()
    def scale_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients that this rank holds by min(1, max_norm / (norm + 1e-6)), with the L2 norm of all gradients.

        Returns:
            The norm before clipping, 0-dimensional, float32 (float64 for float64 gradients), on the device, equal on
            all ranks; the next call overwrites it.

        Source: `torch.nn.utils.clip_grad_norm_`, whose formula this is.
        """
        torch.sqrt(self._square, out=self.norm)
        gradients = _gradients([*self._replicated, *self.owned])
        if gradients:
            torch._foreach_mul_(gradients, (max_norm / (self.norm + 1e-6)).clamp(max=1.0))
        return self.norm

    @torch.no_grad()
    def start_gathering(self) -> None:
        """Send the owned matrices, just updated, on their way to the other ranks."""
        if self._group is None or not self._matrices:
            return
        if self.owned:
            torch._foreach_copy_(self._own_weight_views, self.owned)
        self._gathering = _all_gather(self._gathered, self._own_weights, self._group)

    @torch.no_grad()
    def finish_gathering(self) -> None:
        """Put the matrices of all owners into the model; every rank then holds the same bits."""
        if self._gathering is not None:
            self._gathering.wait()
            torch._foreach_copy_(self._by_owner, self._gathered_views)
            self._gathering = None


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    assert len(gradients) == len(parameters), "reduce_gradients gives every parameter a gradient"
    return gradients


def _wide_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    # float32 at least, so that a sum of bfloat16 gradients is rounded once and not per rank
    return functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)


def _buffer(parameters: Sequence[Tensor], size: int) -> Tensor:
    device = parameters[0].device if parameters else None
    return torch.zeros(size, dtype=_wide_dtype(parameters), device=device)


def _views(buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    sizes = [parameter.numel() for parameter in parameters]
    pieces = buffer[: sum(sizes)].split(sizes)
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]


def _places_for(views: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    # a gradient has its parameter's dtype, which may be narrower than that of the sums
    pairs = zip(views, parameters, strict=True)
    return [v if v.dtype == p.dtype else torch.empty_like(p, requires_grad=False) for v, p in pairs]


def _set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    moved = [(place, gradient) for place, gradient in zip(places, gradients, strict=True) if place is not gradient]
    if moved:
        torch._foreach_copy_([place for place, _ in moved], [gradient for _, gradient in moved])
    for parameter, place in zip(parameters, places, strict=True):
        parameter.grad = place


def _longest(shares: Sequence[Sequence[Tensor]]) -> int:
    return max(sum(matrix.numel() for matrix in share) for share in shares)


def _rows(room: Tensor, shares: Sequence[Sequence[Tensor]], length: int) -> tuple[Tensor, list[Tensor]]:
    """The beginning of `room` with one row of `length` per rank, and the places of all ranks' matrices in it."""
    buffer = room[: len(shares) * length]
    rows = buffer.view(len(shares), length)
    return buffer, [view for row, share in zip(rows, shares, strict=True) for view in _views(row, share)]


def _reduce_scatter(output: Tensor, source: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    # torch 2.13 renames this collective and the next, and warns about their old names
    scatter: _Collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, source, op=dist.ReduceOp.SUM, group=group, async_op=True)


def _all_gather(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> dist.Work:
    gather: _Collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, source, group=group, async_op=True)

"""The collectives of a step: averages and clips the gradients, and sends the updated matrices to all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Collective = Callable[..., dist.Work]


class Reduction:
    """Averages gradients over ranks before the optimizers run, and sends updated matrices to all ranks afterwards.

    Replicated parameters (embeddings, vectors and scalars) are updated by every rank. One all-reduce averages their
    gradients. A matrix is updated by one rank, its owner. One reduce-scatter gives each owner the mean gradients of its
    matrices. One all-gather sends the updated matrices to all ranks. The host never waits for a number from the device.

    The gradient of each micro-batch must already be divided by the number of micro-batches. A missing gradient counts
    as zero, so that weight decay does not depend on the number of ranks.

    Args:
        replicated: parameters that every rank updates.
        matrices: parameters that only their owners update.
        owners: the owner of each matrix in `matrices`; ignored without a group.
        group: the group of all ranks; None for one process, which owns all matrices.
        others: matrices whose gradients count in the norm but that are not updated. They serve to measure the work of
            one rank in one process.
        fixed: keep the reduced gradients at fixed addresses, as a CUDA graph needs. With a group they always are.

    Attributes:
        owned: the matrices that this rank updates.
        norm: the last result of `scale_gradients`.
    """

    def __init__(
        self,
        replicated: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        owners: Sequence[int] = (),
        group: dist.ProcessGroup | None = None,
        *,
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
        self._gathering: dist.Work | None = None
        parameters = [*self._replicated, *self._matrices]
        self._square, self.norm = _buffer(parameters, 2).unbind()
        self._fixed_gradients = (
            [torch.empty_like(p, requires_grad=False) for p in parameters] if fixed and group is None else []
        )
        if group is not None:
            if len(owners) != len(self._matrices) or not all(0 <= owner < self._world_size for owner in owners):
                raise ValueError(
                    f"owners: expected one rank in 0..{self._world_size - 1} for each of {len(self._matrices)} matrices, "
                    f"got {list(owners)}"
                )
            self._allocate(owners)

    def _allocate(self, owners: Sequence[int]) -> None:
        self._flat = _buffer(self._replicated, sum(p.numel() for p in self._replicated))
        self._flat_views = _views(self._flat, self._replicated)
        self._flat_gradients = _mean_gradients(self._flat_views, self._replicated)
        pairs = list(zip(self._matrices, owners, strict=True))
        by_owner = [[matrix for matrix, owner in pairs if owner == rank] for rank in range(self._world_size)]
        self.owned = by_owner[self._rank]
        self._by_owner = [matrix for matrices in by_owner for matrix in matrices]
        # the collectives need slices of equal length: take the number of elements of the rank that owns most
        length = max(sum(matrix.numel() for matrix in matrices) for matrices in by_owner)
        # this buffer holds the gradients of all matrices, and later the updated matrices
        self._all = _buffer(self._matrices, self._world_size * length)
        rows = zip(self._all.view(self._world_size, length), by_owner, strict=True)
        self._all_views = [view for row, matrices in rows for view in _views(row, matrices)]
        # the updated matrices get a buffer of their own, because gradients must stay readable after a step
        self._own_gradients, self._own_weights = (_buffer(self._matrices, length) for _ in range(2))
        self._own_gradient_views = _views(self._own_gradients, self.owned)
        self._own_weight_views = _views(self._own_weights, self.owned)
        self._own_mean_gradients = _mean_gradients(self._own_gradient_views, self.owned)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Replace each `.grad` by the mean over all ranks.

        Only the owner of a matrix gets the mean gradient. On other ranks, the matrix's `.grad` becomes None. The next
        call may overwrite the mean gradients.
        """
        parameters = [*self._replicated, *self._matrices]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._group is None:
            if self._fixed_gradients:
                _set_gradients(parameters, _gradients(parameters), self._fixed_gradients)
            return
        scattering = None
        # start with the larger transfer: the gradients for the smaller one are packed meanwhile
        if self._matrices:
            torch._foreach_copy_(self._all_views, _gradients(self._by_owner))
            scattering = _reduce_scatter(self._own_gradients, self._all, self._group)
        if self._replicated:
            torch._foreach_copy_(self._flat_views, _gradients(self._replicated))
            dist.all_reduce(self._flat, op=dist.ReduceOp.SUM, group=self._group)
            # sum, then multiply, because not every backend can average. For 2^n ranks the product is exact.
            self._flat.mul_(1 / self._world_size)
            _set_gradients(self._replicated, self._flat_views, self._flat_gradients)
        if scattering is not None:
            scattering.wait()
            self._own_gradients.mul_(1 / self._world_size)
            for matrix in self._matrices:
                matrix.grad = None
            _set_gradients(self.owned, self._own_gradient_views, self._own_mean_gradients)

    @property
    def exchanges(self) -> bool:
        """Whether the norm includes gradients of matrices that this process does not update."""
        return self._group is not None or bool(self._others)

    @torch.no_grad()
    def measure_gradients(self) -> None:
        """Clipping, step 1 of 3: sum the squares of this rank's share of the reduced gradients."""
        # each matrix counts on its owner, the replicated parameters on rank 0
        counted = [*self._replicated, *self.owned] if self._rank == 0 else self.owned
        self._square.zero_()
        self._add_squares(_gradients(counted))

    @torch.no_grad()
    def sum_squares(self) -> None:
        """Clipping, step 2 of 3: add the sums of squares of all ranks."""
        if self._group is not None:
            dist.all_reduce(self._square, op=dist.ReduceOp.SUM, group=self._group)
        self._add_squares([matrix.grad for matrix in self._others if matrix.grad is not None])

    def _add_squares(self, gradients: list[Tensor]) -> None:
        if gradients:
            norms = torch._foreach_norm(gradients, 2, self._square.dtype)
            self._square.add_(torch.stack(norms).square().sum())

    @torch.no_grad()
    def scale_gradients(self, max_norm: float) -> Tensor:
        """Clipping, step 3 of 3: multiply this rank's gradients by min(1, max_norm / (norm + 1e-6)).

        Returns:
            The L2 norm of the gradients of all ranks before clipping: a scalar on the device, float32 (float64 for
            float64 gradients). The next call overwrites it.

        Source: the formula of `torch.nn.utils.clip_grad_norm_`.
        """
        torch.sqrt(self._square, out=self.norm)
        gradients = _gradients([*self._replicated, *self.owned])
        if gradients:
            torch._foreach_mul_(gradients, (max_norm / (self.norm + 1e-6)).clamp(max=1.0))
        return self.norm

    @torch.no_grad()
    def start_gathering(self) -> None:
        """Start the all-gather of the updated matrices."""
        if self._group is None or not self._matrices:
            return
        if self.owned:
            torch._foreach_copy_(self._own_weight_views, self.owned)
        self._gathering = _all_gather(self._all, self._own_weights, self._group)

    @torch.no_grad()
    def finish_gathering(self) -> None:
        """Wait for the all-gather, and copy the matrices into the model. All ranks then have the same weights."""
        if self._gathering is not None:
            self._gathering.wait()
            torch._foreach_copy_(self._by_owner, self._all_views)
            self._gathering = None


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    assert len(gradients) == len(parameters), "reduce_gradients gives every parameter a gradient"
    return gradients


def _buffer(parameters: Sequence[Tensor], size: int) -> Tensor:
    # float32 or wider, so that a sum of bfloat16 gradients is rounded once in all, not once per rank
    dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
    device = parameters[0].device if parameters else None
    return torch.zeros(size, dtype=dtype, device=device)


def _views(buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    sizes = [parameter.numel() for parameter in parameters]
    chunks = buffer[: sum(sizes)].split(sizes)
    return [chunk.view(parameter.shape) for chunk, parameter in zip(chunks, parameters, strict=True)]


def _mean_gradients(views: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    # a gradient has its parameter's dtype, which may be narrower than the buffer's
    pairs = zip(views, parameters, strict=True)
    return [v if v.dtype == p.dtype else torch.empty_like(p, requires_grad=False) for v, p in pairs]


def _set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy each gradient into its tensor in `targets`, and make this tensor the parameter's `.grad`."""
    moved = [(target, gradient) for target, gradient in zip(targets, gradients, strict=True) if target is not gradient]
    if moved:
        torch._foreach_copy_([target for target, _ in moved], [gradient for _, gradient in moved])
    for parameter, target in zip(parameters, targets, strict=True):
        parameter.grad = target


def _reduce_scatter(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> dist.Work:
    # torch 2.13 renames these two collectives and warns about the old names
    scatter: _Collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, source, op=dist.ReduceOp.SUM, group=group, async_op=True)


def _all_gather(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> dist.Work:
    gather: _Collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, source, group=group, async_op=True)

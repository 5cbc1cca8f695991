"""Assigns tasks to ranks by their cost, and divides Newton-Schulz orthogonalization among ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Run = Callable[[list[Tensor]], list[Tensor]]


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Returns the FLOPs of a Newton-Schulz iteration: 2·short²·long for X·Xᵀ, as many for B·X, and 2·short³ for A·A."""
    short, long = sorted((rows, columns))
    return 4 * short * short * long + 2 * short**3


@functools.lru_cache(maxsize=64)
def assign(shapes: tuple[tuple[int, int], ...], ranks: int) -> tuple[int, ...]:
    """Assigns each matrix to a rank, so that all ranks finish Newton-Schulz at about the same time.

    Args:
        shapes: (rows, columns) of each matrix.
        ranks: number of ranks.

    Returns:
        The rank of each matrix. Every rank computes the same assignment.
    """
    return assign_costs([newton_schulz_cost(*shape) for shape in shapes], ranks)


def assign_costs(costs: Sequence[float], ranks: int) -> tuple[int, ...]:
    """Assigns each task to the rank with the lowest total cost so far, the most expensive task first.

    Args:
        costs: cost of each task, in any unit.
        ranks: number of ranks.

    Returns:
        The rank of each task.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += costs[index]
    return tuple(owners)


def orthogonalize_sharded(
    updates: Sequence[Tensor], run: Run, dtype: torch.dtype, group: dist.ProcessGroup
) -> list[Tensor]:
    """Orthogonalizes matrices on all ranks. Each rank takes the matrices assigned to it, then ranks exchange results.

    Args:
        updates: matrices `(m, n)` and banks of matrices `(k, m, n)`, with the same shapes on every rank.
        run: function that orthogonalizes a list of matrices.
        dtype: dtype in which the ranks send results.
        group: process group of the ranks.

    Returns:
        One result per update, on every rank.
    """
    # a bank's matrices are assigned one by one, because a whole bank may be half of the work
    matrices = [matrix for update in updates for matrix in (update.unbind() if update.ndim == 3 else (update,))]
    ranks = dist.get_world_size(group)
    owners = assign(tuple((matrix.shape[0], matrix.shape[1]) for matrix in matrices), ranks)
    indices = [[index for index, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
    longest = max(sum(matrices[index].numel() for index in own) for own in indices)
    flat = torch.zeros(longest, dtype=dtype, device=matrices[0].device)
    position = 0
    for result in run([matrices[index] for index in indices[dist.get_rank(group)]]):
        flat[position : position + result.numel()] = result.flatten()
        position += result.numel()
    gathered = torch.empty(ranks * longest, dtype=dtype, device=flat.device)
    # torch 2.13 renamed all_gather_into_tensor to all_gather_single and warns about the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, flat, group=group)
    results = [torch.empty_like(update, memory_format=torch.contiguous_format) for update in updates]
    targets = [matrix for result in results for matrix in (result.unbind() if result.ndim == 3 else (result,))]
    for rank, own in enumerate(indices):
        position = rank * longest
        for index in own:
            count = targets[index].numel()
            targets[index].copy_(gathered[position : position + count].view(targets[index].shape))
            position += count
    return results


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Says whether a tensor is a DTensor, without the slow import of torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh")


def dtensor_problem(tensor: DTensor) -> str | None:
    """Returns None if `orthogonalize_dtensors` can take a DTensor, otherwise a phrase that says what it expects."""
    mesh = tensor.device_mesh
    if mesh.ndim != 1:
        names = "" if mesh.mesh_dim_names is None else f" ({', '.join(mesh.mesh_dim_names)})"
        return f"a DTensor on a mesh of one dimension, found {mesh.ndim}{names}; shard it over one of them"
    placement = tensor.placements[0]
    if type(placement).__name__ not in ("Shard", "Replicate"):
        return f"a DTensor with placement Shard or Replicate, found {placement}"
    return None


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Gives a DTensor the placements of `like`, because an operation may have changed them.

    Returns other tensors unchanged.
    """
    return tensor.redistribute(placements=like.placements) if is_dtensor(tensor) and is_dtensor(like) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """Makes a DTensor whole on every rank. Returns other tensors unchanged."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()])


def orthogonalize_dtensors(updates: Sequence[DTensor], run: Run, dtype: torch.dtype) -> list[Tensor]:
    """Orthogonalizes DTensors. One rank gathers each matrix, orthogonalizes it and sends every rank its shard.

    Args:
        updates: DTensors `(m, n)` and `(k, m, n)` on one mesh of one dimension, with placement Shard or Replicate.
        run: function that orthogonalizes a list of tensors.
        dtype: dtype in which the ranks send results.

    Returns:
        DTensors with the placements of the updates.
    """
    from torch.distributed.tensor import DTensor

    mesh = updates[0].device_mesh
    group, ranks, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    local = [update.to_local() for update in updates]
    costs = [update.shape[:-2].numel() * newton_schulz_cost(*update.shape[-2:]) for update in updates]
    owners = assign_costs(costs, ranks)
    own = [index for index, owner in enumerate(owners) if owner == rank]
    dims = [getattr(update.placements[0], "dim", None) for update in updates]
    shapes = [_shard_shapes(update.shape, dim, ranks) for update, dim in zip(updates, dims, strict=True)]
    # a replicated update need not be sent, because its owner has all of it
    sent = [[i for i, owner in enumerate(owners) if owner == to and dims[i] is not None] for to in range(ranks)]
    wide = functools.reduce(torch.promote_types, (update.dtype for update in updates))
    received = _exchange(
        [[local[index] for index in indices] for indices in sent],
        [[shapes[index][source] for index in sent[rank]] for source in range(ranks)],
        local[0].new_empty(0, dtype=wide),
        group,
    )
    shards = {index: [row[place] for row in received] for place, index in enumerate(sent[rank])}
    whole = [
        local[index] if (dim := dims[index]) is None else torch.cat(shards[index], dim).to(updates[index].dtype)
        for index in own
    ]
    results = dict(zip(own, run(whole), strict=True))
    returned = _exchange(
        [[_shard(results[index], dims[index], shapes[index], to) for index in own] for to in range(ranks)],
        [[shapes[i][rank] for i, owner in enumerate(owners) if owner == source] for source in range(ranks)],
        local[0].new_empty(0, dtype=dtype),
        group,
    )
    rows = [iter(row) for row in returned]
    return [
        DTensor.from_local(
            next(rows[owner]).to(update.dtype),
            mesh,
            update.placements,
            run_check=False,
            shape=update.shape,
            stride=_contiguous_stride(update.shape),
        )
        for update, owner in zip(updates, owners, strict=True)
    ]


def _shard_shapes(shape: torch.Size, dim: int | None, ranks: int) -> list[tuple[int, ...]]:
    """Returns the shape of each rank's local tensor. As with torch.chunk, the last ones may be smaller or empty."""
    if dim is None:
        return [tuple(shape)] * ranks
    size = -(-shape[dim] // ranks)
    lengths = [max(0, min(size, shape[dim] - rank * size)) for rank in range(ranks)]
    return [(*shape[:dim], length, *shape[dim + 1 :]) for length in lengths]


def _shard(whole: Tensor, dim: int | None, shapes: list[tuple[int, ...]], rank: int) -> Tensor:
    if dim is None:
        return whole
    return whole.narrow(dim, sum(shape[dim] for shape in shapes[:rank]), shapes[rank][dim])


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[dim + 1 :].numel() for dim in range(len(shape)))


def _exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Tensor, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Sends a list of tensors to each rank, and returns the lists received from all ranks.

    Args:
        sent: list of tensors for each rank.
        shapes: shapes of the tensors from each rank.
        like: the tensors are sent in the dtype of this tensor and arrive on its device.
        group: process group of the ranks.
    """
    parts = [tensor.flatten().to(like.dtype) for row in sent for tensor in row]
    outgoing = torch.cat([like.new_empty(0), *parts])
    counts = [[math.prod(shape) for shape in row] for row in shapes]
    incoming = like.new_empty(sum(map(sum, counts)))
    leaving = [sum(tensor.numel() for tensor in row) for row in sent]
    dist.all_to_all_single(incoming, outgoing, [sum(row) for row in counts], leaving, group=group)
    tensors = iter(incoming.split([count for row in counts for count in row]))
    return [[next(tensors).view(shape) for shape in row] for row in shapes]

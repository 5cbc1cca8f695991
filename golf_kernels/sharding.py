"""Assigns tasks to ranks by their cost, and divides Newton-Schulz orthogonalization among ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def newton_schulz_cost(rows: int, columns: int) -> int:
    """FLOPs of one Newton-Schulz iteration: 2·short²·long for X·Xᵀ, the same for B·X, and 2·short³ for A·A."""
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
    updates: Sequence[Tensor], run: Callable[[list[Tensor]], list[Tensor]], dtype: torch.dtype, group: dist.ProcessGroup
) -> list[Tensor]:
    """Orthogonalizes matrices on all ranks: each rank takes the matrices assigned to it, then all exchange results.

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

"""Work divided among the ranks matrix by matrix: who rounds which, and how everybody gets every result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from golf_kernels.sharding import share_out
from train.common.distributed import Ranks
from train.common.errors import UserError

Name = TypeVar("Name")
T = TypeVar("T")


def assign(costs: Mapping[Name, float], ranks: int) -> list[list[Name]]:
    """Divide work so that the slowest rank ends early, as `golf_kernels.sharding.share_out` does.

    Args:
        costs: cost of each matrix, in any unit.
        ranks: number of ranks.

    Returns:
        The matrices of each rank, in the order of `costs`; the same on every rank.
    """
    owners = share_out(list(costs.values()), ranks)
    return [[name for name, owner in zip(costs, owners, strict=True) if owner == rank] for rank in range(ranks)]


def gptq_cost(rows: int, columns: int) -> float:
    """Operations of GPTQ on a matrix: factorization and inverse of its Hessian, 4/3 n³, and the errors' products, m n²."""
    return 4 / 3 * columns**3 + rows * columns**2


def gather(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Do this rank's work, and learn the small picklable result of every rank's, in their order.

    Raises:
        UserError: of the first rank that raised one, on every rank, so that nobody waits for a rank that is gone.
    """
    done: list[T] = []
    problem = None
    try:
        done.append(work())
    except UserError as error:
        problem = str(error)
    found = [ranks.broadcast((done, problem), source) for source in range(ranks.world_size)]
    for _, problem in found:
        if problem is not None:
            raise UserError(problem)
    return [result for done, _ in found for result in done]

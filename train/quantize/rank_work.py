"""Divides matrices among the ranks and exchanges the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from golf_kernels.sharding import assign_costs
from train.common.distributed import Ranks
from train.common.errors import UserError

Name = TypeVar("Name")
T = TypeVar("T")


def assign(costs: Mapping[Name, float], ranks: int) -> list[list[Name]]:
    """Divide names among ranks so that all ranks finish at about the same time. A rank's names keep their order."""
    owners = assign_costs(list(costs.values()), ranks)
    return [[name for name, owner in zip(costs, owners, strict=True) if owner == rank] for rank in range(ranks)]


def gptq_cost(rows: int, columns: int) -> float:
    """Number of operations of GPTQ on an m × n matrix: 4/3 n³ to factorize and invert H, m n² to spread the errors."""
    return 4 / 3 * columns**3 + rows * columns**2


def gather(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Call `work` on every rank and return the results of all ranks in order. Results must be small and picklable.

    Raises:
        UserError: `work` raised a UserError on some rank. Every rank raises the error of the first such rank, so that
            no rank waits for a rank that has exited.
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

"""Divides matrices among the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from golf_kernels.sharding import assign_costs

Name = TypeVar("Name")


def assign(costs: Mapping[Name, float], ranks: int) -> list[list[Name]]:
    """Divide names among ranks so that the sums of the costs are about equal. The names of a rank keep their order."""
    owners = assign_costs(list(costs.values()), ranks)
    return [[name for name, owner in zip(costs, owners, strict=True) if owner == rank] for rank in range(ranks)]


def gptq_cost(rows: int, columns: int) -> float:
    """Return GPTQ's operations for an m × n matrix: 4/3 n³ to factorize and invert H, m n² to update columns."""
    return 4 / 3 * columns**3 + rows * columns**2

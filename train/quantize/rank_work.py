"""Divides matrices among the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from golf_kernels.sharding import assign_costs

Name = TypeVar("Name")


def assign(costs: Mapping[Name, float], ranks: int) -> list[list[Name]]:
    """Divide names among ranks so that all ranks finish at about the same time. A rank's names keep their order."""
    owners = assign_costs(list(costs.values()), ranks)
    return [[name for name, owner in zip(costs, owners, strict=True) if owner == rank] for rank in range(ranks)]


def gptq_cost(rows: int, columns: int) -> float:
    """Number of operations of GPTQ on an m × n matrix: 4/3 n³ to factorize and invert H, m n² to spread the errors."""
    return 4 / 3 * columns**3 + rows * columns**2

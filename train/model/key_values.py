"""Keys and values of the positions before, kept so that a text can grow by one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from train.common.wording import counted


class KeyValues:
    """Room for the keys and values of every layer run; a layer that runs twice has two.

    A forward pass over new positions extends each run once, in the order of the plan.

    Args:
        runs: layer runs of the plan.
        shape: `(B, T, H_kv, D)` for the whole text.
        dtype: compute dtype.
        device: device of the model.
    """

    def __init__(
        self, runs: int, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys, self.values = (torch.empty(runs, *shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0
        self._run = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next run's keys and values of new positions, and return those of all positions so far.

        Args:
            key: `(B, n, H_kv, D)`.
            value: `(B, n, H_kv, D)`.

        Returns:
            Keys and values `(B, length + n, H_kv, D)`; views that later calls do not change.

        Raises:
            ValueError: the text is full.
        """
        run, end = self._run, self.length + key.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"the text has room for {counted(self.keys.shape[2], 'token')}, not for {end}")
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[run, :, self.length : end] = new
        self._run = (run + 1) % len(self.keys)
        keys, values = self.keys[run, :, :end], self.values[run, :, :end]
        if self._run == 0:
            self.length = end
        return keys, values

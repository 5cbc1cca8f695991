"""Averages the weights during training: exponential moving average (EMA) and stochastic weight averaging (SWA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.common.errors import UserError


class _Average:
    """Base class of EMA and SWA. An average has one tensor per parameter of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters: list[Tensor] = [parameter for _, parameter in model.named_parameters()]

    def average(self) -> dict[str, Tensor]:
        """Return parameter name → averaged weights, in the dtype of the average.

        The caller must not change the tensors.
        """
        raise NotImplementedError

    @torch.no_grad()
    def apply(self) -> None:
        """Overwrite the model's weights with the average, rounded to each parameter's dtype."""
        torch._foreach_copy_(self._parameters, list(self.average().values()))

    def _named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def _load(self, tensors: list[Tensor], state: Mapping[str, Tensor]) -> None:
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._named(tensors).items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        if expected != found:
            name = min(name for name in expected | found if expected.get(name) != found.get(name))
            raise UserError(
                f"checkpoint, averaged weights, {name}: expected {expected.get(name, 'nothing')}, found "
                f"{found.get(name, 'nothing')}: resume with the settings that wrote the checkpoint"
            )
        torch._foreach_copy_(tensors, [state[name] for name in self._names])


class EMA(_Average):
    """Exponential moving average of every parameter, also of parameters that are not trained.

    It starts with the current weights. After each step, average <- decay * average + (1 - decay) * weights, without
    bias correction. The average is float32 or wider, even for bfloat16 embeddings. `decay` is in [0, 1).

    Source: submissions #1392 (0.997) and #1471 (0.9965).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self._shadow = [
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self._parameters
        ]
        # lerp needs equal dtypes: `update` first copies bfloat16 parameters to these float32 buffers
        narrow = [i for i, shadow in enumerate(self._shadow) if shadow.dtype != self._parameters[i].dtype]
        self._narrow = [self._parameters[i] for i in narrow]
        self._widened = [torch.empty_like(self._shadow[i]) for i in narrow]
        widened = dict(zip(narrow, self._widened, strict=True))
        self._sources = [widened.get(i, parameter) for i, parameter in enumerate(self._parameters)]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average; call it once after every step."""
        if self._narrow:
            torch._foreach_copy_(self._widened, self._narrow)
        torch._foreach_lerp_(self._shadow, self._sources, 1 - self.decay)

    def average(self) -> dict[str, Tensor]:
        return self._named(self._shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "average": self._named(self._shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned, bit for bit.

        Raises:
            UserError: the checkpoint has another decay or other parameters.
        """
        if state["decay"] != self.decay:
            raise UserError(
                f"ema_decay: the checkpoint has {state['decay']}, this run has {self.decay}: resume with the checkpoint's"
            )
        self._load(self._shadow, state["average"])


class SWA(_Average):
    """Mean of the weights after every `every`-th step whose learning-rate scale is below `threshold`.

    All parameters are averaged, also those that are not trained. As in the published scripts, the sum of a parameter
    has the parameter's dtype, so sums of bfloat16 embeddings are rounded.

    Source: submission #198 (every 200, below 0.5), the parent of #262; #122 has the same rule.
    """

    def __init__(self, model: nn.Module, every: int, threshold: float) -> None:
        super().__init__(model)
        if every < 1:
            raise ValueError(f"every: expected a positive number of steps, got {every}")
        self.every = every
        self.threshold = threshold
        self.count = 0
        self._sums = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int, scale: float) -> bool:
        """Add the current weights to the average if `step` is a multiple of `every` and `scale` is below `threshold`.

        Args:
            step: number of finished steps, including the current step.
            scale: learning-rate scale of the current step.

        Returns:
            Whether the weights were added.
        """
        if scale >= self.threshold or step % self.every:
            return False
        torch._foreach_add_(self._sums, self._parameters)
        self.count += 1
        return True

    @torch.no_grad()
    def average(self) -> dict[str, Tensor]:
        if not self.count:
            raise RuntimeError("no step was averaged: check `count` before using the average")
        return self._named(list(torch._foreach_div(self._sums, self.count)))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self._named(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned, bit for bit.

        Raises:
            UserError: the checkpoint has other parameters.
        """
        self._load(self._sums, state["sums"])
        self.count = state["count"]

"""Averages of the weights along a run: the exponential moving one (EMA) and the uniform one of checkpoints (SWA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.errors import UserError


class _Average:
    """What both averages share: the model's parameters, one tensor for each, and the exchange of the two."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = [parameter for _, parameter in model.named_parameters()]
        self._backup: list[Tensor] | None = None

    def average(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name; not in the model's dtype, and not to be written to."""
        raise NotImplementedError

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average, rounded to each parameter's dtype, into the model and keep the weights for `restore`."""
        if self._backup is not None:
            raise RuntimeError("the average is in the model already: restore before another apply")
        average = list(self.average().values())
        self._backup = [parameter.detach().clone() for parameter in self._parameters]
        torch._foreach_copy_(self._parameters, average)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights of before `apply` back, bit for bit."""
        if self._backup is None:
            raise RuntimeError("the average is not in the model: apply before restore")
        torch._foreach_copy_(self._parameters, self._backup)
        self._backup = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside the block and its own weights after it."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def _named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def _load(self, tensors: list[Tensor], state: Mapping[str, Tensor]) -> None:
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._named(tensors).items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        if expected != found:
            name = min(name for name in expected | found if expected.get(name) != found.get(name))
            raise UserError(
                f"checkpoint, averaged weights, {name}: expected {expected.get(name, 'nothing')}, found "
                f"{found.get(name, 'nothing')}: resume with the settings that the checkpoint was made with"
            )
        torch._foreach_copy_(tensors, [state[name] for name in self._names])


class EMA(_Average):
    """Exponential moving average of every parameter, from a copy of the present weights.

    After each step: average <- decay * average + (1 - decay) * weights, without bias correction, in float32 at least
    (bfloat16 embeddings too), in a few fused launches for all parameters.

    Args:
        model: its parameters, trained or not, are averaged; the first copy is their present value.
        decay: in [0, 1).

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
        # lerp wants one dtype, so the few narrow parameters are widened into buffers that live as long as the average
        narrow = [i for i, shadow in enumerate(self._shadow) if shadow.dtype != self._parameters[i].dtype]
        self._narrow = [self._parameters[i] for i in narrow]
        self._widened = [torch.empty_like(self._shadow[i]) for i in narrow]
        places = dict(zip(narrow, self._widened, strict=True))
        self._sources = [places.get(i, parameter) for i, parameter in enumerate(self._parameters)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in; once after every step."""
        if self._narrow:
            torch._foreach_copy_(self._widened, self._narrow)
        torch._foreach_lerp_(self._shadow, self._sources, 1 - self.decay)

    def average(self) -> dict[str, Tensor]:
        return self._named(self._shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "average": self._named(self._shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s result, bit for bit.

        Raises:
            UserError: the checkpoint's decay or parameters are others.
        """
        if state["decay"] != self.decay:
            raise UserError(
                f"ema_decay: the checkpoint was made with {state['decay']}, this run has {self.decay}: use one"
            )
        self._load(self._shadow, state["average"])


class SWA(_Average):
    """Uniform average of every n-th step's weights, once the learning rate has fallen.

    average = (sum of the weights after each step s with s mod every = 0 and scale < threshold) / their number.

    Args:
        model: its parameters, trained or not, are averaged.
        every: steps between two that are taken.
        threshold: a step is taken when its learning-rate scale is below this.
        sum_dtype: "parameter" keeps each sum in its parameter's dtype, as published (bfloat16 embeddings lose bits);
            "float32" in float32 at least.

    Source: submission #198 (every 200, below 0.5), the parent of #262; #122 has the same rule.
    """

    def __init__(self, model: nn.Module, every: int, threshold: float, *, sum_dtype: str = "parameter") -> None:
        super().__init__(model)
        if every < 1:
            raise ValueError(f"every: expected a positive number of steps, got {every}")
        if sum_dtype not in ("parameter", "float32"):
            raise ValueError(f"sum_dtype: expected parameter or float32, got {sum_dtype!r}")
        self.every = every
        self.threshold = threshold
        self.count = 0
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self._parameters]
        dtypes = wide if sum_dtype == "float32" else [p.dtype for p in self._parameters]
        self._sums = [
            torch.zeros_like(p, dtype=dtype, requires_grad=False)
            for p, dtype in zip(self._parameters, dtypes, strict=True)
        ]

    @torch.no_grad()
    def update(self, step: int, scale: float) -> bool:
        """Take the present weights in if it is their turn.

        Args:
            step: steps finished, the one just done included.
            scale: learning-rate scale that this step used.

        Returns:
            Whether they were taken.
        """
        if scale >= self.threshold or step % self.every:
            return False
        torch._foreach_add_(self._sums, self._parameters)
        self.count += 1
        return True

    @torch.no_grad()
    def average(self) -> dict[str, Tensor]:
        if not self.count:
            raise RuntimeError("no step was averaged: look at `count` before using the average")
        return self._named(list(torch._foreach_div(self._sums, self.count)))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self._named(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s result, bit for bit.

        Raises:
            UserError: the checkpoint's parameters are others.
        """
        self._load(self._sums, state["sums"])
        self.count = state["count"]

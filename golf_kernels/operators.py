"""What each operator declares once, and the calls that the doctor, the benchmarks and the tests make of it.

`golf_kernels/<op>.py` ends with `declare(Operator(...))`. Nothing else lists the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from golf_kernels import dispatch

Make = Callable[..., Tensor]
"""`make(*shape)` returns a tensor of that shape; `make(*shape, dtype=…)` one of another dtype than that under test."""
Inputs = dict[str, Any]

_declared: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """An operator as its file declares it.

    Attributes:
        name: name in `GOLF_BACKEND`, in the doctor and in the benchmarks.
        function: the public function, or another that calls the operator.
        inputs: `inputs(make, **case)` returns keyword arguments for `function`, with normal numbers from `make`. Tensors
            to differentiate by require a gradient. Without a case the shapes are small.
        cases: keyword arguments of `inputs` which reach the branches of the Triton kernels that no recipe reaches;
            `benchmarks.aot` compiles the kernels for them.
        members: the registered operators that it consists of, such as its backward pass; empty: `name` alone.
        called_by: the folder of `train` that calls it: model, optimize, quantize, artifact or evaluate.
        gpu_dtype: dtype of the doctor's inputs on a GPU; on a CPU they are float32.
        products: Triton kernel that multiplies matrices → its arguments with the rows and with the matrix.
        in_place: Triton kernel that overwrites a large tensor which it has read → its argument with that tensor.
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[..., Inputs]
    cases: Sequence[Mapping[str, Any]] = ()
    members: tuple[str, ...] = ()
    called_by: str = ""
    gpu_dtype: torch.dtype = torch.bfloat16
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    in_place: Mapping[str, str] = field(default_factory=dict)


def declare(operator: Operator) -> None:
    """Adds an operator to `declared`, and its name to those that `GOLF_BACKEND` knows."""
    _declared[operator.name] = operator
    dispatch.set_members(operator.name, operator.members or (operator.name,))


def declared() -> dict[str, Operator]:
    """Every operator by name."""
    return dict(sorted(_declared.items()))


def random_tensors(device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> Make:
    """A `make` of normal numbers, the same ones for the same seed and order of calls on one device."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return make


def upstream_gradients(function: Callable[..., Any], inputs: Inputs, make: Make) -> list[Tensor]:
    """A gradient for each result of `function(**inputs)`, in its shape and dtype."""
    with torch.no_grad():
        return [make(*result.shape).to(result.dtype) for result in _as_list(function(**inputs))]


def run(function: Callable[..., Any], inputs: Inputs, upstream: Sequence[Tensor]) -> list[Tensor]:
    """The results of `function(**inputs)`, then the gradients of the inputs that require one, in their order.

    Args:
        function: returns a tensor, or several.
        inputs: its keyword arguments.
        upstream: of `upstream_gradients`.
    """
    results = _as_list(function(**inputs))
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad] if leaves else []
    gradients = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs]) if pairs else ()
    return [*(result.detach() for result in results), *gradients]


def exact(inputs: Any, *, device: str | None = None, rounded_to: torch.dtype | None = None) -> Any:
    """Inputs in float64, requiring gradients where they did before; integers stay as they are.

    Args:
        inputs: tensors, in nested lists and dictionaries.
        device: where they go; None: they stay.
        rounded_to: dtype that the operator rounds all of them to at use; None: it rounds none.
    """

    def widen(tensor: Tensor) -> Tensor:
        wide = tensor.detach().to(device or tensor.device)
        if wide.is_floating_point():
            wide = wide.to(rounded_to or wide.dtype).double()
        return wide.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, widen, inputs)


def _as_list(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)

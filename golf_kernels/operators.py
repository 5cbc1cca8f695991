"""The list of all operators, with example inputs, and functions that run an operator on such inputs.

The doctor (`python -m golf_kernels`), the benchmarks and the tests use this list. `golf_kernels/<op>.py` ends with
`declare(Operator(...))`, which adds its operator to the list.
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
"""`make(*shape)` returns a tensor of this shape in the dtype under test, `make(*shape, dtype=…)` in another dtype."""
Inputs = dict[str, Any]

_declared: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """What the doctor, the benchmarks and the tests know about an operator.

    Attributes:
        name: the operator's name in `GOLF_BACKEND`, in the doctor's report and in the benchmarks.
        function: the public function, or another function that calls the operator.
        inputs: `inputs(make, **case)` returns example keyword arguments for `function`. `make` creates the tensors.
            Tensors that need a gradient have `requires_grad` set. Without a case the shapes are small.
        cases: keyword arguments for `inputs`. `benchmarks aot` compiles the Triton kernels for each case. The cases
            cover branches of the kernels that no recipe uses.
        members: names of the registered operators, for example the operator and its backward pass. If empty, `name` is
            the only one.
        called_by: the folder of `train` that calls the operator: model, optimize, quantize, artifact or evaluate.
        gpu_dtype: dtype of the doctor's inputs on a GPU. On a CPU they are float32.
        bfloat16_on_cpu: whether the operator multiplies float32 matrices in bfloat16 on a CPU with bfloat16
            instructions (`golf_kernels.cpu`).
        products: name of each Triton kernel that multiplies rows by a matrix → names of its arguments for the rows and
            for the matrix.
        in_place: name of each Triton kernel that reads a large tensor and then overwrites it → name of its argument for
            this tensor.
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[..., Inputs]
    cases: Sequence[Mapping[str, Any]] = ()
    members: tuple[str, ...] = ()
    called_by: str = ""
    gpu_dtype: torch.dtype = torch.bfloat16
    bfloat16_on_cpu: bool = False
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    in_place: Mapping[str, str] = field(default_factory=dict)


def declare(operator: Operator) -> None:
    """Adds an operator to the list and makes its name known to `GOLF_BACKEND`."""
    _declared[operator.name] = operator
    dispatch.set_members(operator.name, operator.members or (operator.name,))


def declared() -> dict[str, Operator]:
    """Returns all operators as a dictionary from name to operator, in alphabetical order."""
    return dict(sorted(_declared.items()))


def random_tensors(device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> Make:
    """Returns a `make` function that draws normal random numbers.

    On one device, the same seed and the same order of calls give the same numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return make


def upstream_gradients(function: Callable[..., Any], inputs: Inputs, make: Make) -> list[Tensor]:
    """Returns a random upstream gradient for each result of `function(**inputs)`, in the result's shape and dtype."""
    with torch.no_grad():
        return [make(*result.shape).to(result.dtype) for result in _as_list(function(**inputs))]


def run(function: Callable[..., Any], inputs: Inputs, upstream: Sequence[Tensor]) -> list[Tensor]:
    """Returns the results of `function(**inputs)`, then the gradients of all inputs that require one, in input order.

    Args:
        function: returns one tensor or several.
        inputs: keyword arguments of `function`.
        upstream: the upstream gradient of each result, from `upstream_gradients`.
    """
    results = _as_list(function(**inputs))
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad] if leaves else []
    gradients = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs]) if pairs else ()
    return [*(result.detach() for result in results), *gradients]


def exact(inputs: Any, *, device: str | None = None, rounded_to: torch.dtype | None = None) -> Any:
    """Converts floating-point inputs to float64. A converted tensor requires a gradient if its original does.

    Args:
        inputs: tensors, in nested lists and dictionaries. Integer tensors keep their dtype.
        device: device of the converted tensors. None keeps the device of each tensor.
        rounded_to: dtype to which the operator rounds its inputs. The inputs are rounded to it before the conversion.
            None: no rounding.
    """

    def widen(tensor: Tensor) -> Tensor:
        wide = tensor.detach().to(device or tensor.device)
        if wide.is_floating_point():
            wide = wide.to(rounded_to or wide.dtype).double()
        return wide.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, widen, inputs)


def _as_list(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)

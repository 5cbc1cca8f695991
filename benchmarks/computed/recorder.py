"""Record the kernels that PyTorch and golf_kernels launch on tensors without data.

A PyTorch operation counts as one kernel that reads each input once and writes each output once. An operator of
golf_kernels counts as its Triton kernels and the PyTorch operations between them. What such an operator has just read
or written is in the L2 cache.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import golf_kernels
from benchmarks.measure.devices import Kernel, newton_schulz_flops
from golf_kernels import dispatch, int6_native, operators
from golf_kernels.muon import Muon, Work
from golf_kernels.muon_options import coefficients_of

# allocations and views, which launch nothing
_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "_unsafe_view"),
    *("_reshape_alias", "is_pinned", "resize_", "record_stream"),
}
# operations that overwrite their first argument without reading it
_OVERWRITE = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
_RATES = {"attention": "attention", "attention_backward": "attention backward"}
# of an H100 and an H200
L2_BYTES = 50 << 20
_OPERATORS = operators.declared().values()
# Triton kernel that multiplies matrices → its arguments with the rows and with the matrix
_PRODUCTS = {kernel: names for operator in _OPERATORS for kernel, names in operator.products.items()}
# Triton kernel that overwrites an argument in place → that argument
_IN_PLACE = {kernel: name for operator in _OPERATORS for kernel, name in operator.in_place.items()}


def size_of(tensor: Tensor) -> float:
    """Returns the bytes of a tensor. Elements that an expanded view repeats count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return float(elements * tensor.element_size())


def on_gpu(values: Any) -> list[Tensor]:
    """Returns the CUDA tensors in nested arguments. Of several views of the same memory, it returns one."""
    found: dict[Any, Tensor] = {}
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            layout = tuple(sorted(zip(leaf.shape, leaf.stride(), strict=True)))
            found[leaf.untyped_storage()._cdata, leaf.storage_offset(), layout] = leaf
    return list(found.values())


class L2Cache:
    """The tensors that an L2 cache of `L2_BYTES` holds. It drops those that were not used for longest."""

    def __init__(self) -> None:
        # the tensors themselves are kept, so that no other tensor gets their storage
        self._held: dict[Any, tuple[float, Tensor]] = {}

    def traffic(self, tensors: Iterable[Tensor]) -> tuple[float, float]:
        """Reads or writes the tensors, in order. Returns the bytes from or to memory, and those found in the cache."""
        memory = cached = 0.0
        for tensor in tensors:
            key, size = (tensor.untyped_storage()._cdata, tensor.storage_offset()), size_of(tensor)
            held, _ = self._held.pop(key, (0.0, None))
            cached += min(held, size)
            memory += size - min(held, size)
            self._held[key] = (size, tensor)
            while sum(size for size, _ in self._held.values()) > L2_BYTES:
                del self._held[next(iter(self._held))]
        return memory, cached


class Recorder(TorchDispatchMode):
    """A mode that lists the kernels launched in it, and counts how often the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.waits = 0
        # of the operator of golf_kernels that runs
        self._cache: L2Cache | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Tells PyTorch that compiled code may run in this mode."""
        return True

    def item(self, tensor: Tensor) -> int:
        self.waits += tensor.is_cuda
        return 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "golf":
            self._cache = L2Cache()
            with self, launches_listed(self.kernels, self._cache):
                found = dispatch.run_on(dispatch.choose(name, *args).backend, name, *args)
            self._cache = None
            return found
        with self:
            # a composite operation is decomposed here, so that its parts are recorded
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        if not (func.is_view or name in _NOTHING):
            self.kernels += (
                [eager_kernel(func, args, kwargs, result, self._cache)] if on_gpu((args, kwargs, result)) else []
            )
        return result


def eager_kernel(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cache: L2Cache | None = None
) -> Kernel:
    """Describes a PyTorch operation as one kernel. None: the cache holds nothing."""
    name = func._overloadpacket.__name__
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    blind = {n for n in changed if n == "out" or name in _OVERWRITE}
    reads = on_gpu([value for n, value in given.items() if n not in blind])
    writes = on_gpu([given.get(n) for n in changed])
    if not changed:
        writes = on_gpu(result)
    count = flop_registry.get(func._overloadpacket)
    # PyTorch's count for addmm does not know `out_dtype`
    shapes = (arg for arg in args if not isinstance(arg, torch.dtype))
    flops = float(count(*shapes, **kwargs, out_val=result)) if count else 0.0
    touched = (*reads, *writes)
    memory, cached = cache.traffic(touched) if cache else (sum(map(size_of, touched)), 0.0)
    return Kernel(f"{func.namespace}::{name}", flops, memory, _RATES.get(name, "cublas"), cached)


class Launch:
    """Replaces a Triton kernel and records its launches.

    Each tensor argument counts as read or written once; an argument overwritten in place counts twice.
    """

    def __init__(self, kernel: Any, kernels: list[Kernel], cache: L2Cache) -> None:
        self.name, self.arg_names, self.kernels, self.cache = kernel.__name__, kernel.arg_names, kernels, cache

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            given = dict(zip(self.arg_names, arguments, strict=False)) | named
            values: dict[str, Any] = {name: getattr(value, "base", value) for name, value in given.items()}
            tensors = on_gpu(values)
            flops = 0.0
            if self.name in _PRODUCTS:
                rows, matrix = (values[name] for name in _PRODUCTS[self.name])
                flops = 2.0 * rows.numel() / rows.shape[-1] * matrix.numel()
            again = [given[_IN_PLACE[self.name]]] if self.name in _IN_PLACE else []
            memory, cached = self.cache.traffic([*tensors, *again])
            self.kernels.append(Kernel(self.name, flops, memory, "triton", cached))

        return launch


@functools.cache
def _kernel_modules() -> list[Any]:
    paths = sorted(Path(golf_kernels.__file__).parent.glob("*_triton.py"))
    return [importlib.import_module(f"golf_kernels.{path.stem}") for path in paths]


@contextlib.contextmanager
def launches_listed(kernels: list[Kernel], cache: L2Cache) -> Iterator[None]:
    """Append launches to `kernels` instead of running them.

    This covers every Triton kernel of golf_kernels and the CUDA kernel of int6's fake quantization.
    """

    def fake_quantize(*tensors: Tensor) -> None:
        kernels.append(Kernel("fake_quantize_kernel", 0.0, sum(map(size_of, tensors))))

    with contextlib.ExitStack() as stack:
        for module in _kernel_modules():
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel") and hasattr(kernel, "arg_names"):
                    stack.enter_context(mock.patch.object(module, name, Launch(kernel, kernels, cache)))
            if hasattr(module, "KERNELS"):
                replaced = {product: Launch(kernel, kernels, cache) for product, kernel in module.KERNELS.items()}
                stack.enter_context(mock.patch.object(module, "KERNELS", replaced))
        stack.enter_context(mock.patch.object(int6_native, "fake_quantize", fake_quantize))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext()))
        # any address that is aligned for TMA
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", return_value=512))
        yield


def operator_kernels(operator: Any, args: Iterable[Any]) -> list[Kernel]:
    """Returns the kernels that one call of an operator launches on tensors without data."""
    with Recorder() as recorder, torch.no_grad():
        operator(*args)
    found: list[Kernel] = recorder.kernels
    return found


def muon_step_kernels(work: list[Work]) -> list[Kernel]:
    """Returns the kernels of Muon's fused step: two passes over the float32 state, and matrix products between them.

    The products' bfloat16 matrices are assumed to stay in the L2 cache. Only the first product's input and the last
    product's result count as memory traffic.
    """
    kernels = []
    for group, params in work:
        shapes = tuple((m.shape[-2], m.shape[-1]) for p in params for m in (p.unbind() if p.ndim == 3 else (p,)))
        numbers = float(sum(p.numel() for p in params))
        iterations = len(coefficients_of(group).schedule(group["ns_steps"]))
        # momentum_kernel reads gradient, momentum and writes momentum, direction; apply_kernel reads direction, weights
        # and writes weights
        kernels.append(Kernel("momentum_kernel", 0.0, 14 * numbers, "triton"))
        kernels.append(Kernel("norm_kernel", 0.0, 0.0, "triton"))
        for name in ("symmetric_kernel", "symmetric_kernel", "product_kernel"):
            # each of the three products counts as a third of an iteration's FLOPs and traffic
            product = Kernel(name, newton_schulz_flops(shapes, 1) / 3, 4 * numbers / 3 / iterations, "triton")
            kernels += [product] * iterations
        kernels += [Kernel("moments_kernel", 0.0, 2 * numbers, "triton")] * bool(group["normuon"])
        kernels.append(Kernel("apply_kernel", 0.0, 10 * numbers, "triton"))
    return kernels


@contextlib.contextmanager
def fused_muon_listed(recorder: Recorder) -> Iterator[None]:
    """Record calls of `muon_step` on its Triton backend instead of running them."""
    call = dispatch.call

    def listed(op: str, *args: Any) -> Any:
        if op != "muon_step" or dispatch.choose(op, device="cuda").backend == "torch":
            return call(op, *args)
        optimizer: Muon = args[1]
        for _, params in args[2]:
            for param in params:
                optimizer.moment(param, "momentum_buffer", param)
        recorder.kernels += muon_step_kernels(args[2])
        return None

    with mock.patch.object(dispatch, "call", listed):
        yield

"""Registers the `golf::` operators and chooses a backend for each call.

CONTRIBUTING.md lists the files of a new kernel.

There are four backends: `torch` (the reference, for any device), `cpp` (for CPU tensors), `triton` and `cuda` (for CUDA
tensors). A call uses the first backend that can run, in this order:

1. the backend that `GOLF_BACKEND` names;
2. on a GPU, the backend that this machine's tuned file names (`golf_kernels.tuned`);
3. cuda, cpp, torch. Triton kernels run only if 1 or 2 names them.

Each fallback is logged once, with the reason.

`GOLF_BACKEND` has entries separated by commas:

    torch                  names the backend of all operators
    int6=cuda              names the backend of a group of operators; overrides an entry for all operators
    newton_schulz=triton   names the backend of one operator; overrides an entry for its group

A named backend is forced: if it cannot run, the call raises an error. With a question mark, as in
`newton_schulz=triton?`, the call uses the next backend in the order instead. If the named backend does not take tensors
on the call's device, the call uses the first backend of item 3 that can run. `newton_schulz=torch?` is a choice for CUDA
tensors only. A backend may have variants, which compute the same with other sizes:
`softcapped_cross_entropy=triton/32MiB`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from golf_kernels import tuned
from golf_kernels.backend_names import ENVIRONMENT_VARIABLE as ENVIRONMENT_VARIABLE
from golf_kernels.backend_names import PREFERENCE as PREFERENCE
from golf_kernels.backend_names import Backend as Backend
from golf_kernels.backend_names import BackendError as BackendError
from golf_kernels.backend_names import Named, nearest, read, without_variant
from golf_kernels.backend_names import forced as forced

AVAILABLE = "available"

# torch.library.Library carries no type hints
_Library: Any = torch.library.Library
LIBRARY = _Library("golf", "FRAGMENT")

# device types whose tensors a backend takes; an empty tuple means all
_DEVICES: dict[Backend, tuple[str, ...]] = {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",), "torch": ()}
_logger = logging.getLogger("golf_kernels")
_logged: set[tuple[str, str, str]] = set()


class Choice(NamedTuple):
    """The backend chosen for a call, and the reason for the choice."""

    backend: Backend
    reason: str


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    supports: Callable[..., str | None]


_registry: dict[str, dict[Backend, _Implementation]] = {}
# name of a group of operators → its operators
_members: dict[str, tuple[str, ...]] = {}


def _supports_everything(*args: Any, **kwargs: Any) -> str | None:
    return None


def register(
    op: str,
    backend: Backend,
    fn: Callable[..., Any],
    *,
    supports: Callable[..., str | None] = _supports_everything,
    variants: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> None:
    """Registers one implementation of an operator.

    Args:
        op: name of the operator without its namespace, for example `newton_schulz`.
        backend: `cuda`, `triton`, `cpp` or `torch`.
        fn: takes the arguments of the operator's schema, in order, and returns what the schema says.
        supports: returns None if `fn` can run, otherwise the reason, as a phrase ("not built: no nvcc"). Called without
            arguments, it checks this machine: is the backend built, can it be imported, is there a GPU? Called with the
            operator's arguments, it also checks their dtypes and shapes. It need not check their device.
        variants: other functions like `fn`, by name. `GOLF_BACKEND` selects one as `op=triton/NAME`.
    """
    if backend not in PREFERENCE:
        raise ValueError(f"backend of {op}: expected one of {', '.join(PREFERENCE)}, found {backend!r}")
    named = {backend: fn} | {f"{backend}/{name}": function for name, function in variants.items()}
    _registry.setdefault(op, {}).update({name: _Implementation(run, supports) for name, run in named.items()})


def set_members(name: str, members: Sequence[str]) -> None:
    """Defines a group: `name` stands for these operators in `GOLF_BACKEND` and in `available_backends`."""
    _members[name] = tuple(members)


def members(name: str) -> tuple[str, ...]:
    """Returns the operators of the group `name`. If there is no such group, returns `name` itself as the only one."""
    return _members.get(name, (name,))


def define(op: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the PyTorch operator `golf::<op>`. Each call runs on the backend that `choose` returns.

    Args:
        op: name of the operator.
        schema: arguments and results, for example `(Tensor x, float eps) -> Tensor`.
        reference: the PyTorch implementation, registered as backend `torch`.
        fake: returns uninitialized results of the right shape, dtype, device and strides, for tracing.
    """
    LIBRARY.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    register(op, "torch", reference)
    LIBRARY.impl(op, functools.partial(call, op), "CPU")
    LIBRARY.impl(op, functools.partial(call, op), "CUDA")
    torch.library.register_fake(f"golf::{op}", fake, lib=LIBRARY)


def define_backward(
    op: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Defines `golf::<op>_backward` and gives `golf::<op>` a first derivative, but no second.

    Args:
        op: name of an operator that `define` has defined.
        schema, reference, fake: arguments of `define` for the backward operator.
        setup_context, backward: arguments of `torch.library.register_autograd` for `golf::<op>`.
    """
    define(f"{op}_backward", schema, reference=reference, fake=fake)
    torch.library.register_autograd(f"golf::{op}", backward, setup_context=setup_context, lib=LIBRARY)
    refuse_gradient(f"{op}_backward", f"golf::{op} is not differentiable twice; leave create_graph at False")


def refuse_gradient(op: str, message: str) -> None:
    """Makes `golf::<op>` raise RuntimeError with this message if an input requires a gradient."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    torch.library.register_autograd(f"golf::{op}", refuse, setup_context=refuse, lib=LIBRARY)


def call(op: str, *args: Any) -> Any:
    """Runs `op` on the backend that `choose` returns, with `torch.autocast` switched off.

    Raises:
        RuntimeError: forward-mode differentiation is active; no operator supports it.
    """
    # without this error PyTorch would silently drop the tangents and return a derivative of 0
    if getattr(forward_ad, "_current_level", -1) >= 0:
        raise RuntimeError(
            f"{op} has no forward-mode derivative: expected a call outside torch.func.jvp, jacfwd and "
            "forward_ad.dual_level; use backward()"
        )
    function = _registry[op][choose(op, *args).backend].function
    device = _device(args)
    # PyTorch has no autocast for other devices, such as meta
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return function(*args)
    return function(*args)


def run_on(backend: Backend, op: str, *args: Any) -> Any:
    """Runs `op` on the given backend without calling `choose`."""
    implementations = _implementations(op)
    if backend not in implementations:
        raise BackendError(f"{op} has no {backend} backend, only {', '.join(implementations)}")
    return implementations[backend].function(*args)


def choose(op: str, *args: Any, device: str | None = None) -> Choice:
    """Chooses the backend of a call, by the order in this module's docstring.

    Args:
        op: name of the operator.
        args: the operator's arguments. Without arguments, dtypes and shapes are not checked.
        device: type of the tensors' device. None takes it from `args` or, without `args`, CUDA if there is a GPU.

    Returns:
        The backend and the reason.

    Raises:
        BackendError: the forced backend cannot run, no backend can run, or `GOLF_BACKEND` cannot be read.
    """
    implementations = _implementations(op)
    device = _device(args) if device is None else device
    named, source = _named(op), ENVIRONMENT_VARIABLE
    if named is None and device == "cuda":
        named, source = _tuned(op)
    if named == Named("torch", forced=False) and device != "cuda":
        # on a GPU the kernel lost against PyTorch, which says nothing about the C++ backend
        named = None
    refused: list[str] = []
    if named is not None:
        elsewhere = bool(args) and not _made_for(named.backend, device)
        problem = refusal(op, named.backend, *(() if elsewhere else args))
        if problem is not None and named.forced:
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE} forces {named.backend} for {op}, which cannot run: {problem}; "
                f"unset it, or choose another with {ENVIRONMENT_VARIABLE}={op}=torch"
            )
        if (
            problem is None
            and device == "cuda"
            and not named.forced
            and tuned.failed((op, *_groups(op)), without_variant(named.backend))
        ):
            problem = "its check failed on this GPU"
        if elsewhere:
            problem = f"takes tensors on {' or '.join(_DEVICES[without_variant(named.backend)])}, found {device}"
        if problem is None:
            verb = "forced" if named.forced else "preferred"
            return Choice(named.backend, f"{verb} by {source}" if source == ENVIRONMENT_VARIABLE else source)
        refused.append(f"{named.backend}: named, but {problem}")
        _log_once(op, named.backend, problem)
    for backend in PREFERENCE:
        # a backend for other devices is skipped, which is not logged as a fallback
        if backend not in implementations or (_DEVICES[backend] and device not in _DEVICES[backend]):
            continue
        problem = implementations[backend].supports(*args)
        if backend == "triton":
            if problem is None and named is None:
                tuned.tell()
            if named is None or without_variant(named.backend) != "triton":
                refused.append(f"triton: {problem or f'not chosen: {tuned.COMMAND}'}")
            continue
        if problem is None:
            usual = "the only backend" if len(implementations) == 1 else f"default on {device}"
            return Choice(backend, "; ".join(refused) or usual)
        refused.append(f"{backend}: {problem}")
        _log_once(op, backend, problem)
    raise BackendError(f"{op}: no backend runs on {device} ({'; '.join(refused) or 'none is registered'})")


def available_backends(name: str, device: str | None = None) -> list[Backend]:
    """Returns the backends on which this machine can run an operator and its backward pass, preferred first.

    Args:
        name: name of an operator, or of a group of operators (`set_members`).
        device: device type. Backends that do not take tensors on it are left out. None: backends for any device.
    """
    found = [_implementations(op) for op in members(name)]
    return [
        backend
        for backend in PREFERENCE
        if all(backend in one and one[backend].supports() is None for one in found)
        and (device is None or _made_for(backend, device))
    ]


def describe() -> dict[str, dict[Backend, str]]:
    """Returns operator → backend → `available`, or the reason why this machine cannot run the backend."""
    answers: dict[str, dict[Backend, str]] = {}
    for op, implementations in sorted(_registry.items()):
        order = [backend for backend in PREFERENCE if backend in implementations]
        answers[op] = {backend: implementations[backend].supports() or AVAILABLE for backend in order}
    return answers


def refusal(op: str, backend: Backend, *args: Any) -> str | None:
    """Returns the reason why a backend cannot run an operator on this machine, or None if it can.

    Without `args`, dtypes and shapes are not checked.
    """
    implementations = _implementations(op)
    if backend not in implementations:
        known = sorted(implementations, key=lambda name: PREFERENCE.index(without_variant(name)))
        return f"{op} has no {backend} backend, only {', '.join(known)}"
    supports = implementations[backend].supports
    return supports() or (supports(*args) if args else None)


def may_run(op: str, backend: Backend, text: str) -> bool:
    """Whether `op` may run on this backend if `GOLF_BACKEND` is `text` and there is no tuned file."""
    if backend not in _implementations(op):
        return False
    named = _named(op, text)
    return without_variant(backend) != "triton" or (named is not None and without_variant(named.backend) == "triton")


def with_preferences(text: str, preferences: Mapping[str, str]) -> str:
    """Adds `name=backend?` to a value of `GOLF_BACKEND` for each operator or group that it leaves undecided."""
    added = [f"{n}={b}?" for n, b in preferences.items() if all(_named(op, text) is None for op in members(n))]
    return ",".join([*added, text] if text else added)


def registered() -> Iterator[tuple[str, Backend, Callable[..., Any]]]:
    """Yields (operator, backend, function) for all functions passed to `register`, both `fn` and `supports`."""
    for op, implementations in sorted(_registry.items()):
        for backend, implementation in implementations.items():
            yield op, backend, implementation.function
            yield op, backend, implementation.supports


def triton_problem(*, tma: bool = False) -> str | None:
    """Returns the reason why this machine cannot run Triton kernels, as a phrase for `supports`, or None if it can.

    Kernels that use TMA (`tma`) need compute capability 9.0, others 8.0.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    found, (needed, name) = torch.cuda.get_device_capability(), (9, "9.0 for TMA") if tma else (8, "8.0")
    reason = f"its Triton kernels need compute capability {name}, this GPU has {found[0]}.{found[1]}"
    return reason if found[0] < needed else None


def elementwise_problem(name: str, tensor: Tensor) -> str | None:
    """Returns the reason why Triton kernels without matrix products cannot take this tensor, or None if they can."""
    # Triton's interpreter would truncate numbers to bfloat16 instead of rounding them
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if tensor.is_cuda else (torch.float16, torch.float32)
    if tensor.dtype in dtypes:
        return None
    return f"{name} is {tensor.dtype}, the Triton kernels take {', '.join(map(str, dtypes))}"


def validate() -> None:
    """Checks `GOLF_BACKEND` for every operator, so that a long run fails at its start and not at its end.

    Raises:
        BackendError: see `choose`.
    """
    for op in _registry:
        if _named(op) is not None:
            choose(op)


def _implementations(op: str) -> dict[Backend, _Implementation]:
    if op not in _registry:
        raise BackendError(f"unknown operator {op!r}; {nearest(op, sorted(_registry))}")
    return _registry[op]


def _made_for(backend: Backend, device: str) -> bool:
    # only Triton's interpreter runs a GPU backend on CPU tensors
    kind = without_variant(backend)
    interpreted = kind == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return not _DEVICES[kind] or device in _DEVICES[kind] or interpreted


def _named(op: str, text: str | None = None) -> Named | None:
    """Returns the backend that `text` names for an operator, or None. By default `text` is `GOLF_BACKEND`."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "") if text is None else text
    if not text:
        return None
    default, by_name = read(text, (*_registry, *_members))
    # an entry for the operator wins over an entry for its group
    return next((by_name[name] for name in (op, *_groups(op)) if name in by_name), default)


def _tuned(op: str) -> tuple[Named | None, str]:
    found = tuned.of_calls((op, *_groups(op)))
    return (Named(found[0], False), found[1]) if found else (None, "")


def _groups(op: str) -> tuple[str, ...]:
    return tuple(name for name, listed in _members.items() if op in listed)


def _device(args: tuple[Any, ...]) -> str:
    for arg in args:
        tensor = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(tensor, Tensor):
            return tensor.device.type
    return "cuda" if torch.cuda.is_available() else "cpu"


def _log_once(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _logged:
        _logged.add((op, backend, reason))
        _logger.warning("%s: falling back from %s: %s", op, backend, reason)

"""Registers the `golf::` operators and chooses a backend for each call.

A new kernel takes six files, tests and documentation included:

1. `golf_kernels/<op>.py`: the public function, with formula, shapes, dtypes and errors in its docstring; `define` with
   the PyTorch reference and the fake implementation; `define_backward` for gradients; `register` for every other
   backend; `operators.declare`, which the doctor, the benchmarks and the tests of all operators read.
2. `golf_kernels/<op>_triton.py` or `csrc/<op>.cu`: the kernel. The Triton file imports only torch and triton.
3. `golf_kernels/__init__.py`: the import of the function.
4. `tests/kernels/test_<op>.py`: tests of every backend against float64, of gradients, odd shapes and errors.
5. `benchmarks/bench_<op>.py`: a `Chain` (`benchmarks/measure/chains.py`) if the kernel replaces elementwise operations.
6. `README.md`: a row in the table of operators.

There are four backends: `torch` (the reference, for any device), `cpp` (for CPU tensors), `triton` and `cuda` (for CUDA
tensors). A call takes the first one that can run, in the order cuda, triton, cpp, torch. A backend registered with
`opt_in` runs only if it is forced. A fallback is logged once, with its reason.

`GOLF_BACKEND` forces backends: `torch` for all operators, `newton_schulz=triton,int6=cuda` for single operators,
`torch,int6=cpp` for int6 and for all others. A forced backend that cannot run raises an error. Forcing a backend does
not affect tensors on devices that this backend does not take: they take the first other backend that can run.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["cuda", "triton", "cpp", "torch"]
PREFERENCE: tuple[Backend, ...] = get_args(Backend)
ENVIRONMENT_VARIABLE = "GOLF_BACKEND"
AVAILABLE = "available"
# value of `opt_in` for a backend whose effect on the training step was not measured yet
UNMEASURED = "not yet measured in a training step"

# torch.library.Library carries no type hints
_Library: Any = torch.library.Library
LIBRARY = _Library("golf", "FRAGMENT")

# device types whose tensors a backend takes; an empty tuple means all
_DEVICES: dict[Backend, tuple[str, ...]] = {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",), "torch": ()}
_logger = logging.getLogger("golf_kernels")
_logged: set[tuple[str, str, str]] = set()


class BackendError(RuntimeError):
    """A forced backend cannot run, or `GOLF_BACKEND` names something that does not exist."""


class Choice(NamedTuple):
    """The backend chosen for a call, and the reason for the choice."""

    backend: Backend
    reason: str


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    supports: Callable[..., str | None]
    opt_in: str


_registry: dict[str, dict[Backend, _Implementation]] = {}
# name in GOLF_BACKEND → its operators
_members: dict[str, tuple[str, ...]] = {}


def _supports_everything(*args: Any, **kwargs: Any) -> str | None:
    return None


def register(
    op: str,
    backend: Backend,
    fn: Callable[..., Any],
    *,
    supports: Callable[..., str | None] = _supports_everything,
    opt_in: str = "",
) -> None:
    """Registers one implementation of an operator.

    Args:
        op: name of the operator without its namespace, for example `newton_schulz`.
        backend: `cuda`, `triton`, `cpp` or `torch`.
        fn: takes the arguments of the operator's schema, in order, and returns what the schema says.
        supports: returns None if `fn` can run, otherwise the reason, as a phrase ("not built: no nvcc"). Called without
            arguments, it checks this machine: is the backend built, is it importable, is there a GPU? Called with the
            operator's arguments, it also checks their dtypes and shapes. It need not check their device.
        opt_in: reason why the backend runs only if it is forced ("slower than torch in the step on H200"). An empty
            string lifts this restriction.
    """
    if backend not in PREFERENCE:
        raise ValueError(f"backend of {op}: expected one of {', '.join(PREFERENCE)}, found {backend!r}")
    _registry.setdefault(op, {})[backend] = _Implementation(fn, supports, opt_in)
    _read.cache_clear()


def set_members(name: str, members: Sequence[str]) -> None:
    """Makes `name` select these operators in `GOLF_BACKEND` and in `available_backends`."""
    _members[name] = tuple(members)
    _read.cache_clear()


def members(name: str) -> tuple[str, ...]:
    """Returns the operators that `set_members` recorded for `name`; without a record, `name` itself."""
    return _members.get(name, (name,))


def define(op: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the PyTorch operator `golf::<op>`. Each call of it runs on the backend that `choose` returns.

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
    if torch.is_autocast_enabled(device):
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
    """Chooses the backend of a call: the forced backend, otherwise the first in `PREFERENCE` that can run.

    Args:
        op: name of the operator.
        args: the operator's arguments. Without arguments, dtypes and shapes are not checked.
        device: type of the tensors' device. None: the device of `args`; without `args`, CUDA if there is a GPU.

    Returns:
        The backend and the reason.

    Raises:
        BackendError: the forced backend cannot run, no backend can run, or `GOLF_BACKEND` cannot be read.
    """
    implementations = _implementations(op)
    device = _device(args) if device is None else device
    forced = _forced(op)
    refused: list[str] = []
    if forced is not None:
        elsewhere = bool(args) and not _made_for(forced, device)
        problem = refusal(op, forced, *(() if elsewhere else args))
        if problem is not None:
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE} forces {forced} for {op}, which cannot run: {problem}; "
                f"unset it, or choose another with {ENVIRONMENT_VARIABLE}={op}=torch"
            )
        if not elsewhere:
            return Choice(forced, f"forced by {ENVIRONMENT_VARIABLE}")
        problem = f"forced, but it takes tensors on {' or '.join(_DEVICES[forced])}, found {device}"
        refused.append(f"{forced}: {problem}")
        _log_once(op, forced, problem)
    for backend in PREFERENCE:
        # skipping a backend that is made for another device is not logged as a fallback
        if backend not in implementations or (_DEVICES[backend] and device not in _DEVICES[backend]):
            continue
        opt_in = implementations[backend].opt_in
        problem = f"only when forced: {opt_in}" if opt_in else implementations[backend].supports(*args)
        if problem is None:
            usual = "the only backend" if len(implementations) == 1 else f"first choice on {device}"
            return Choice(backend, "; ".join(refused) or usual)
        refused.append(f"{backend}: {problem}")
        if not opt_in:
            _log_once(op, backend, problem)
    raise BackendError(f"{op}: no backend runs on {device} ({'; '.join(refused) or 'none is registered'})")


def available_backends(name: str, device: str | None = None) -> list[Backend]:
    """Returns the backends on which this machine can run an operator and its backward pass, preferred first.

    Args:
        name: name of an operator, or of a group of operators (`set_members`).
        device: device type. Backends that do not take tensors on such a device are left out; None: no backend is.
    """
    found = [_implementations(op) for op in members(name)]
    return [
        backend
        for backend in PREFERENCE
        if all(backend in one and one[backend].supports() is None for one in found)
        and (device is None or _made_for(backend, device))
    ]


def describe() -> dict[str, dict[Backend, str]]:
    """Returns, for each backend of each operator, `available` or the reason why this machine cannot run the backend."""
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
        return f"{op} has no {backend} backend, only {', '.join(b for b in PREFERENCE if b in implementations)}"
    unavailable = implementations[backend].supports()
    if unavailable is not None or not args:
        return unavailable
    return implementations[backend].supports(*args)


def may_run(op: str, backend: Backend, text: str) -> bool:
    """Whether `op` may run on this backend if `GOLF_BACKEND` is `text`. An `opt_in` backend must be forced."""
    return not _implementations(op)[backend].opt_in or _forced(op, text) == backend


def registered() -> Iterator[tuple[str, Backend, Callable[..., Any]]]:
    """Yields (operator, backend, function) twice for each registered backend: with `fn` and with `supports`."""
    for op, implementations in sorted(_registry.items()):
        for backend, implementation in implementations.items():
            yield op, backend, implementation.function
            yield op, backend, implementation.supports


@contextmanager
def forced(text: str) -> Iterator[None]:
    """Sets `GOLF_BACKEND` to `text` inside a `with` block."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def triton_problem(*, tma: bool = False) -> str | None:
    """Returns the reason why this machine cannot run Triton kernels, as a phrase for `supports`, or None if it can.

    Args:
        tma: whether the kernels move tiles with TMA, which GPUs have from compute capability 9.0 on. The others run
            from 8.0 on.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    found, needed = torch.cuda.get_device_capability(), (9, 0) if tma else (8, 0)
    if found >= needed:
        return None
    purpose = " for TMA" if tma else ""
    return f"its Triton kernels need compute capability {needed[0]}.0{purpose}, this GPU has {found[0]}.{found[1]}"


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
        if _forced(op) is not None:
            choose(op)


def _implementations(op: str) -> dict[Backend, _Implementation]:
    if op not in _registry:
        raise BackendError(f"unknown operator {op!r}; {_nearest(op, sorted(_registry))}")
    return _registry[op]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _made_for(backend: Backend, device: str) -> bool:
    # only Triton's interpreter runs a GPU backend on CPU tensors
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return not _DEVICES[backend] or device in _DEVICES[backend] or interpreted


def _forced(op: str, text: str | None = None) -> Backend | None:
    return _read(op, os.environ.get(ENVIRONMENT_VARIABLE, "") if text is None else text)


# cached, because a training step calls this about a hundred times
@functools.lru_cache(maxsize=1024)
def _read(op: str, text: str) -> Backend | None:
    """The backend that `GOLF_BACKEND=text` forces for an operator; None if it forces none."""
    default: Backend | None = None
    by_name: dict[str, Backend] = {}
    for entry in text.split(",") if text else ():
        name, equals, value = (word.strip() for word in entry.rpartition("="))
        matches = [backend for backend in PREFERENCE if backend == value]
        if not matches or (equals and not name):
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}={text}: cannot read {entry!r}; expected a backend ({', '.join(PREFERENCE)}) "
                "or operator=backend, separated by commas"
            )
        if equals:
            by_name[name] = matches[0]
        else:
            default = matches[0]
    known = sorted({*_registry, *_members})
    for name in by_name:
        if name not in known:
            raise BackendError(f"{ENVIRONMENT_VARIABLE}: unknown operator {name!r}; {_nearest(name, known)}")
    # an entry for the operator wins over an entry for its group
    names = [op, *(name for name, members in _members.items() if op in members)]
    return next((by_name[name] for name in names if name in by_name), default)


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

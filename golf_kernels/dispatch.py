"""Registration of the `golf::` operators, and the choice of a backend for each call.

Adding a kernel takes six files, tests and documentation included:

1. `golf_kernels/<op>.py`: the public function with its formula, shapes, dtypes and errors; the PyTorch reference and the
   fake implementation (`define`; `define_backward` for gradients); every other backend (`register`); one
   `operators.declare`, which the doctor, `benchmarks.aot`, the benchmarks and the tests of all operators read.
2. `golf_kernels/<op>_triton.py`, which imports torch and triton alone, or `csrc/<op>.cu`: the kernel.
3. `golf_kernels/__init__.py`: the import of the function.
4. `tests/kernels/test_<op>.py`: every backend against float64, gradients, odd shapes, errors.
5. `benchmarks/bench_<op>.py`: a `Chain` of `benchmarks/measure/chains.py` where the kernel replaces elementwise passes.
6. `README.md`: a row of the table of operators.

The backends are `torch` (the reference, on any device), `cpp` (CPU tensors), `triton` and `cuda` (CUDA tensors). A call
takes the first that can run, in the order cuda, triton, cpp, torch; a fallback is logged once, with its reason.
`GOLF_BACKEND` forces a backend: `torch` for every operator, `newton_schulz=triton,int6=cuda` by name, or both,
`torch,int6=cpp`. A forced backend that cannot run is an error. Tensors on a device that it is not made for take the
first of the others that can run.
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
# `opt_in` of a backend until the training step was measured with and without it
UNMEASURED = "not yet measured in a training step"

# torch.library.Library carries no type hints
_Library: Any = torch.library.Library
LIBRARY = _Library("golf", "FRAGMENT")

# devices whose tensors a backend takes; none: all
_DEVICES: dict[Backend, tuple[str, ...]] = {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",), "torch": ()}
_logger = logging.getLogger("golf_kernels")
_logged: set[tuple[str, str, str]] = set()


class BackendError(RuntimeError):
    """A forced backend cannot run, or `GOLF_BACKEND` names something that does not exist."""


class Choice(NamedTuple):
    """The backend of a call, and the reason for it."""

    backend: Backend
    reason: str


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    supports: Callable[..., str | None]
    opt_in: str


_registry: dict[str, dict[Backend, _Implementation]] = {}
# name in GOLF_BACKEND → the operators that it stands for, where that is not the operator of that name alone
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
        supports: returns None where `fn` can run, otherwise the reason, as a phrase ("not built: no nvcc"). Without
            arguments it answers for this machine (built? importable? a GPU?), with the operator's arguments for their
            dtypes and shapes too. The device has been checked before.
        opt_in: why the backend is not taken unless it is forced ("slower than torch in the step on H200").
    """
    if backend not in PREFERENCE:
        raise ValueError(f"backend of {op}: expected one of {', '.join(PREFERENCE)}, found {backend!r}")
    _registry.setdefault(op, {})[backend] = _Implementation(fn, supports, opt_in)
    _read.cache_clear()


def set_members(name: str, members: Sequence[str]) -> None:
    """Lets `name` stand for these operators in `GOLF_BACKEND` and in `available_backends`."""
    _members[name] = tuple(members)
    _read.cache_clear()


def members(name: str) -> tuple[str, ...]:
    """The operators that `name` stands for: those of `set_members`, or the operator of that name alone."""
    return _members.get(name, (name,))


def define(op: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `golf::<op>` with its reference and fake implementation; calls go through `choose`.

    Args:
        op: name of the operator.
        schema: arguments and results, for example `(Tensor x, float eps) -> Tensor`.
        reference: the PyTorch implementation, registered as backend `torch`.
        fake: returns empty results of the right shape, dtype, device and strides.
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
    """Defines `golf::<op>_backward` and makes `golf::<op>` differentiable, once.

    Args:
        op: name of the operator, which is defined already.
        schema, reference, fake: of the backward operator, as `define` takes them.
        setup_context, backward: as `torch.library.register_autograd` takes them.
    """
    define(f"{op}_backward", schema, reference=reference, fake=fake)
    torch.library.register_autograd(f"golf::{op}", backward, setup_context=setup_context, lib=LIBRARY)
    refuse_gradient(f"{op}_backward", f"golf::{op} is not differentiable twice; leave create_graph at False")


def refuse_gradient(op: str, message: str) -> None:
    """Makes `golf::<op>` raise RuntimeError with this message where an input requires a gradient."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    torch.library.register_autograd(f"golf::{op}", refuse, setup_context=refuse, lib=LIBRARY)


def call(op: str, *args: Any) -> Any:
    """Runs `op` on the backend that `choose` returns. `torch.autocast` does not change the dtypes of its arguments.

    Raises:
        RuntimeError: inside forward-mode differentiation, which no operator here supports.
    """
    # PyTorch would drop the tangents silently, and the derivative would be 0
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
    """Runs `op` on the given backend, whatever `choose` would return."""
    implementations = _implementations(op)
    if backend not in implementations:
        raise BackendError(f"{op} has no {backend} backend, only {', '.join(implementations)}")
    return implementations[backend].function(*args)


def choose(op: str, *args: Any, device: str | None = None) -> Choice:
    """Chooses the backend of a call: the forced one, or the first in the order of preference that can run.

    Args:
        op: name of the operator.
        args: its arguments; without them, the answer is for this machine.
        device: type of the tensors' device. None: the device of `args`; without them, CUDA where there is a GPU.

    Returns:
        The backend and the reason.

    Raises:
        BackendError: the forced backend cannot run, or `GOLF_BACKEND` cannot be read.
    """
    implementations = _implementations(op)
    device = _device(args) if device is None else device
    forced = _forced(op)
    refused: list[str] = []
    if forced is not None:
        elsewhere = bool(args) and not _made_for(forced, device)
        problem = _problem(op, forced, () if elsewhere else args)
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
        # a backend for another device is no candidate, so skipping it is no fallback
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
    """The backends on which this machine can run an operator and its backward pass, in the order of preference.

    Args:
        name: of an operator, or one that stands for several (`set_members`).
        device: only backends for tensors on a device of this type; None: all.
    """
    found = [_implementations(op) for op in members(name)]
    return [
        backend
        for backend in PREFERENCE
        if all(backend in one and one[backend].supports() is None for one in found)
        and (device is None or _made_for(backend, device))
    ]


def describe() -> dict[str, dict[Backend, str]]:
    """For each operator and each of its backends: `available`, or the reason why this machine cannot run it."""
    answers: dict[str, dict[Backend, str]] = {}
    for op, implementations in sorted(_registry.items()):
        order = [backend for backend in PREFERENCE if backend in implementations]
        answers[op] = {backend: implementations[backend].supports() or AVAILABLE for backend in order}
    return answers


def may_run(op: str, backend: Backend, text: str) -> bool:
    """Whether a call of `op` can reach this backend where `GOLF_BACKEND` is `text`: not if it is `opt_in` and not forced."""
    return not _implementations(op)[backend].opt_in or _forced(op, text) == backend


def registered() -> Iterator[tuple[str, Backend, Callable[..., Any]]]:
    """Operator, backend and function of every implementation, once with the implementation and once with `supports`."""
    for op, implementations in sorted(_registry.items()):
        for backend, implementation in implementations.items():
            yield op, backend, implementation.function
            yield op, backend, implementation.supports


@contextmanager
def forced(text: str) -> Iterator[None]:
    """`GOLF_BACKEND` is `text` until the block ends."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def triton_problem() -> str | None:
    """Why no Triton kernel can run on this machine, as a phrase for `supports`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"its kernels are made for sm_90, this GPU is sm_{major}{minor}"


def elementwise_problem(name: str, tensor: Tensor) -> str | None:
    """Why Triton kernels without matrix products cannot take a tensor of this dtype, as a phrase with its name; or None."""
    # Triton's interpreter truncates bfloat16 instead of rounding
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if tensor.is_cuda else (torch.float16, torch.float32)
    if tensor.dtype in dtypes:
        return None
    return f"{name} is {tensor.dtype}, its kernels take {', '.join(map(str, dtypes))}"


def validate() -> None:
    """Checks `GOLF_BACKEND` for every operator, so that a long run fails at its start and not at its end.

    Raises:
        BackendError: as `choose`.
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


def _problem(op: str, backend: Backend, args: tuple[Any, ...]) -> str | None:
    implementations = _implementations(op)
    if backend not in implementations:
        return f"{op} has no {backend} backend, only {', '.join(b for b in PREFERENCE if b in implementations)}"
    unavailable = implementations[backend].supports()
    if unavailable is not None or not args:
        return unavailable
    return implementations[backend].supports(*args)


def _forced(op: str, text: str | None = None) -> Backend | None:
    return _read(op, os.environ.get(ENVIRONMENT_VARIABLE, "") if text is None else text)


# a training step asks about a hundred times
@functools.lru_cache(maxsize=1024)
def _read(op: str, text: str) -> Backend | None:
    """The backend that `GOLF_BACKEND=text` forces for an operator."""
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
    # an operator's own name counts before a name that stands for several
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

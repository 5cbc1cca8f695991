"""Parses the environment variable `GOLF_BACKEND`, which names backends. See `golf_kernels.dispatch` for its syntax."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

Backend = str
"""A name of `PREFERENCE`, or a variant of such a backend: `triton/32MiB`."""
PREFERENCE: tuple[Backend, ...] = ("cuda", "triton", "cpp", "torch")
ENVIRONMENT_VARIABLE = "GOLF_BACKEND"


class BackendError(RuntimeError):
    """A forced backend cannot run, no backend can run, or `GOLF_BACKEND` is wrong."""


class Named(NamedTuple):
    """A backend that `GOLF_BACKEND` or a tuned file names for an operator.

    `forced`: if the backend cannot run, the call raises an error instead of taking another backend.
    """

    backend: Backend
    forced: bool


def without_variant(backend: Backend) -> Backend:
    """Returns `triton` for `triton/32MiB`."""
    return backend.partition("/")[0]


# cached, because a training step calls this about a hundred times
@functools.lru_cache(maxsize=64)
def read(text: str, known: tuple[str, ...]) -> tuple[Named | None, Mapping[str, Named]]:
    """Reads a value of `GOLF_BACKEND`.

    Args:
        text: the value, not empty.
        known: names of all operators, and of groups of operators such as `int6`.

    Returns:
        The backend named for all operators (None if there is none), and a mapping operator or group → backend.

    Raises:
        BackendError: the text cannot be read.
    """
    default: Named | None = None
    by_name: dict[str, Named] = {}
    for entry in text.split(","):
        name, equals, value = (word.strip() for word in entry.rpartition("="))
        if without_variant(value.removesuffix("?")) not in PREFERENCE or (equals and not name):
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}={text}: cannot read {entry!r}; expected a backend ({', '.join(PREFERENCE)}) "
                "or operator=backend, separated by commas"
            )
        named = Named(value.removesuffix("?"), not value.endswith("?"))
        if equals:
            by_name[name] = named
        else:
            default = named
    for name in by_name:
        if name not in known:
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}: unknown operator {name!r}; {nearest(name, sorted(set(known)))}"
            )
    return default, by_name


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


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

"""Checks, parses and formats the values of settings."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from train.common.errors import UserError, check_text

# larger numbers may become infinite in float32
_LARGEST = 1e38


class ConfigError(UserError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another."""


def setting(
    default: Any, help: str, *, choices: Sequence[Any] = (), low: float | None = None, high: float | None = None
) -> Any:
    """Make the dataclass field of a setting: default, line in `--help`, and allowed values."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": tuple(choices), "low": low, "high": high}
    )


def parse_text(kind: Any, text: str, source: str) -> Any:
    """Convert the text of an environment variable or flag to the type `kind`.

    Lists are comma-separated. Booleans are 0, 1, true, false, yes, no, on or off. Errors begin with `source`, the name
    of the variable or flag.

    Raises:
        ConfigError: `text` is not of type `kind`.
    """
    try:
        if kind is bool:
            return _BOOLEANS[text.strip().lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float:
            number = float(text)
            if not math.isfinite(number):
                raise ValueError(text)
            return number
        if kind is str:
            check_text(text, source)
            return text
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{source}: expected {_type_name(kind)}, got {text!r}") from error


def format_value(value: Any) -> str:
    """Format a value as the user types it on a command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_type(name: str, kind: Any, value: Any) -> None:
    """Raise a ConfigError if the value of the setting `name` is not of type `kind`."""
    if not _is_instance(value, kind):
        raise ConfigError(f"{name}: expected {_type_name(kind)}, got {value!r}")


def check_value(field: dataclasses.Field[Any], kind: Any, value: Any) -> None:
    """Raise a ConfigError if a value has the wrong type or is outside the setting's choices or range."""
    check_type(field.name, kind, value)
    choices, low, high = field.metadata["choices"], field.metadata["low"], field.metadata["high"]
    if isinstance(value, (int, float)) and not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(f"{field.name}: expected a finite number of at most {_LARGEST:g}, got {value}")
    if choices and value not in choices:
        raise ConfigError(f"{field.name}: expected one of {', '.join(repr(c) for c in choices)}, got {value!r}")
    if low is not None and value < low:
        raise ConfigError(f"{field.name}: must be at least {low:g}, got {value}")
    if high is not None and value > high:
        raise ConfigError(f"{field.name}: must be at most {high:g}, got {value}")


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_TYPE_NAMES = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}


def _type_name(kind: Any) -> str:
    return _TYPE_NAMES.get(kind, "whole numbers separated by commas")


def _is_instance(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.GenericAlias) or typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(part) is int for part in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def parse_lengths(text: str) -> tuple[tuple[int, float], ...]:
    """Parse `LENGTH@END,…` to pairs of a length and the finished fraction of training up to which it holds.

    Lengths and fractions rise, and the last fraction is 1. "" gives no pairs. Any other text raises a ConfigError.
    """
    parts = [re.fullmatch(r"\s*(\d{1,9})@(\d*\.?\d+)\s*", part) for part in text.split(",")] if text else []
    pairs = [(int(part[1]), float(part[2])) for part in parts if part]
    lengths, ends = [0, *(length for length, _ in pairs)], [0.0, *(end for _, end in pairs)]
    rise = all(values == sorted(set(values)) for values in (lengths, ends))
    if len(pairs) < len(parts) or not rise or (pairs and ends[-1] != 1):
        raise ConfigError(
            f"train_seq_schedule: expected LENGTH@END,… with rising lengths and ends, the last end 1, such as "
            f"1024@0.1,2048@0.7,3072@1, got {text!r}"
        )
    return tuple(pairs)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from a JSON file is of a dataclass field's type `kind`. NaN and infinities are no numbers."""
    inner = typing.get_args(kind)
    if types.NoneType in inner:
        return value is None or any(fits(value, one) for one in inner if one is not types.NoneType)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and fits(v, inner[1]) for k, v in value.items())
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)


def parse_steps(text: str) -> range:
    """Parse `FIRST:END` to the steps FIRST, …, END - 1. "" gives no steps. Any other text raises a ConfigError."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"profile_steps: expected FIRST:END with FIRST < END, such as 30:33, got {text!r}")
    return range(int(match[1]), int(match[2]))

"""Compares numbers by their stated digits."""

from __future__ import annotations

from decimal import MAX_PREC, ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal
from typing import Any, TypeGuard

# records print scores with this many decimals; a JSON number loses a zero at its end
_SCORE_DECIMALS = 8
# the default context of `decimal` keeps only 28 digits
_ANY_LENGTH = Context(prec=MAX_PREC)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a JSON file or log is a number below 10¹⁸ in magnitude. False for NaN and booleans."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def agree(stated: float, measured: float, tolerance: float = 0.0, digits: int = 0) -> bool:
    """Whether two numbers agree after rounding to the decimals of the number that has fewer, or within `tolerance`.

    `measured` counts as having at least `digits` decimals, because a number read from a file has lost zeros at its end.
    """
    if abs(stated - measured) <= tolerance:
        return True
    a, b = Decimal(str(stated)), Decimal(str(measured))
    if decimals(measured) < digits:
        b = b.quantize(Decimal(1).scaleb(-digits), context=_ANY_LENGTH)
    fewer, more = sorted((a, b), key=lambda value: -int(value.as_tuple().exponent))
    zero = "0" if fewer.as_tuple().exponent == 1 - _SCORE_DECIMALS else ""
    return rounds_to(more, format(fewer, "f") + zero)


def rounds_to(value: Decimal, text: str) -> bool:
    """Whether `text` is `value`, rounded or truncated to the number of decimals in `text`."""
    unit, wanted = Decimal(1).scaleb(-len(text.partition(".")[2])), Decimal(text)
    return any(
        value.quantize(unit, mode, _ANY_LENGTH) == wanted for mode in (ROUND_HALF_EVEN, ROUND_HALF_UP, ROUND_DOWN)
    )


def decimals(value: float) -> int:
    """Number of decimals of a number when Python prints it."""
    return max(0, -int(Decimal(str(value)).as_tuple().exponent))

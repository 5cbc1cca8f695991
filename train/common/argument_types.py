"""What the commands' argparse parsers share: subcommands with an example, and types of arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, program: str, name: str, about: str, example: str, run: Callable[[argparse.Namespace], object]
) -> argparse.ArgumentParser:
    """Add a subcommand to `commands`, the result of `add_subparsers`, and return its parser.

    Args:
        program: such as `python -m train.data`.
        name: the subcommand.
        about: what it does, as a clause, for both help texts.
        example: arguments of the subcommand, for its help.
        run: called with the parsed arguments; they hold it as `run`.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  {program} {name} {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def at_least(lowest: int, kind: type[int] | type[float] = int, *, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type for finite numbers from `lowest` to `most`; `kind` int: only whole ones."""
    number = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= most or value == math.inf:
            limit = "" if most == math.inf else f" to {most}"
            raise argparse.ArgumentTypeError(f"expected {number} from {lowest}{limit}, got {text!r}")
        return value

    return parse

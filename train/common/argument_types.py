"""Helpers for argparse: subcommands with an example in their help, and types of arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any,
    program: str,
    name: str,
    about: str,
    example: str,
    run: Callable[[argparse.Namespace], object],
    details: str = "",
) -> argparse.ArgumentParser:
    """Add a subcommand and return its parser.

    Args:
        commands: result of `add_subparsers`.
        program: the command, such as `python -m train.data`.
        name: name of the subcommand.
        about: a clause that says what the subcommand does, for the help of the command and of the subcommand.
        example: arguments of an example, for the subcommand's help.
        run: function that runs the subcommand, stored as `run` in the parsed arguments.
        details: further sentences for the subcommand's help.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}. {details}".rstrip(),
        epilog=f"example:\n  {program} {name} {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def at_least(lowest: int, kind: type[int] | type[float] = int, *, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type that accepts finite numbers from `lowest` to `most`. `kind` is int or float."""
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

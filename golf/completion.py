"""`golf completion bash|zsh`: prints a script that completes commands, subcommands and flags of `golf`."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import sys
from collections.abc import Iterator
from unittest import mock

from golf.command import benchmarks, commands

_SCRIPT = """{start}_golf() {{
  local words
  case "${{COMP_WORDS[*]:1:COMP_CWORD-1}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _golf golf
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def script(shell: str) -> str:
    """Returns the completion script for a shell. If no word of `golf` fits, the shell completes file names."""
    found = [("", list(commands())), *(row for name, module in commands().items() for row in _words(name, module))]
    found = [(before, [*words, *benchmarks()] if before == "bench" else words) for before, words in found]
    # the shell uses the first pattern that matches, so a subcommand comes before its command
    rows = [f'    {_pattern(before)}) words="{" ".join(words)}" ;;' for before, words in found]
    return _SCRIPT.format(start=_ZSH if shell == "zsh" else "", cases="\n".join(rows))


def _pattern(before: str) -> str:
    # matches a line that begins with `before`; for `START*FLAG`, a line that begins with START and ends with FLAG
    start, star, flag = before.partition("*")
    return f'"{start}"*"{flag}"' if star else f'"{start}"{"*" if start else ""}'


def _words(name: str, module: str) -> Iterator[tuple[str, list[str]]]:
    """Yields pairs for one command: words on the line so far, and words that may come next.

    The words are taken from the command's --help. Subcommands and flags with choices come before the command itself.
    """
    shown: list[argparse.ArgumentParser] = []
    text = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, "--help"]),
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, *_: shown.append(parser)),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    if shown:
        yield from _parser_words(name, shown[0])
        return
    # the settings of a run have no parser
    settings, _, recipes = text.getvalue().partition("recipes (--recipe NAME):\n")
    yield f"{name}*--recipe", re.findall(r"^  (\w+)", recipes, re.MULTILINE)
    yield name, [f"--{setting}" for setting in re.findall(r"^  (\w+) +(?:0\|1|int|float|text)", settings, re.MULTILINE)]


def _parser_words(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    words: list[str] = []
    for action in parser._actions:
        choices = list(map(str, action.choices or ()))
        if isinstance(action, argparse._SubParsersAction):
            for choice, below in action.choices.items():
                yield from _parser_words(f"{name} {choice}", below)
        if action.option_strings:
            flag = max(action.option_strings, key=len)
            words.append(flag)
            if choices:
                yield f"{name}*{flag}", choices
        else:
            words += choices
    yield name, words


def main() -> None:
    """Prints the script for one shell."""
    parser = argparse.ArgumentParser(
        prog="golf completion",
        description="Print a script that completes commands, subcommands and flags of golf.",
        epilog="examples:\n"
        "  golf completion bash > ~/.local/share/bash-completion/completions/golf\n"
        "  golf completion zsh > ~/.golf_completion.zsh    and source it in ~/.zshrc",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args().shell), end="")


if __name__ == "__main__":
    main()

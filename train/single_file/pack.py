"""Packs a run's code into one train_gpt.py, as it is or minified and compressed.

    plain     every module as it is
    wrapped   without comments, help and annotations; compressed; base85 text
    raw       the same as bytes: a fifth smaller, but not UTF-8

The script writes its modules into a temporary folder and imports them from there, so that modules keep their names and
Triton and torch.compile find their sources.
"""

from __future__ import annotations

import ast
import base64
import bz2
import functools
import re
from collections.abc import Mapping
from typing import Any

from train.command_line import resolve
from train.common.errors import UserError
from train.common.values import format_value
from train.config import LOCAL, Config
from train.recipes import load_recipe
from train.single_file.modules import Modules, find_modules
from train.single_file.sources import LATIN1

FORMS = ("plain", "wrapped", "raw")
# no user's text goes into this docstring: quotes could end it, and a run must count the bytes that its record ships
_HEAD = '''"""Trains, quantizes, packs and scores.

One file, made of {count} modules: unpacked into a temporary folder, then imported. SETTINGS is the configuration of the run.
"""

PACKED_SCRIPT = __import__("pathlib").Path(__file__).resolve()
FILES = {{}}
SETTINGS = {settings}
# module that this script lacks: condition on which it is needed
LEFT_OUT = {left_out}
'''
_TAIL = '''

def unpack():
    """Write the modules into a temporary folder, which is removed at the end, and let python find them there."""
    import atexit
    import os
    import shutil
    import sys
    import tempfile

    folder = tempfile.mkdtemp(prefix="train_gpt_")
    atexit.register(shutil.rmtree, folder, True)
    for name, source in FILES.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(source)
    sys.path.insert(0, folder)


if __name__ == "__main__":
    unpack()
    from train.common.errors import main_guard
    from train.train_gpt import main

    main_guard(lambda: main(SETTINGS, LEFT_OUT))
'''
# every byte counts. bz2 verifies checksums; a truncated file lacks the last line and is a syntax error
_LOADER = b"""try:
 import %b
 P=%b
 try:S=bz2.decompress(%b)
 except(OSError,ValueError):exit("error: train_gpt.py is damaged: copy or build it again")
 exec(S)
finally:0
"""


def pack(recipe: str, settings: Mapping[str, str], form: str) -> bytes:
    """The bytes of a train_gpt.py in one of `FORMS`.

    `settings` are those that differ from the defaults, name in upper case → value as text; `RECIPE` is added.

    Raises:
        UserError: no such form or recipe, or python-minifier is not installed and the form needs it.
    """
    if form not in FORMS:
        raise UserError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    carried = script_modules(recipe, settings)
    constants = {"settings": as_literal({"RECIPE": recipe, **settings}), "left_out": as_literal(carried.left_out)}
    head = _HEAD.format(count=len(carried.sources), **constants)
    if form == "plain":
        files = [f"\n# {name}\nFILES[{name!r}] = {_literal(source)}\n" for name, source in carried.sources.items()]
        return "".join([head, *files, _TAIL]).encode()
    files = [f"FILES[{name!r}]={_literal(minify(name, source))}\n" for name, source in carried.sources.items()]
    text = "".join([minify("head", head), "\n", *files, minify("tail", _TAIL), "\n"])
    packed = bz2.compress(text.encode())
    # the payload has its own line, which no traceback shows
    if form == "wrapped":
        return _LOADER % (b"base64,bz2", b'"%b"' % base64.b85encode(packed), b"base64.b85decode(P)")
    return LATIN1 + _LOADER % (b"bz2", _latin1_literal(packed), b'P.encode("latin1")')


def script_modules(recipe: str, settings: Mapping[str, str]) -> Modules:
    """The modules of a script with these settings; arguments as for `pack`.

    Raises:
        UserError: there is no such recipe or setting.
    """
    return find_modules(resolve([], {"RECIPE": recipe, **settings})[0])


def as_literal(values: Mapping[str, str]) -> str:
    """A dictionary as Python source, one line per name."""
    return "".join(["{\n", *(f"    {name!r}: {value!r},\n" for name, value in values.items()), "}"])


@functools.cache
def minify(name: str, source: str) -> str:
    """Remove comments, docstrings, annotations and help texts of settings and flags; shorten local names.

    Annotations in classes stay: dataclasses need them. Triton kernels keep all names and annotations: `tl.constexpr` is one.

    Raises:
        UserError: python-minifier is not installed.
    """
    try:
        import python_minifier
    except ImportError as error:
        raise UserError(
            "python-minifier: not installed: pip install 'python-minifier>=3', or choose --single-file plain"
        ) from error
    kernels = "triton" in name
    annotations = python_minifier.RemoveAnnotationsOptions(
        remove_variable_annotations=not kernels,
        remove_return_annotations=not kernels,
        remove_argument_annotations=not kernels,
        remove_class_attribute_annotations=False,
    )
    tree = ast.parse(source)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        call.keywords = [keyword for keyword in call.keywords if keyword.arg not in ("help", "epilog")]
        if isinstance(call.func, ast.Name) and call.func.id == "setting":
            call.args[1] = ast.Constant("")
    return python_minifier.minify(
        ast.unparse(tree),
        name,
        remove_annotations=annotations,
        remove_literal_statements=True,
        rename_locals=not kernels,
        rename_globals=False,
        # hoisted literals are globals, which a kernel must not read; and repeated text compresses to almost nothing
        hoist_literals=False,
    )


def recipe_settings(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults or from the recipe, without those of a machine or a seed."""
    defaults, recipe = vars(Config()), vars(load_recipe(config.recipe).config())
    return {
        name: value
        for name, value in vars(config).items()
        if name not in LOCAL and not value == defaults[name] == recipe[name]
    }


def script_settings(config: Config) -> dict[str, str]:
    """`recipe_settings` as a script carries them: name in upper case → value as text."""
    return {name.upper(): format_value(value) for name, value in recipe_settings(config).items()}


def form_bytes(recipe: str) -> dict[str, int]:
    """Bytes of a recipe's script in each form, as a run counts them.

    Raises:
        UserError: see `pack`.
    """
    settings = script_settings(load_recipe(recipe).config())
    return {form: len(pack(recipe, settings, form)) for form in FORMS}


def _literal(source: str) -> str:
    """The source as a string literal: raw if possible, so that people can read it."""
    for quotes in ("'" * 3, '"' * 3):
        text = f"r{quotes}{source}{quotes}"
        try:
            same = ast.literal_eval(text) == source
        except (SyntaxError, ValueError):
            continue
        if same:
            return text
    return repr(source)


def _latin1_literal(data: bytes) -> bytes:
    """A string literal of characters 0 to 255 in a latin-1 source, with only the necessary escapes."""
    text = data.replace(b"\\", rb"\\").replace(b"\r", rb"\r")
    text = re.sub(rb"\0(?![0-7])", rb"\\0", text).replace(b"\0", rb"\x00")
    # no two quotes in a row, and none at the end
    return b"'''%b'''" % re.sub(rb"'(?='|\Z)", rb"\\'", text)

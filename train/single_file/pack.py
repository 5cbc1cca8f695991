"""Packs a run's code into one train_gpt.py, in one of three forms.

    plain     all modules, unchanged
    wrapped   modules without comments, help texts and annotations, compressed, as base85 text
    raw       like wrapped, but as bytes: a fifth smaller, but not UTF-8

The script writes its modules into a temporary folder and imports them from there. The modules therefore keep their
names, and Triton and torch.compile find their sources.
"""

from __future__ import annotations

import ast
import base64
import bz2
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from train.command_line import resolve
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.common.values import format_value
from train.config import LOCAL, Config
from train.recipes import load_recipe
from train.single_file.modules import Modules, find_modules
from train.single_file.sources import LATIN1

FORMS = ("plain", "wrapped", "raw")
# the docstring contains no text of the user: quotes could end it, and a run must count the bytes that its record ships
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
# short, because every byte counts; bz2 verifies checksums, and a truncated file lacks `finally`: a syntax error
_LOADER = b"""try:
 import %b
 P=%b
 try:S=bz2.decompress(%b)
 except(OSError,ValueError):exit("error: train_gpt.py is damaged: copy or build it again")
 exec(S)
finally:0
"""


def pack(recipe: str, settings: Mapping[str, str], form: str) -> bytes:
    """Pack the modules that a recipe with these settings needs into the bytes of one train_gpt.py.

    Args:
        recipe: name of the recipe, which becomes the setting RECIPE of the script.
        settings: the settings that differ from the defaults: name in upper case → value as text.
        form: one of `FORMS`.

    Raises:
        UserError: the form or recipe does not exist, or the form needs python-minifier, which is not installed.
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
    # put the payload on a line of its own, so that tracebacks do not show it
    if form == "wrapped":
        return _LOADER % (b"base64,bz2", b'"%b"' % base64.b85encode(packed), b"base64.b85decode(P)")
    return LATIN1 + _LOADER % (b"bz2", _latin1_literal(packed), b'P.encode("latin1")')


def script_modules(recipe: str, settings: Mapping[str, str]) -> Modules:
    """Find the modules of a script with these settings. For the arguments see `pack`.

    Raises:
        UserError: the recipe or a setting does not exist.
    """
    return find_modules(resolve([], {"RECIPE": recipe, **settings})[0])


def as_literal(values: Mapping[str, str]) -> str:
    """Return a dictionary as Python source, with one line per name."""
    return "".join(["{\n", *(f"    {name!r}: {value!r},\n" for name, value in values.items()), "}"])


@functools.cache
def minify(name: str, source: str) -> str:
    """Remove comments, docstrings, annotations and help texts of settings and flags. Shorten local names.

    The result is stored in the user's cache folder, because minifying the modules of a recipe takes seconds.

    Annotations in classes stay, because dataclasses need them. Modules of Triton kernels keep all names and
    annotations, because Triton reads annotations such as `tl.constexpr`.

    Raises:
        UserError: python-minifier is not installed.
    """
    try:
        import python_minifier
    except ImportError as error:
        raise UserError(
            "python-minifier: not installed: pip install 'python-minifier>=3', or choose --single-file plain"
        ) from error
    inputs = (sys.version, importlib.metadata.version("python-minifier"), Path(__file__).read_text(), name, source)
    return _cached(inputs, lambda: _minified(python_minifier, name, source))


def _minified(python_minifier: ModuleType, name: str, source: str) -> str:
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
    small: str = python_minifier.minify(
        ast.unparse(tree),
        name,
        remove_annotations=annotations,
        remove_literal_statements=True,
        rename_locals=not kernels,
        rename_globals=False,
        # do not replace literals by global names: a Triton kernel must not read globals, and repeated literals compress
        # well
        hoist_literals=False,
    )
    return small


def _cached(inputs: Sequence[str], make: Callable[[], str]) -> str:
    """Return `make()`, or its earlier result from the user's cache folder. The result must depend only on `inputs`."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "golf_kernels")
    path = folder / f"{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()}.json"
    try:
        return str(read_json(path, "delete it")["text"])
    except (UserError, KeyError):
        # the cached file is missing or damaged
        text = make()
    # ignore errors: without a writable folder, `make` is called each time
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"text": text})
    return text


def recipe_settings(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the defaults or from the recipe, except those in `LOCAL`, such as paths."""
    defaults, recipe = vars(Config()), vars(load_recipe(config.recipe).config())
    return {
        name: value
        for name, value in vars(config).items()
        if name not in LOCAL and not value == defaults[name] == recipe[name]
    }


def script_settings(config: Config) -> dict[str, str]:
    """Return `recipe_settings` in the form that a script contains: name in upper case → value as text."""
    return {name.upper(): format_value(value) for name, value in recipe_settings(config).items()}


def form_bytes(recipe: str) -> dict[str, int]:
    """Return form → size in bytes of a recipe's script in this form.

    Raises:
        UserError: `pack` refuses the recipe.
    """
    settings = script_settings(load_recipe(recipe).config())
    return {form: len(pack(recipe, settings, form)) for form in FORMS}


def _literal(source: str) -> str:
    """Return source code as a Python string literal, if possible a raw one, so that people can read it."""
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
    """Return bytes as a string literal for a latin-1 source, with only the necessary escapes."""
    text = data.replace(b"\\", rb"\\").replace(b"\r", rb"\r")
    text = re.sub(rb"\0(?![0-7])", rb"\\0", text).replace(b"\0", rb"\x00")
    # escape a quote before another quote or at the end
    return b"'''%b'''" % re.sub(rb"'(?='|\Z)", rb"\\'", text)

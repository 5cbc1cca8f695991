"""All the code of a run in one train_gpt.py: as it is, minified, or minified and compressed.

The file carries each module's source under its path and unpacks them into a temporary folder before it imports them, so
that modules keep their names, and Triton and torch.compile find the sources they read.
"""

from __future__ import annotations

import ast
import base64
import functools
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config import LOCAL, Config
from train.errors import UserError
from train.recipes import load_recipe
from train.values import format_value

FORMS = ("plain", "minified", "wrapped")
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("golf_kernels", "train")
ENTRY = ("train.script.entry", "train.walk", "train.evaluate.__main__")
# what only writes about a run, builds its data, or packs it
EXCLUDED = (
    "train.script.single_file",
    "train.data.bulk",
    "train.data.hub",
    "train.describe",
    "train.submission",
)
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "dict_size": 1 << 22}]

_HEAD = '''"""{title}

One file, made of {count} modules: unpacked into a temporary folder, then imported. SETTINGS is the configuration of the run.
"""

PACKED_SCRIPT = __import__("pathlib").Path(__file__).resolve()
FILES = {{}}
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
    from train.errors import main_guard
    from train.script.entry import main

    main_guard(lambda: main(SETTINGS))
'''


def pack(recipe: str, settings: Mapping[str, str], form: str, title: str = "") -> str:
    """The text of a train_gpt.py.

    Args:
        recipe: recipe whose module it carries.
        settings: what differs from the defaults: name in upper case → value as text; `RECIPE` is added.
        form: a name in `FORMS`.
        title: first line of the file.

    Raises:
        UserError: no such form or recipe, or python-minifier is not installed and the form needs it.
    """
    if form not in FORMS:
        raise UserError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    sources = used_sources(recipe)
    values = {"RECIPE": recipe, **settings}
    if form == "plain":
        return _plain(sources, values, title or "Trains, quantizes, packs and scores.")
    small = {name: minify(name, source) for name, source in sources.items()}
    # the file's own frame is short already, but for its docstrings
    text = minify("train_gpt.py", _plain(small, values, "-"))
    return text if form == "minified" else _wrapped(text)


def used_sources(recipe: str) -> dict[str, str]:
    """Path → source of every module that a run may import, found by following the imports from its entry.

    Raises:
        UserError: there is no such recipe.
    """
    start = f"train.recipes.{recipe}"
    if _path(start) is None:
        raise UserError(f"recipe: no file train/recipes/{recipe}.py to pack")
    found: dict[str, Path] = {}
    waiting = [start, *ENTRY]
    while waiting:
        module = waiting.pop()
        path = None if module in found else _path(module)
        if path is None:
            continue
        found[module] = path
        waiting += _imports(path.read_text())
        # the packages around a module are imported with it
        waiting += [module.rpartition(".")[0]] if "." in module else []
    return {path.relative_to(ROOT).as_posix(): path.read_text() for _, path in sorted(found.items())}


@functools.cache
def minify(name: str, source: str) -> str:
    """A module without comments, docstrings and annotations, its local names shortened.

    Annotations of classes stay, since dataclasses are made of them; of Triton kernels all names and annotations stay,
    since `tl.constexpr` is one.

    Raises:
        UserError: python-minifier is not installed.
    """
    try:
        import python_minifier
    except ImportError as error:
        raise UserError(
            "python-minifier: not installed: pip install 'python-minifier>=3', or take --single-file plain"
        ) from error
    kernels = "triton" in name
    annotations = python_minifier.RemoveAnnotationsOptions(
        remove_variable_annotations=not kernels,
        remove_return_annotations=not kernels,
        remove_argument_annotations=not kernels,
        remove_class_attribute_annotations=False,
    )
    return python_minifier.minify(
        source,
        name,
        remove_annotations=annotations,
        remove_literal_statements=True,
        rename_locals=not kernels,
        rename_globals=False,
        # a kernel must not read globals, and repeated text costs a compressor nothing
        hoist_literals=False,
    )


def recipe_settings(config: Config) -> dict[str, Any]:
    """The settings that the default or the recipe does not have anyway, without what belongs to a machine or a seed."""
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
    """Bytes of a recipe's script in each form, with its settings as they stand: what a run of it counts.

    Raises:
        UserError: see `pack`.
    """
    settings = script_settings(load_recipe(recipe).config())
    return {form: len(pack(recipe, settings, form).encode()) for form in FORMS}


def _plain(sources: Mapping[str, str], settings: Mapping[str, str], title: str) -> str:
    parts = [_HEAD.format(title=title, count=len(sources))]
    for name, source in sources.items():
        parts.append(f"\n# {name}\nFILES[{name!r}] = {_literal(source)}\n")
    values = "".join(f"    {name!r}: {value!r},\n" for name, value in settings.items())
    return "".join([*parts, f"\nSETTINGS = {{\n{values}}}\n", _TAIL])


def _literal(source: str) -> str:
    """The source as it is read best: a raw string where it can be one."""
    for quotes in ("'" * 3, '"' * 3):
        text = f"r{quotes}{source}{quotes}"
        try:
            same = ast.literal_eval(text) == source
        except (SyntaxError, ValueError):
            continue
        if same:
            return text
    return repr(source)


def _wrapped(text: str) -> str:
    data = lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=_LZMA)
    packed = base64.b85encode(data).decode()
    filters = [{name: value for name, value in _LZMA[0].items() if name != "preset"}]
    script = f'import base64,lzma\nexec(lzma.decompress(base64.b85decode("{packed}"),lzma.FORMAT_RAW,None,{filters}))\n'
    try:
        import brotli
    except ImportError:
        return script
    packed = base64.b85encode(brotli.compress(text.encode(), quality=11, lgwin=24)).decode()
    other = f'import base64,brotli\nexec(brotli.decompress(base64.b85decode("{packed}")))\n'
    return min(script, other, key=len)


def _path(module: str) -> Path | None:
    """Where a module of this project is; None for others, for excluded ones and for names that are no modules."""
    if module.partition(".")[0] not in PARTS or any(
        module == name or module.startswith(f"{name}.") for name in EXCLUDED
    ):
        return None
    base = ROOT.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _imports(source: str) -> Iterator[str]:
    """Names that may be modules: of all imports, those inside functions too, and of import_module's text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (
                part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )

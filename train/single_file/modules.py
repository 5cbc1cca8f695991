"""Finds the modules that a packed script contains: all modules that a run with its settings may import.

The search follows imports from `ENTRY`, also inside functions. Three kinds of imports depend on the settings:

    if config.loggers:                                        imports under an `if` that tests only settings, and
        from train.run.sinks import open_sinks                under its `else`

    IMPORTED_IF = {"_ans_encode": "config.codec == 'ans'"}    imports in a function for which the module states a
    def _ans_encode(…):                                       condition
        from train.artifact.ans import …

    register("xsa", "triton", …)                              imports in a function that implements an opt-in
                                                              backend: only if `golf_backend` forces it
The script also contains a list of the modules that it lacks, each with the condition of its import. With this list it
refuses settings that need a missing module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from golf_kernels import dispatch
from train.config import Config, field_names
from train.single_file.conditions import holds
from train.single_file.sources import FOLDERS

PROJECT = ("golf_kernels", "train")
ENTRY = ("train.train_gpt", "train.pipeline", "train.evaluate.__main__")
# modules that a packed script does not need: they pack a script or prepare a record
EXCLUDED = ("train.single_file.pack", "train.submission")


class Modules(NamedTuple):
    """The modules that a packed script contains, and the modules that it lacks."""

    sources: dict[str, str]  # path → source of each module that the script contains
    left_out: dict[str, str]  # missing module → condition under which it would be imported, see `conditions.holds`


def find_modules(config: Config) -> Modules:
    """Find the modules that a run with these settings may import.

    Raises:
        UserError: the setting `golf_backend` is invalid.
    """
    backends = _backends()
    found: dict[str, Path] = {}
    closed: dict[str, list[str]] = {}
    waiting = [f"train.recipes.{config.recipe}", *ENTRY]
    while waiting:
        module = waiting.pop()
        path = None if module in found else module_path(module)
        if path is None:
            continue
        found[module] = path
        # importing a module also imports the packages that contain it
        waiting += [module.rpartition(".")[0]] if "." in module else []
        for name, conditions in imports(path.read_text(), backends.get(module, {})):
            if all(holds(condition, config) for condition in conditions):
                waiting.append(name)
            elif module_path(name) is not None:
                closed.setdefault(name, []).append(" and ".join(conditions))
    left_out = {name: " or ".join(dict.fromkeys(closed[name])) for name in sorted(closed.keys() - found.keys())}
    return Modules({_name(module, path): path.read_text() for module, path in sorted(found.items())}, left_out)


def module_path(module: str) -> Path | None:
    """Return the file of a module of this project; None for an excluded module or any other name."""
    if module.partition(".")[0] not in PROJECT or any(
        module == name or module.startswith(f"{name}.") for name in EXCLUDED
    ):
        return None
    package, *below = module.split(".")
    base = FOLDERS[package].joinpath(*below)
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _name(module: str, path: Path) -> str:
    return path.relative_to(FOLDERS[module.partition(".")[0]].parent).as_posix()


def imports(source: str, chosen: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name that a module may import, also by import_module, with the conditions of the import.

    `chosen`: function → condition under which it is called, in addition to the module's own `IMPORTED_IF`.
    """
    body = ast.parse(source).body
    yield from _imports(body, {**chosen, **_imported_if(body)}, ())


def _imported_if(body: list[ast.stmt]) -> dict[str, str]:
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "IMPORTED_IF":
            return dict(ast.literal_eval(node.value))
    return {}


def _imports(
    nodes: Iterable[ast.AST], chosen: Mapping[str, str], conditions: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imports(node.orelse, chosen, conditions)
            continue
        if isinstance(node, ast.If) and (test := _condition(node.test)):
            yield from _imports(node.body, chosen, (*conditions, test))
            yield from _imports(node.orelse, chosen, (*conditions, f"not ({test})"))
            continue
        if isinstance(node, ast.FunctionDef) and node.name in chosen:
            yield from _imports(node.body, chosen, (*conditions, chosen[node.name]))
            continue
        for name in _names(node):
            yield name, conditions
        yield from _imports(ast.iter_child_nodes(node), chosen, conditions)


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
        yield from (part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str))


def _condition(test: ast.expr) -> str:
    """If the test of an `if` reads only settings, return it as text for `holds`, else ""."""
    return ast.unparse(test) if all(map(_reads_settings, ast.walk(test))) else ""


def _reads_settings(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.attr in field_names()
    if isinstance(node, ast.Name):
        return node.id == "config"
    return isinstance(
        node, (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Constant, ast.boolop, ast.unaryop, ast.cmpop, ast.Load)
    )


def _backends() -> dict[str, dict[str, str]]:
    """Return module → function that implements a backend → condition under which the function may run."""
    found: dict[str, dict[str, list[str]]] = {}
    for op, backend, function in dispatch.registered():
        # skip callables that are not functions, because they import nothing
        if hasattr(function, "__qualname__"):
            condition = f"may_run({op!r}, {backend!r}, config.golf_backend)"
            found.setdefault(function.__module__, {}).setdefault(function.__qualname__, []).append(condition)
    return {
        module: {name: " or ".join(dict.fromkeys(conditions)) for name, conditions in functions.items()}
        for module, functions in found.items()
    }

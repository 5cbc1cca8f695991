"""Which modules a script carries: those that a run may import under its settings, read from the imports themselves.

All imports are followed from the entry on, those inside functions too, but for what the settings rule out:

    if config.loggers:                                        an `if` whose test reads settings alone, and its `else`
        from train.run.sinks import open_sinks

    IMPORTED_IF = {"_ans_encode": "config.codec == 'ans'"}    functions of a module with their conditions, as text
    def _ans_encode(…):
        from train.artifact.ans import …

    register("xsa", "triton", …)                              functions of an operator's backend that only
                                                              `golf_backend` can turn on
A script is told what it lacks and on which condition, so that it can refuse settings that need more than it has.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from golf_kernels import dispatch
from train.config import Config, field_names
from train.single_file.conditions import holds

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("golf_kernels", "train")
ENTRY = ("train.train_gpt", "train.pipeline", "train.evaluate.__main__")
# what only writes about a run or packs it, which a script does without
EXCLUDED = ("train.single_file.pack", "train.submission")


class Modules(NamedTuple):
    """What a script is made of.

    Attributes:
        sources: path → source of each module it carries.
        left_out: module → the condition, see `train.single_file.conditions.holds`, on which it would be imported.
    """

    sources: dict[str, str]
    left_out: dict[str, str]


def find_modules(config: Config) -> Modules:
    """The modules that a run with these settings may import.

    Raises:
        UserError: `golf_backend` cannot be read.
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
        # the packages around a module are imported with it
        waiting += [module.rpartition(".")[0]] if "." in module else []
        for name, conditions in imports(path.read_text(), backends.get(module, {})):
            if all(holds(condition, config) for condition in conditions):
                waiting.append(name)
            elif module_path(name) is not None:
                closed.setdefault(name, []).append(" and ".join(conditions))
    left_out = {name: " or ".join(dict.fromkeys(closed[name])) for name in sorted(closed.keys() - found.keys())}
    return Modules({path.relative_to(ROOT).as_posix(): path.read_text() for _, path in sorted(found.items())}, left_out)


def module_path(module: str) -> Path | None:
    """Where a module of this project is; None for others, for excluded ones and for names that are no modules."""
    if module.partition(".")[0] not in PROJECT or any(
        module == name or module.startswith(f"{name}.") for name in EXCLUDED
    ):
        return None
    base = ROOT.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def imports(source: str, chosen: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names that may be modules, of all imports and of import_module's text, and the conditions of each import.

    Args:
        source: of a module.
        chosen: name of a function → the condition on which it is called, beside those of `IMPORTED_IF`.
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
    """The test as `holds` takes it, if it reads nothing but settings; else nothing."""
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
    """Module → name of a function that an operator's backend is made of → the condition on which it may run."""
    found: dict[str, dict[str, list[str]]] = {}
    for op, backend, function in dispatch.registered():
        # what is no function, or one made of another, imports nothing
        if hasattr(function, "__qualname__"):
            condition = f"may_run({op!r}, {backend!r}, config.golf_backend)"
            found.setdefault(function.__module__, {}).setdefault(function.__qualname__, []).append(condition)
    return {
        module: {name: " or ".join(dict.fromkeys(conditions)) for name, conditions in functions.items()}
        for module, functions in found.items()
    }

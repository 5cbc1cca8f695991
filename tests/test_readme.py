"""The README's code runs as it stands, and its befores and afters agree."""

import ast
import re
from pathlib import Path

import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_drop_in_snippets_run_and_agree() -> None:
    section = README.split("## Drop-in use")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 6
    torch.manual_seed(0)
    names: dict[str, object] = {}
    compared = []
    for block in blocks:
        # a value that is assigned twice stands there before and after
        before: dict[str, object] = {}
        for statement in ast.parse(block).body:
            exec(ast.unparse(statement), names)
            target = ast.unparse(statement).split(" = ")[0]
            value = names.get(target)
            if isinstance(value, torch.Tensor) and target in before:
                torch.testing.assert_close(value, before[target], rtol=1e-5, atol=1e-5)
                compared.append(target)
            before[target] = value
    assert compared == ["y", "loss", "nll"]


def test_the_example_recipe_is_one() -> None:
    example = re.search(r'```python\n("""quickstart with a wider model.*?)```', README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example[1], names)
    from train.config import Config

    assert Config(**names["SETTINGS"]).model_dim == 192

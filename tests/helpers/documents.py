"""The documents, and the code and commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# in the order in which their commands are run: the first makes the run that the others look at
DOCUMENTS = [
    "docs/recipes.md",
    "docs/sweeps.md",
    "docs/records.md",
    "docs/artifact.md",
    "docs/kernels.md",
    "docs/library.md",
    "docs/tuning.md",
    "docs/reliability.md",
    "docs/benchmarks.md",
    "docs/8xh100.md",
]
DOCUMENTS += ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/log.md"]
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of a document: each line of its blocks, without comments, and what stands in a line as code."""
    found = [line for block in fences(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found += re.findall(r"`((?:python -m|torchrun|pip install|make|golf) [^`]+)`", prose)
    lines = (shlex.split(line, comments=True) for line in found)
    joined = (shlex.join(words).replace("'&&'", "&&") for words in lines if words)
    return list(dict.fromkeys(command for line in joined for command in line.split(" && ")))

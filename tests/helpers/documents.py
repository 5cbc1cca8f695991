"""Finds the code and the commands of a document."""

import re
import shlex


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

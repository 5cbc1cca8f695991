"""Which code was measured: its commit, whether it was changed since, and what git knows of the order of commits."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# what decides a figure; of it, what figures are written to
SOURCES = ("csrc", "golf_kernels", "train", "benchmarks", "setup.py", "pyproject.toml")
WRITTEN = ("benchmarks/results", "benchmarks/plots")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".toml")
# in front of a checksum that stands for a commit
CHECKSUM = "src-"


class GitError(Exception):
    """git is not there, or knows nothing; the message is its own."""


class Version(NamedTuple):
    """The code that runs.

    Attributes:
        commit: abbreviated to 12 digits; without git `src-` and 12 digits of the sources' SHA-256.
        dirty: whether the sources differ from the commit.
        problem: why there is no commit; empty where there is one.
    """

    commit: str
    dirty: bool
    problem: str = ""


def _git(*arguments: str, given: str = "") -> str:
    try:
        # a lock would meet another git that somebody works with
        command = ["git", "--no-optional-locks", *arguments]
        run = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=True)
    except OSError as error:
        raise GitError(f"git does not run here: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise GitError((error.stderr.strip() or f"git {arguments[0]} fails").split("\n")[0]) from error
    return run.stdout.strip()


def read_version() -> Version:
    """The sources' version as it is on disk; results, plots and texts do not count, as they decide no figure."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        # a repository around this folder may know nothing of it
        _git("cat-file", "-e", "HEAD:./benchmarks")
        outside = [f":(exclude){path}" for path in WRITTEN]
        changed = _git("status", "--porcelain", "--", *SOURCES, *outside)
    except GitError as error:
        return Version(CHECKSUM + _checksum()[:12], False, str(error))
    return Version(commit, bool(changed))


@functools.cache
def code_version() -> Version:
    """The version when it was first asked for: what this process runs, whatever is changed or committed meanwhile."""
    return read_version()


def warning(found: Version) -> str:
    """What to say of a version without a commit, and what helps."""
    helps = "to have commits, measure in a clone of the repository"
    if "ownership" in found.problem:
        helps = f"to have commits, run: git config --global --add safe.directory {ROOT}"
    return f"warning: no commit is known ({found.problem}): rows are marked {found.commit}, a checksum of the sources; {helps}"


def _checksum() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*"))):
        if path.suffix in SUFFIXES and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def full_names(commits: Iterable[str]) -> dict[str, str]:
    """The whole names of those abbreviated commits that git knows."""
    asked = sorted({commit for commit in commits if not commit.startswith(CHECKSUM)})
    try:
        lines = "".join(f"{commit}^{{commit}}\n" for commit in asked)
        answers = _git("cat-file", "--batch-check", given=lines).splitlines()
    except GitError:
        return {}
    return {
        commit: answer.split()[0]
        for commit, answer in zip(asked, answers, strict=True)
        if answer.split()[1:2] == ["commit"]
    }


def named(revision: str) -> str:
    """The whole name of the commit that a branch, a tag, HEAD~3 or an abbreviation stands for; empty where git knows none."""
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except GitError:
        return ""


def ancestors(commits: Iterable[str]) -> dict[str, frozenset[str]]:
    """Which of some abbreviated commits each of them descends from; only those that git knows are there."""
    full = full_names(commits)
    asked = {name: frozenset(short for short in full if full[short] == name) for name in full.values()}
    try:
        history = _git("rev-list", "--topo-order", "--reverse", "--parents", *asked) if asked else ""
    except GitError:
        return {}
    none: frozenset[str] = frozenset()
    behind: dict[str, frozenset[str]] = {}
    for line in history.splitlines():
        name, *parents = line.split()
        behind[name] = none.union(*(behind.get(parent, none) | asked.get(parent, none) for parent in parents))
    return {short: behind[name] for short, name in full.items()}

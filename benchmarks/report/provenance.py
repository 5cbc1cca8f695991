"""The version of the measured code: its commit, and whether the sources differ from the commit."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# paths of the measured code, and folders inside them that hold outputs
SOURCES = ("csrc", "golf_kernels", "train", "benchmarks", "setup.py", "pyproject.toml")
WRITTEN = ("benchmarks/results", "benchmarks/plots")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".toml")
# prefix of a checksum that replaces a commit
CHECKSUM = "src-"


class GitError(Exception):
    """git is missing, or a git command failed."""


class Version(NamedTuple):
    """A version of the code: its commit, and whether the sources differ from the commit.

    Without git, `commit` is `src-` and a checksum of the sources, and `problem` says why there is no commit.
    """

    commit: str
    dirty: bool
    problem: str = ""


def _git(*arguments: str) -> str:
    try:
        # without locks, which could collide with another git process
        command = ["git", "--no-optional-locks", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except OSError as error:
        raise GitError(f"git does not run here: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise GitError((error.stderr.strip() or f"git {arguments[0]} fails").split("\n")[0]) from error
    return run.stdout.strip()


def read_version() -> Version:
    """Returns the version of the sources on disk: the commit and whether files differ from it; without git, a checksum."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        # fails if this folder is untracked inside another repository
        _git("cat-file", "-e", "HEAD:./benchmarks")
        outside = [f":(exclude){path}" for path in WRITTEN]
        changed = _git("status", "--porcelain", "--", *SOURCES, *outside)
    except GitError as error:
        return Version(CHECKSUM + _checksum()[:12], False, str(error))
    return Version(commit, bool(changed))


@functools.cache
def code_version() -> Version:
    """Returns the version at the first call. This process runs that version even if the files change later."""
    return read_version()


def warning(found: Version) -> str:
    """Returns a warning that no commit is known, with a remedy."""
    helps = "to have commits, measure in a clone of the repository"
    if "ownership" in found.problem:
        helps = f"to have commits, run: git config --global --add safe.directory {ROOT}"
    return f"warning: no commit is known ({found.problem}): rows are marked {found.commit}, a checksum of the sources; {helps}"


def _checksum() -> str:
    digest = hashlib.sha256()
    # a wheel has the other folders inside golf_kernels
    root = ROOT if (ROOT / "golf_kernels").is_dir() else ROOT.parents[1]
    for path in sorted(path for name in SOURCES for path in (root / name, *(root / name).rglob("*"))):
        if path.suffix in SUFFIXES and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()

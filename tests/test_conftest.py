"""What the tests' end says of those that were left out."""

import os
import subprocess
import sys
from pathlib import Path

MADE = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_marked(number):
    if number:
        pytest.skip("no Chromium")

@pytest.mark.skip(reason="no nvcc")
def test_one(): ...

@pytest.mark.skip(reason="no Chromium")
def test_other(): ...
"""


def test_reasons_are_said_once_each_the_most_frequent_first(tmp_path: Path) -> None:
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(MADE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    said = [line for line in result.stdout.splitlines() if "skipped: " in line]
    assert said == ["6 skipped: no Chromium", "2 skipped: no nvcc"]

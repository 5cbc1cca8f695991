"""Everything that runs on a GPU, once over with tensors that have a device and a shape but no data.

Two devices in one operation, a shape or dtype that an operator does not take, and a host that asks for a number which
only the GPU knows end such a run as they would end a real one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.computed import fake_cuda

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "tests" / "helpers"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        variables = fake_cuda.environment(tmp_path_factory.mktemp("fake"))
    except fake_cuda.NoDevice as reason:
        pytest.skip(str(reason))
    return {**variables, "GOLF_BACKEND": ""}


def test_the_gpu_code_paths_run_without_a_gpu(environment: dict[str, str]) -> None:
    files = [HELPERS / "fake_cuda_runs.py", HELPERS / "fake_cuda_launches.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", *files],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout

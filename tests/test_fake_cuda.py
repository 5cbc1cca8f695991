"""Everything that runs on a GPU, once over with tensors that have a device and a shape but no data.

Two devices in one operation, a shape or dtype that an operator does not take, and a host that asks for a number which
only the GPU knows end such a run as they would end a real one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which a process has a CUDA device: the machine's own, or one that is made up."""
    variables = {**os.environ, "GOLF_BACKEND": ""}
    if torch.version.cuda is None:
        root, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("fake") / "fake_cuda.so"
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        linked = [f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
        subprocess.run(
            [os.environ.get("CXX", "g++"), *flags, HERE / "fake_cuda.cpp", "-o", library, *linked],
            check=True,
        )
        variables["LD_PRELOAD"] = str(library)
    elif not torch.cuda.is_available():
        pytest.skip("this torch is built for CUDA and finds no GPU, which nothing can stand in for")
    return variables


def test_every_path_of_a_gpu_is_walked_without_one(environment: dict[str, str]) -> None:
    files = [HERE / "fake_cuda_runs.py", HERE / "fake_cuda_launches.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", *files],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout

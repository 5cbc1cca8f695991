"""Where there is no GPU, tests that need one are left out, and Triton's kernels run in its interpreter."""

import os
from pathlib import Path

import pytest
import torch

# packing the code into one script takes seconds, which the many small runs of the tests do not spend
os.environ.setdefault("CODE_FORM", "sources")
# matrices this small only lose by being shared between threads, which would also round otherwise than two ranks do
torch.set_num_threads(1)
# Triton reads it when a kernel is defined, so it is set before any is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def narrow_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three finished runs of a very narrow quickstart, seeds 42, 314 and 999; copy what you change."""
    from submission_runs import make_dataset, make_runs

    folder = tmp_path_factory.mktemp("narrow")
    return make_runs(folder / "runs", make_dataset(folder / "small"))

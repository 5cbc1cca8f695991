"""Where there is no GPU, tests that need one are left out, and Triton's kernels run in its interpreter."""

import os

import pytest
import torch

# Triton reads it when a kernel is defined, so it is set before any is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

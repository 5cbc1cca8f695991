"""Where there is no GPU, tests that need one are left out, and Triton's kernels run in its interpreter."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from golf_kernels import cpu
from train.common import hardware

if TYPE_CHECKING:
    from pipeline_runs import Finished

# minifying the code takes seconds, which the many small runs of the tests do not spend
os.environ.setdefault("CODE_FORM", "plain")
# matrices this small only lose by being shared between threads, which would also round otherwise than two ranks do
torch.set_num_threads(1)
# Triton reads it when a kernel is defined, so it is set before any is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # there, too, what a test leaves to the settings runs on the CPU: in float32, and the same bits again
    os.environ.setdefault("DEVICE", "cpu")
    hardware.auto_device = lambda: "cpu"
    cpu._has_instructions = lambda: False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says at the end what was left out, a line per reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN until something writes to it."""
    # on a GPU cuBLAS, which does not repeat its bits by default, only warns
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter multiply and round bfloat16 as a GPU does.

    As it comes it multiplies the bits of bfloat16 numbers as if they were integers, and cuts float32 off.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def wide(handle):
        return cast(None, handle, tl.float32).data if handle.dtype.scalar == tl.bfloat16 else handle.data

    def create_dot(self, a, b, total, *_):
        with np.errstate(invalid="ignore"):
            product = np.matmul(wide(a), wide(b), dtype=total.data.dtype)
            return TensorHandle(product + total.data, total.dtype.scalar)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)
        return cast(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@pytest.fixture(scope="session")
def narrow_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three finished runs of a very narrow quickstart, seeds 42, 314 and 999; copy what you change."""
    from submission_runs import make_dataset, make_runs

    folder = tmp_path_factory.mktemp("narrow")
    return make_runs(folder / "runs", make_dataset(folder / "small"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred kilobytes of the standard library with a vocabulary of 512."""
    from submission_runs import make_dataset

    from train.data.build import measure_compressors

    folder = make_dataset(tmp_path_factory.mktemp("data") / "small", 400_000, 20_000)
    measure_compressors(folder)
    return folder


@pytest.fixture(scope="session")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """A finished run of these shards; copy what you change."""
    from pipeline_runs import finish

    return finish(dataset, tmp_path_factory.mktemp("runs"))

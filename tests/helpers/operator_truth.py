"""Helpers for the tests of all operators: random tensors, errors, and checks of CUDA graphs and torch.compile."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# dtypes for kernels without products; Triton's interpreter truncates to bfloat16 instead of rounding
ELEMENTWISE_DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
# dtypes for kernels with products; Triton's interpreter multiplies the bit patterns of bfloat16 numbers
PRODUCT_DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)


def random(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    size: float = 1.0,
) -> Tensor:
    """Normal numbers with deviation `size`. A seed gives the same numbers for every dtype and device."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (size * made).to(device, dtype)


def exactly(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The tensors by name, as float64 leaves of autograd. None stays None."""
    return {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()
    }


def errors(got: Tensors, want: Tensors) -> dict[str, float]:
    """‖got − want‖ / ‖want‖ of each tensor, by name."""
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}


def within(found: dict[str, float], plain: dict[str, float], dtype: torch.dtype, exact: float = 1e-6) -> bool:
    """Whether a kernel's errors `found` are at most the errors `plain` of PyTorch's operations.

    In float32 they must be at most `exact` instead.
    """
    # in float32 both err only because they sum in different orders, so neither error can limit the other
    limits = plain if dtype != torch.float32 else dict.fromkeys(plain, exact)
    return all(found[name] <= limits[name] for name in plain)


def assert_graph_replays(run: Callable[[], Tensors], inputs: Iterable[Tensor]) -> None:
    """Assert that a replay of a CUDA graph of `run` computes from what `inputs` hold at that time.

    `run` returns tensors by name.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for seed, tensor in enumerate(inputs, start=20):
            tensor.copy_(random(*tensor.shape, seed=seed))
    graph.replay()
    want = run()
    assert all(torch.equal(captured[name], want[name]) for name in want)


def assert_compiles(run: Callable[[Any], Tensors], function: Callable[..., Any], **options: Any) -> None:
    """Assert that `run` returns the same bits for `function` and for `function` compiled as one graph.

    Repeated calls of the compiled function must give the same bits, too.
    """
    compiled = torch.compile(function, fullgraph=True, **options)
    want = run(function)
    for _ in range(3):
        got = {name: t.clone() for name, t in run(compiled).items()}
        assert all(torch.equal(got[name], want[name]) for name in want)

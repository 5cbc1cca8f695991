"""What the tests of all operators share: random tensors, errors against float64, and what a CUDA graph and a compiler must keep."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# of kernels without products: the interpreter cuts the mantissas of bfloat16 off
ELEMENTWISE_DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
# of kernels with products: the interpreter multiplies the bit patterns of bfloat16
PRODUCT_DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)


def random(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    size: float = 1.0,
) -> Tensor:
    """Normal numbers of that size, the same ones for every dtype and device."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (size * made).to(device, dtype)


def exactly(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Tensors by name as leaves in float64; None stays None."""
    return {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()
    }


def errors(got: Tensors, want: Tensors) -> dict[str, float]:
    """‖got − want‖ / ‖want‖ by name."""
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}


def within(found: dict[str, float], plain: dict[str, float], dtype: torch.dtype, exact: float = 1e-6) -> bool:
    """Whether kernels err no more than the plain chain, and in float32 no more than `exact`."""
    # float32 rounds nothing that is seen, so both err by the order of their sums alone
    limits = plain if dtype != torch.float32 else dict.fromkeys(plain, exact)
    return all(found[name] <= limits[name] for name in plain)


def assert_graph_replays(run: Callable[[], Tensors], inputs: Iterable[Tensor]) -> None:
    """A CUDA graph of `run`, which returns tensors by name, computes from what its inputs hold when it is replayed."""
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
    """`run` of the function compiled as one graph gives the bits of `run` of the function, also when it is called again."""
    compiled = torch.compile(function, fullgraph=True, **options)
    want = run(function)
    for _ in range(3):
        got = {name: t.clone() for name, t in run(compiled).items()}
        assert all(torch.equal(got[name], want[name]) for name in want)

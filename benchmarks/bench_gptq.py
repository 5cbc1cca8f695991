"""GPTQ's inner loop on an 11-layer model: one block of 128 columns, for all matrices of one shape at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import common
from golf_kernels import dispatch
from train.common.errors import main_guard

# (number of matrices, columns of a block, rows) of query and output, key and value, up, down
MODEL = ((22, 128, 512), (22, 128, 256), (11, 128, 2048), (11, 128, 512))
TINY = ((2, 9, 21),)
LIMIT = 31
BACKENDS = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")}


def make_block(shape: tuple[int, int, int], device: torch.device, seed: int) -> list[Tensor]:
    """Random weights, a triangular factor like that of an inverse Hessian, and row scales, in float32."""
    batch, columns, rows = shape
    generator = torch.Generator().manual_seed(seed)
    work = torch.randn(shape, generator=generator) * 0.1
    factor = (torch.randn(batch, columns, columns, generator=generator) / columns).triu() + torch.eye(columns)
    scales = torch.rand(batch, rows, generator=generator) * 0.01 + 0.01
    return [tensor.to(device) for tensor in (work, factor, scales)]


def make_case(shape: tuple[int, int, int], device: torch.device) -> common.Case:
    """Returns the case of one block of each matrix. Results must equal those of the PyTorch backend bit for bit."""
    batch, columns, rows = shape
    elements = batch * columns * rows
    return common.Case(
        "gptq_block",
        "x".join(map(str, shape)),
        "float32",
        functools.partial(make_block, shape, device),
        functools.partial(run, "torch"),
        flops=float(elements * columns),
        bytes=9.0 * elements + 4 * batch * columns**2,
        max_rel_err=0.0,
    )


def run(backend: dispatch.Backend, block: Sequence[Tensor]) -> Sequence[Tensor]:
    results: Sequence[Tensor] = dispatch.run_on(backend, "gptq_block", *block, LIMIT)
    return results


def main(argv: list[str] | None = None) -> int:
    arguments = common.parser("bench_gptq", __doc__.splitlines()[0]).parse_args(argv)
    clock = common.Clock(arguments.device, arguments.warmup_ms, arguments.rounds)
    limits = common.ceilings(clock)
    backends = [name for name in BACKENDS[arguments.device.type] if name in dispatch.available_backends("gptq_block")]
    variants = [common.Variant(name, functools.partial(run, name)) for name in backends]
    for shape in TINY if arguments.tiny else MODEL:
        rows = common.measure(make_case(shape, arguments.device), variants, clock, limits)
        common.report(rows, common.environment(arguments.device), keep=not arguments.tiny)
    return 0


if __name__ == "__main__":
    main_guard(main)

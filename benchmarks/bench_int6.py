"""int6 packing, unpacking, dequantization and fake quantization, compared with a copy of the same number of bytes.

Goals: half of a copy's bandwidth on one CPU core, 85 % on a GPU. Native operations and the copy write to existing
memory, so no time goes into allocating new pages.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import golf_kernels
from benchmarks.measure import common
from golf_kernels import dispatch, int6_native
from train.common.errors import main_guard

# shapes of the matrices of 11 layers: query and output, key and value, up, down
MODEL = [(512, 512)] * 22 + [(256, 512)] * 22 + [(2048, 512)] * 11 + [(512, 2048)] * 11
TINY = [(8, 40), (3, 7)]


class Matrix(NamedTuple):
    """A random weight, random codes with their scales and their packed bytes, and memory for an operation's result."""

    weight: Tensor
    scales: Tensor
    codes: Tensor
    packed: Tensor
    result: Tensor


class Operation(NamedTuple):
    """One int6 operation, which the benchmark applies to all matrices of a model.

    `code_bytes` is the memory traffic per code, without the scales. `new_result(rows, columns)` allocates memory for the
    result of one matrix. `native` writes the results of all matrices to that memory. `reference` computes the result of
    one matrix with the PyTorch backend, as a second candidate. `truth` computes the result in float64, with which the
    candidates' results are compared.
    """

    op: str
    dtype: torch.dtype
    code_bytes: float
    new_result: Callable[[int, int], Tensor]
    truth: Callable[[Matrix], Tensor]
    native: Callable[[Sequence[Matrix]], Any]
    reference: Callable[[Matrix], Tensor]


def dequantize(dtype: torch.dtype) -> Operation:
    def native(model: Sequence[Matrix]) -> None:
        int6_native.dequantize(*zip(*((one.packed, one.scales, one.result) for one in model), strict=True))

    def reference(one: Matrix) -> Tensor:
        weights: list[Tensor] = dispatch.run_on(
            "torch", "int6_dequantize", [one.packed], [one.scales], [one.codes.shape[1]], dtype
        )
        return weights[0]

    def exact(one: Matrix) -> Tensor:
        return one.codes.double() * one.scales.double()[:, None]

    def new_result(rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=dtype)

    return Operation("int6_dequantize", dtype, 0.75 + dtype.itemsize, new_result, exact, native, reference)


def one_by_one(fill: Callable[[Matrix], Any]) -> Callable[[Sequence[Matrix]], Any]:
    return lambda model: [fill(one) for one in model]


def nearest(one: Matrix) -> Tensor:
    """Fake-quantizes in float64. Only the quotient is float32, so that ties are rounded as in the operator."""
    steps = one.scales.float()[:, None]
    return (one.weight / steps).clamp(-31, 31).round().double() * steps


OPERATIONS = (
    dequantize(torch.float32),
    dequantize(torch.bfloat16),
    Operation(
        "int6_pack",
        torch.uint8,
        1.75,
        lambda rows, columns: torch.zeros(golf_kernels.int6.packed_bytes(rows * columns), dtype=torch.uint8),
        lambda one: one.packed,
        one_by_one(lambda one: int6_native.pack(one.codes, one.result)),
        lambda one: dispatch.run_on("torch", "int6_pack", one.codes),
    ),
    Operation(
        "int6_unpack",
        torch.int8,
        1.75,
        lambda rows, columns: torch.zeros(rows * columns, dtype=torch.int8),
        lambda one: one.codes.flatten(),
        one_by_one(lambda one: int6_native.unpack(one.packed, one.result)),
        lambda one: dispatch.run_on("torch", "int6_unpack", one.packed, one.codes.numel()),
    ),
    Operation(
        "int6_fake_quantize",
        torch.float32,
        8,
        torch.zeros,
        nearest,
        one_by_one(lambda one: int6_native.fake_quantize(one.weight, one.scales, one.result)),
        lambda one: dispatch.run_on("torch", "int6_fake_quantize", one.weight, one.scales),
    ),
)


def make_model(
    operation: Operation, shapes: Sequence[tuple[int, int]], device: torch.device, seed: int
) -> list[Matrix]:
    generator = torch.Generator().manual_seed(seed)
    model = []
    for shape in shapes:
        codes = torch.randint(-31, 32, shape, generator=generator, dtype=torch.int8)
        scales = torch.rand(shape[0], generator=generator).add(0.01).half()
        weight = torch.randn(shape, generator=generator)
        one = Matrix(weight, scales, codes, golf_kernels.int6_pack(codes), operation.new_result(*shape))
        model.append(Matrix(*(tensor.to(device) for tensor in one)))
    return model


def make_case(operation: Operation, shapes: Sequence[tuple[int, int]], device: torch.device) -> common.Case:
    traffic = sum(rows * (operation.code_bytes * columns + 2) for rows, columns in shapes)
    return common.Case(
        operation.op,
        f"{len(shapes)} matrices",
        str(operation.dtype).removeprefix("torch."),
        functools.partial(make_model, operation, shapes, device),
        lambda model: [operation.truth(one) for one in model],
        flops=0.0,
        bytes=traffic,
        # half a unit in the last place of bfloat16; the tests compare bit for bit
        max_rel_err=2.0**-8,
    )


def variants(operation: Operation, device: torch.device) -> list[common.Variant]:
    """Returns the variants that can run here: PyTorch, and the native backend if it is built."""

    def fill(model: Sequence[Matrix]) -> list[Tensor]:
        operation.native(model)
        return [one.result for one in model]

    native = "cuda" if device.type == "cuda" else "cpp"
    # packing checks the codes on the host, which a CUDA graph cannot capture
    graph = False if operation.op == "int6_pack" else None
    made = [common.Variant("torch", lambda model: [operation.reference(one) for one in model], graph)]
    if native in dispatch.available_backends(operation.op):
        made.insert(0, common.Variant(native, fill, graph))
    return made


def copy_gbps(clock: common.Clock, traffic_bytes: float, pieces: int) -> float:
    """Returns the GB/s of a copy in `pieces` pieces. `traffic_bytes` counts the bytes read and the bytes written."""
    sources = torch.randint(0, 255, (pieces, int(traffic_bytes / 2 / pieces)), dtype=torch.uint8, device=clock.device)
    targets = torch.zeros_like(sources)

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    clock.warm_up(copy)
    return traffic_bytes / statistics.median(clock.once_ms(copy) for _ in range(clock.rounds)) / 1e6


def main(argv: list[str] | None = None) -> int:
    arguments = common.parser("bench_int6", __doc__.splitlines()[0]).parse_args(argv)
    clock = common.Clock(arguments.device, arguments.warmup_ms, arguments.rounds)
    shapes = TINY if arguments.tiny else MODEL
    # on a GPU one launch dequantizes all matrices, so the copy has one piece, too
    pieces = len(shapes) if arguments.device.type == "cpu" else 1
    for operation in OPERATIONS:
        case = make_case(operation, shapes, arguments.device)
        limits = common.Ceilings(float("inf"), copy_gbps(clock, case.bytes, pieces))
        rows = common.measure(case, variants(operation, arguments.device), clock, limits)
        common.report(rows, common.environment(arguments.device), keep=not arguments.tiny)
        for row in rows:
            print(f"{row['op']} {row['dtype']} {row['impl']}: {row['floor'] / row['p50']:.0%} of a copy's bandwidth")
        print()
    return 0


if __name__ == "__main__":
    main_guard(main)

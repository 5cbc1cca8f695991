"""The MLP block of a layer, forward and backward, compared with torch.compile and other libraries' kernels.

The block computes y = x + scale ⊙ (leaky_relu(rms(x) · w_upᵀ, slope)² · w_downᵀ), and the gradients of x, both matrices
and the scale. Goals: 1.35 times the speed of the compiled block, and at most 1.25 times the time of the block's six
products alone. Other libraries have no leaky activation, so they run at slope 0. On a CPU torch.compile only traces.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import common
from benchmarks.measure.devices import DEVICES, Kernel
from golf_kernels import dispatch
from golf_kernels.leaky_relu2_mlp import leaky_relu2_mlp
from train.common.errors import main_guard

EPS = 1e-6
GRADIENTS = ("x", "w_up", "w_down", "scale")
Inputs = dict[str, Tensor]
Block = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


class Shape(NamedTuple):
    rows: int
    d: int
    hidden: int


def kernels(shape: Shape) -> dict[str, list[Kernel]]:
    """Returns pass → kernel launches of this package's block.

    The floor leaves out the launch `extra`, because the kernel of the up product could compute the norm's factors, too.
    """
    x, post = 2.0 * shape.rows * shape.d, 2.0 * shape.rows * shape.hidden
    sign, flops = post / 16, 2.0 * shape.rows * shape.d * shape.hidden
    return {
        "forward": [Kernel("up", flops, x + post + sign), Kernel("down", flops, post + 2 * x)],
        "backward": [
            Kernel("dpre", flops, x + 2 * post + sign),
            Kernel("dx", flops, post + 3 * x),
            Kernel("dw_up", flops, post + x),
            Kernel("dw_down", flops, post + x),
        ],
        "extra": [Kernel("inverse rms", 0.0, x)],
    }


def predict(shape: Shape) -> str:
    """Returns a text with the microseconds of each pass on each GPU, computed from memory traffic and FLOPs."""
    lines = [f"computed, not measured: {shape.rows}x{shape.d}x{shape.hidden}, µs"]
    for device in DEVICES:
        passes = {name: sum(k.floor_ms(device) for k in group) for name, group in kernels(shape).items()}
        products = 12.0 * shape.rows * shape.d * shape.hidden / (device.tflops * 1e9)
        parts = ", ".join(f"{name} {1e3 * time:.4g}" for name, time in passes.items())
        lines.append(
            f"  {device.name} ({device.tflops:.0f} TF/s, {device.gbps:.0f} GB/s): {parts}; products {1e3 * products:.4g}"
        )
    return "\n".join(lines)


def plain(x: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor, slope: float) -> Tensor:
    """The block in plain PyTorch."""
    hidden = F.leaky_relu(F.rms_norm(x, x.shape[-1:], eps=EPS) @ w_up.T, slope).square()
    return x + scale * (hidden @ w_down.T)


def ours(x: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor, slope: float) -> Tensor:
    return leaky_relu2_mlp(x, w_up, w_down, slope=slope, norm_eps=EPS, residual=x, scale=scale)


def quack() -> Block:
    """The block with the MLP of quack-kernels, and with norm and residual in PyTorch."""
    mlp = importlib.import_module("quack.mlp")

    def block(x: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor, slope: float) -> Tensor:
        hidden = F.rms_norm(x, x.shape[-1:], eps=EPS)
        result: Tensor = mlp.mlp_func(hidden, w_up, w_down, "relu_sq")
        return x + scale * result

    return block


def liger() -> Block:
    """The block with the activation of liger-kernel, and with norm, products and residual in PyTorch."""
    activation = importlib.import_module("liger_kernel.transformers.relu_squared").LigerReLUSquared()

    def block(x: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor, slope: float) -> Tensor:
        hidden: Tensor = activation(F.rms_norm(x, x.shape[-1:], eps=EPS) @ w_up.T)
        return x + scale * (hidden @ w_down.T)

    return block


PEERS = {"quack-kernels": quack, "liger-kernel": liger}


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Returns random inputs, weights scaled as in a model, and `dy`, the gradient of the result."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, d, hidden = shape
    sizes = {"x": (rows, d), "w_up": (hidden, d), "w_down": (d, hidden), "scale": (d,), "dy": (rows, d)}
    scales = {"w_up": d**-0.5, "w_down": hidden**-0.5}
    # Triton's interpreter, used without a GPU, has no bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    made = {
        name: (scales.get(name, 1.0) * torch.randn(size, generator=generator, device=device)).to(dtype)
        for name, size in sizes.items()
    }
    return {name: tensor.requires_grad_(name in GRADIENTS) for name, tensor in made.items()}


def both_passes(block: Block, slope: float, inputs: Inputs) -> list[Tensor]:
    x, w_up, w_down, scale = leaves = [inputs[name] for name in GRADIENTS]
    y = block(x, w_up, w_down, scale, slope)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]


def truth(slope: float, inputs: Inputs) -> list[Tensor]:
    exact = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    return both_passes(plain, slope, exact)


def make_case(shape: Shape, slope: float, device: torch.device) -> common.Case:
    needed = [kernel for name in ("forward", "backward") for kernel in kernels(shape)[name]]
    return common.Case(
        f"leaky_relu2_mlp, slope {slope}",
        f"{shape.rows}x{shape.d}x{shape.hidden}",
        "bfloat16" if device.type == "cuda" else "float16",
        functools.partial(make_inputs, shape, device),
        functools.partial(truth, slope),
        flops=sum(kernel.flops for kernel in needed),
        bytes=sum(kernel.bytes for kernel in needed),
        # twice the error of the plain block in bfloat16
        max_rel_err=1e-2,
    )


def products_case(shape: Shape, device: torch.device) -> common.Case:
    """Returns the case of the block's six products alone, on tensors of the same sizes."""

    def make(seed: int) -> Inputs:
        made = {name: tensor.detach() for name, tensor in make_inputs(shape, device, seed).items()}
        made["post"], made["dpre"] = (made[name] @ made["w_up"].T for name in ("x", "dy"))
        return made

    case = make_case(shape, 0.5, device)
    return common.Case(
        "leaky_relu2_mlp, products alone",
        case.shape,
        case.dtype,
        make,
        lambda inputs: products({name: tensor.double() for name, tensor in inputs.items()}),
        case.flops,
        case.bytes,
        case.max_rel_err,
    )


def products(inputs: Inputs) -> list[Tensor]:
    """Returns the results of the products up, down, dpre, dx, dw_up and dw_down."""
    x, w_up, w_down, _, dy, post, dpre = inputs.values()
    return [x @ w_up.T, post @ w_down.T, dy @ w_down, dpre @ w_up, dpre.T @ x, dy.T @ post]


@contextlib.contextmanager
def forced(**replaced: Any) -> Iterator[None]:
    """Run the operator on its Triton backend, with functions of the backend's module replaced."""
    module = importlib.import_module("golf_kernels.leaky_relu2_mlp_triton")
    replacing = mock.patch.multiple(module, **replaced) if replaced else contextlib.nullcontext()
    with dispatch.forced("leaky_relu2_mlp=triton"), replacing:
        yield


def narrow_tile(product: str, columns: int) -> Any:
    return importlib.import_module("golf_kernels.leaky_relu2_mlp_triton").TILES[product]["narrow"]


def cublas_down(post: Tensor, w_down: Tensor, residual: Tensor) -> Tensor:
    """Computes the down product in cuBLAS, which first copies the residual."""
    return torch.addmm(residual, post, w_down.T)


TRITON: dict[str, dict[str, Any]] = {
    "triton": {},
    "triton, narrow tiles": {"choose_tile": narrow_tile},
    "triton, down by cuBLAS": {"down": cublas_down},
}


def triton_variant(name: str, slope: float) -> common.Variant:
    def run(inputs: Inputs) -> list[Tensor]:
        with forced(**TRITON[name]):
            return both_passes(ours, slope, inputs)

    return common.Variant(name, run, graph=True)


def variants(slope: float, device: torch.device) -> list[common.Variant]:
    """Returns the variants that can run here. Prints why others cannot."""
    made = []
    if "triton" in dispatch.available_backends("leaky_relu2_mlp"):
        made += [triton_variant(name, slope) for name in TRITON]
    else:
        print(f"triton: {dispatch.describe()['leaky_relu2_mlp']['triton']}")

    def both(block: Block) -> Callable[[Inputs], list[Tensor]]:
        return functools.partial(both_passes, block, slope)

    made.append(common.Variant("torch", both(plain), graph=True))
    made.append(common.Variant("compile", both(common.compiled(plain, device)), graph=True))
    for name, peer in PEERS.items() if slope == 0.0 else ():
        try:
            # also eagerly, because torch.compile cannot compile every library
            made.append(common.Variant(name, both(peer()), graph=False))
            made.append(common.Variant(f"{name}, compiled", both(common.compiled(peer(), device)), graph=False))
        except ImportError as error:
            print(f"{name}: {error}; pip install {name}")
    return made


def profile(variant: common.Variant, inputs: Inputs) -> str:
    """Returns the profiler's table of one call, with the time of each kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    variant.run(inputs)
    with torch.profiler.profile(activities=activities) as recorded:
        variant.run(inputs)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table: str = recorded.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)
    return table


def compare(shape: Shape, slope: float, clock: common.Clock, limits: common.Ceilings) -> list[list[common.Row]]:
    """Measure the products alone, then all variants. Returns the rows of both."""
    device = clock.device
    alone = [common.Variant("products alone", products, graph=True)]
    case = make_case(shape, slope, device)
    inputs = case.make(0)
    listed = [v for v in variants(slope, device) if v.impl in TRITON or common.runs(v, inputs)]
    measured = [
        common.measure(products_case(shape, device), alone, clock, limits),
        common.measure(case, listed, clock, limits),
    ]
    if device.type == "cuda":
        peaks = {variant.impl: common.peak_bytes(variant, inputs, device) for variant in listed}
        print("\n".join(memory_lines(peaks, 2 * shape.rows * shape.hidden)))
    return measured


def memory_lines(peaks: dict[str, int], hidden_bytes: int) -> list[str]:
    """Returns lines with each variant's peak memory, and how much less the Triton kernels need than the compiled block.

    The unit of the difference is a hidden tensor `(rows, hidden)`.
    """
    lines = [f"{name}: {peak / 1e6:.0f} MB at most beyond the inputs" for name, peak in peaks.items()]
    if {"triton", "compile"} <= set(peaks):
        fewer = (peaks["compile"] - peaks["triton"]) / hidden_bytes
        lines.append(f"triton takes {fewer:.2f} hidden tensors less than 'compile' (goal 1)")
    return lines


def verdict(rows: Sequence[common.Row], floor_ms: float) -> str:
    times = {row["impl"]: row["p50"] for row in rows}
    if "triton" not in times:
        return "no Triton kernel ran here"
    best = min((name for name in times if name.startswith("compile")), key=lambda name: times[name])
    return (
        f"triton is {times[best] / times['triton']:.2f} times as fast as {best!r} (goal 1.35) and takes "
        f"{times['triton'] / floor_ms:.2f} times the products alone (goal 1.25)"
    )


def main(argv: list[str] | None = None) -> int:
    parser = common.parser("bench_leaky_relu2_mlp", __doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel of the first variant too")
    arguments = parser.parse_args(argv)
    shapes = [Shape(160, 64, 128)] if arguments.tiny else [Shape(98_304, 512, 2048), Shape(98_304, 512, 1536)]
    clock = common.Clock(arguments.device, arguments.warmup_ms, arguments.rounds)
    limits = common.ceilings(clock)
    for shape in shapes:
        print(predict(shape))
        # slope 0, for the other libraries, only at the first shape
        for slope in (0.5, 0.0) if shape == shapes[0] else (0.5,):
            alone, rows = compare(shape, slope, clock, limits)
            for group in (alone, rows):
                common.report(group, common.environment(arguments.device), keep=not arguments.tiny)
            print(verdict(rows, alone[0]["p50"]), end="\n\n")
        if arguments.profile:
            print(profile(variants(0.5, arguments.device)[0], make_inputs(shape, arguments.device, 0)))
    return 0


if __name__ == "__main__":
    main_guard(main)

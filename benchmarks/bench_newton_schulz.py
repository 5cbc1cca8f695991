"""Newton-Schulz and the Muon step on the matrices of the eleven-layer model: `python -m benchmarks.bench_newton_schulz`.

Each case, all 66 matrices and one rank's share of eight, side by side: torch.optim.Muon's own loop, the operator's PyTorch
reference, compiled batched products of each bank, gram-newton-schulz where it is installed, and the Triton kernels; each
launched one by one and as a CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon

from benchmarks.common import Case, Clock, Variant, ceilings, environment, measure, parser, report
from golf_kernels import COEFFICIENTS, Muon, dispatch
from golf_kernels.muon import assign, newton_schulz_cost

Shapes = tuple[tuple[int, int], ...]
STEPS = COEFFICIENTS["quintic"].default_steps
TRIPLE = COEFFICIENTS["quintic"].triples[0]
SCHEDULE = [*TRIPLE] * STEPS


def model_shapes(layers: int = 11, width: int = 512, mlp_mult: int = 4) -> Shapes:
    """q and o, k and v, up and down of every layer; k and v have half as many heads."""
    layer = [(width, width)] * 2 + [(width // 2, width)] * 2 + [(mlp_mult * width, width), (width, mlp_mult * width)]
    return tuple(shape for shape in layer for _ in range(layers))


def share_of_eight(shapes: Shapes) -> Shapes:
    """The matrices of the rank that has most to do."""
    owners = assign(shapes, 8)
    shares = [tuple(s for s, owner in zip(shapes, owners, strict=True) if owner == rank) for rank in range(8)]
    return max(shares, key=lambda share: sum(newton_schulz_cost(*shape) for shape in share))


def symmetric_flops(shapes: Shapes) -> float:
    """Arithmetic that no implementation of this iteration can avoid: half of each symmetric product."""
    return sum(STEPS * (3 * s * s * n + s**3) for s, n in (sorted(shape) for shape in shapes))


def on_exact_copies(call: Callable[[list[Tensor]], Sequence[Tensor]]) -> Callable[[Any], Sequence[Tensor]]:
    return lambda matrices: call([matrix.double().cpu() for matrix in matrices])


def orthogonalize(backend: str, dtype: torch.dtype) -> Callable[[Any], Sequence[Tensor]]:
    return lambda matrices: dispatch.run_on(backend, "newton_schulz", matrices, SCHEDULE, 1e-7, "frobenius", dtype)


def torch_loop(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [_muon._zeropower_via_newtonschulz(matrix, TRIPLE, STEPS, 1e-7) for matrix in matrices]


def _bank(x: Tensor) -> Tensor:
    x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = TRIPLE
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def by_banks(bank: Callable[[Tensor], Tensor]) -> Callable[[Any], Sequence[Tensor]]:
    """Runs `bank` once for all matrices of each shape."""

    def run(matrices: Sequence[Tensor]) -> list[Tensor]:
        groups: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(matrices):
            groups.setdefault(matrix.shape, []).append(index)
        results = list(matrices)
        for indices in groups.values():
            found = bank(torch.stack([matrices[index] for index in indices]))
            for index, result in zip(indices, found.unbind(), strict=True):
                results[index] = result
        return results

    return run


def peers(device: torch.device) -> dict[str, Callable[[Any], Sequence[Tensor]]]:
    """Implementations of the same iteration that this machine has."""
    found = {"torch.optim.Muon": torch_loop, "torch": orthogonalize("torch", torch.bfloat16)}
    if device.type != "cuda":
        return found
    found["compiled banks"] = by_banks(torch.compile(_bank, dynamic=False))
    try:
        from gram_newton_schulz import GramNewtonSchulz
    except ImportError as error:
        print(f"gram-newton-schulz is left out: {error}", file=sys.stderr)
    else:
        gram = GramNewtonSchulz(ns_coefficients=[list(TRIPLE)] * STEPS, compile_kwargs=None)
        found["gram-newton-schulz"] = by_banks(gram)
    found["triton"] = orthogonalize("triton", torch.bfloat16)
    return found


def newton_schulz_case(name: str, shapes: Shapes, device: torch.device) -> Case:
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(shape, generator=generator, device=device) for shape in shapes]

    numbers = sum(rows * columns for rows, columns in shapes)
    exact = on_exact_copies(orthogonalize("torch", torch.float64))
    # float32 in and out
    return Case("newton_schulz", name, "bfloat16", make, exact, symmetric_flops(shapes), 8.0 * numbers, 0.05)


def muon_case(name: str, shapes: Shapes, device: torch.device) -> Case:
    def make(seed: int) -> dict[str, list[Tensor]]:
        generator = torch.Generator(device).manual_seed(seed)
        draw = [[torch.randn(shape, generator=generator, device=device) for shape in shapes] for _ in range(2)]
        return {"weights": draw[0], "gradients": draw[1]}

    def truth(given: dict[str, list[Tensor]]) -> list[Tensor]:
        # momentum only scales the first step's gradient, and Newton-Schulz takes the scale away
        steps = on_exact_copies(orthogonalize("torch", torch.float64))(given["gradients"])
        ratios = [max(1.0, rows / columns) ** 0.5 for rows, columns in shapes]
        return [-ratio * step for ratio, step in zip(ratios, steps, strict=True)]

    numbers = sum(rows * columns for rows, columns in shapes)
    # gradient read, momentum and weight read and written, all float32
    return Case("muon_step", name, "bfloat16", make, truth, symmetric_flops(shapes), 20.0 * numbers, 0.05)


def muon_step(build: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[Any], Sequence[Tensor]]:
    """A step of an optimizer of its own for each set of inputs; returns what the step added to the weights."""
    optimizers: dict[int, tuple[torch.optim.Optimizer, list[Tensor]]] = {}

    def run(given: dict[str, list[Tensor]]) -> list[Tensor]:
        key = given["weights"][0].data_ptr()
        if key in optimizers:
            optimizers[key][0].step()
            return []
        weights = [torch.nn.Parameter(weight.clone()) for weight in given["weights"]]
        for weight, gradient in zip(weights, given["gradients"], strict=True):
            weight.grad = gradient
        optimizers[key] = (build(weights), weights)
        optimizers[key][0].step()
        return [
            weight.detach().cpu().double() - old.cpu().double()
            for weight, old in zip(weights, given["weights"], strict=True)
        ]

    return run


def forced(backend: str) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Muon whose step goes to that back end whatever is chosen elsewhere."""

    class Forced(Muon):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            group = self.param_groups[0]
            dispatch.run_on(backend, "muon_step", group["params"], self, [(group, group["params"])])

    return lambda weights: Forced(weights, lr=1.0, weight_decay=0.0, compute_dtype=torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every case, prints it, and keeps a GPU's rows."""
    options = parser("bench_newton_schulz", __doc__.split("\n")[0]).parse_args(arguments)
    clock = Clock(options.device, options.warmup_ms, options.rounds)
    limits = ceilings(clock)
    surroundings = environment(options.device)
    on_gpu = options.device.type == "cuda"
    shapes = model_shapes(1, 16, 2) if options.tiny else model_shapes()
    kinds = [(f"{len(shapes)} matrices", shapes), ("one rank of eight", share_of_eight(shapes))]
    modes = [("", False), (", graph", True)] if on_gpu else [("", False)]
    for name, chosen in kinds:
        variants = [
            Variant(impl + suffix, run, graph) for impl, run in peers(options.device).items() for suffix, graph in modes
        ]
        rows = measure(newton_schulz_case(name, chosen, options.device), variants, clock, limits)
        report(rows, surroundings, keep=not options.tiny)
        builders = {
            "torch.optim.Muon": lambda w: torch.optim.Muon(w, lr=1.0, weight_decay=0.0),
            "torch": forced("torch"),
        }
        if on_gpu:
            builders["triton"] = forced("triton")
        variants = [Variant(impl, muon_step(build), False) for impl, build in builders.items()]
        if on_gpu:
            variants.append(Variant("triton, graph", muon_step(forced("triton")), True))
        rows = measure(muon_case(name, chosen, options.device), variants, clock, limits)
        report(rows, surroundings, keep=not options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Newton-Schulz and the Muon step on the matrices of an 11-layer model: `python -m benchmarks.bench_newton_schulz`.

Both are measured on all 66 matrices, and on the matrices of one rank of eight. The variants are torch.optim.Muon, the
PyTorch backend, compiled products of banks (all matrices of one shape, stacked), gram-newton-schulz if it is installed,
and the Triton kernels. Each runs eagerly and as a CUDA graph. Goals on a GPU: Newton-Schulz in 0.60 ms for all matrices
and in 0.12 ms for one rank's; a Muon step 6 times as fast as torch.optim.Muon's, and 1.5 times as fast as any other's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon

from benchmarks.measure.common import Case, Clock, Row, Variant, ceilings, environment, measure, parser, report, runs
from benchmarks.measure.devices import newton_schulz_flops
from golf_kernels import COEFFICIENTS, Muon, dispatch
from golf_kernels.sharding import assign, newton_schulz_cost
from train.common.errors import main_guard

Shapes = tuple[tuple[int, int], ...]
STEPS = COEFFICIENTS["quintic"].default_steps
TRIPLE = COEFFICIENTS["quintic"].triples[0]
SCHEDULE = [*TRIPLE] * STEPS
# goals for Newton-Schulz on the Triton kernels, in milliseconds: all matrices, and those of one rank
GOALS_MS = (0.60, 0.12)
Bank = Callable[[Tensor], Tensor]


def model_shapes(layers: int = 11, width: int = 512, mlp_mult: int = 4) -> Shapes:
    """Returns the shapes of all matrices: query and output, key and value, up and down of every layer.

    Keys and values have half as many heads as queries.
    """
    layer = [(width, width)] * 2 + [(width // 2, width)] * 2 + [(mlp_mult * width, width), (width, mlp_mult * width)]
    return tuple(shape for shape in layer for _ in range(layers))


def matrices_of_one_rank(shapes: Shapes) -> Shapes:
    """Returns the shapes of the matrices of one rank: of the eight ranks, the one with the most work."""
    owners = assign(shapes, 8)
    shares = [tuple(s for s, owner in zip(shapes, owners, strict=True) if owner == rank) for rank in range(8)]
    return max(shares, key=lambda share: sum(newton_schulz_cost(*shape) for shape in share))


def on_exact_copies(call: Callable[[list[Tensor]], Sequence[Tensor]]) -> Callable[[Any], Sequence[Tensor]]:
    return lambda matrices: call([matrix.double().cpu() for matrix in matrices])


def orthogonalize(backend: dispatch.Backend, dtype: torch.dtype) -> Callable[[Any], Sequence[Tensor]]:
    return lambda matrices: dispatch.run_on(backend, "newton_schulz", matrices, SCHEDULE, 1e-7, "frobenius", dtype)


def torch_loop(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [_muon._zeropower_via_newtonschulz(matrix, TRIPLE, STEPS, 1e-7) for matrix in matrices]


def plain_bank(x: Tensor) -> Tensor:
    """Newton-Schulz on a bank, a stack of matrices of one shape."""
    x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = TRIPLE
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def by_banks(bank: Bank) -> Callable[[Any], Sequence[Tensor]]:
    """Returns a function that stacks the matrices of each shape and calls `bank` once for each stack."""

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


def gram_bank() -> Bank | None:
    """Returns the compiled function of the library gram-newton-schulz, with this package's coefficients.

    If the library is not installed, prints the reason to stderr and returns None.
    """
    try:
        from gram_newton_schulz import GramNewtonSchulz
    except ImportError as error:
        print(f"gram-newton-schulz is left out: {error}", file=sys.stderr)
        return None
    # by default the library captures CUDA graphs, which cannot be nested in the benchmark's graphs
    options = {"fullgraph": True, "dynamic": False}
    made: Bank = GramNewtonSchulz(ns_coefficients=[list(TRIPLE)] * STEPS, compile_kwargs=options)
    return made


def newton_schulz_variants(device: torch.device) -> dict[str, Callable[[Any], Sequence[Tensor]]]:
    """Returns name → implementation of Newton-Schulz, for those that can run here."""
    found = {"torch.optim.Muon": torch_loop, "torch": orthogonalize("torch", torch.bfloat16)}
    if device.type != "cuda":
        return found | {"banks": by_banks(plain_bank)}
    found["compiled banks"] = by_banks(torch.compile(plain_bank, dynamic=False))
    gram = gram_bank()
    if gram is not None:
        found["gram-newton-schulz"] = by_banks(gram)
    return found | {"triton": orthogonalize("triton", torch.bfloat16)}


def newton_schulz_case(name: str, shapes: Shapes, device: torch.device) -> Case:
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(shape, generator=generator, device=device) for shape in shapes]

    numbers = sum(rows * columns for rows, columns in shapes)
    exact = on_exact_copies(orthogonalize("torch", torch.float64))
    # 8 bytes per number, because float32 is read and written
    return Case("newton_schulz", name, "bfloat16", make, exact, newton_schulz_flops(shapes, STEPS), 8.0 * numbers, 0.05)


def muon_case(name: str, shapes: Shapes, device: torch.device) -> Case:
    def make(seed: int) -> dict[str, list[Tensor]]:
        generator = torch.Generator(device).manual_seed(seed)
        draw = [[torch.randn(shape, generator=generator, device=device) for shape in shapes] for _ in range(2)]
        return {"weights": draw[0], "gradients": draw[1]}

    def truth(given: dict[str, list[Tensor]]) -> list[Tensor]:
        # in the first step momentum only scales the gradient, and Newton-Schulz removes the scale
        steps = on_exact_copies(orthogonalize("torch", torch.float64))(given["gradients"])
        ratios = [max(1.0, rows / columns) ** 0.5 for rows, columns in shapes]
        return [-ratio * step for ratio, step in zip(ratios, steps, strict=True)]

    numbers = sum(rows * columns for rows, columns in shapes)
    # the gradient is read, momentum and weight are read and written, all in float32
    return Case("muon_step", name, "bfloat16", make, truth, newton_schulz_flops(shapes, STEPS), 20.0 * numbers, 0.05)


def muon_step(build: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[Any], Sequence[Tensor]]:
    """Returns a function that makes one optimizer step. Each set of inputs has an optimizer of its own.

    The first call with a set of inputs returns the change of the weights, later calls return [].
    """
    # inputs are recognized by an address, so they are kept: otherwise another tensor could get that address
    optimizers: dict[int, tuple[torch.optim.Optimizer, dict[str, list[Tensor]]]] = {}

    def run(given: dict[str, list[Tensor]]) -> list[Tensor]:
        key = given["weights"][0].data_ptr()
        if key in optimizers:
            optimizers[key][0].step()
            return []
        weights: list[Tensor] = [torch.nn.Parameter(weight.clone()) for weight in given["weights"]]
        for weight, gradient in zip(weights, given["gradients"], strict=True):
            weight.grad = gradient
        optimizers[key] = (build(weights), given)
        optimizers[key][0].step()
        return [
            weight.detach().cpu().double() - old.cpu().double()
            for weight, old in zip(weights, given["weights"], strict=True)
        ]

    return run


class BankedMuon(torch.optim.Optimizer):
    """Muon on banks, which are stacks of matrices of one shape, with learning rate 1 and without weight decay.

    The weights become views of the banks. `step(weights, gradients, momenta, ratio)` updates one bank. `ratio` is the
    bank's factor on the learning rate.
    """

    def __init__(self, weights: list[Tensor], step: Callable[[Tensor, Tensor, Tensor, float], None]) -> None:
        super().__init__(weights, {})
        self._update = step
        groups: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            groups.setdefault(weight.shape, []).append(weight)
        self._banks = []
        for shape, members in groups.items():
            bank = torch.stack([weight.detach() for weight in members])
            gradient = torch.stack([weight.grad for weight in members if weight.grad is not None])
            for weight, place in zip(members, bank.unbind(), strict=True):
                weight.data = place
            self._banks.append((bank, gradient, torch.zeros_like(bank), max(1.0, shape[0] / shape[1]) ** 0.5))

    # PyTorch's signature has an argument `closure`, which no benchmark uses
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for bank in self._banks:
            self._update(*bank)


def banked(bank: Bank) -> Callable[[Tensor, Tensor, Tensor, float], None]:
    def step(weights: Tensor, gradients: Tensor, momenta: Tensor, ratio: float) -> None:
        momenta.lerp_(gradients, 0.05)
        weights.add_(bank(gradients.lerp(momenta, 0.95)), alpha=-ratio)

    return step


def forced(backend: dispatch.Backend) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Returns a function that builds Muon on this backend, regardless of GOLF_BACKEND."""

    class Forced(Muon):
        # without a closure, as above
        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            group = self.param_groups[0]
            dispatch.run_on(backend, "muon_step", group["params"], self, [(group, group["params"])])

    return lambda weights: Forced(weights, lr=1.0, weight_decay=0.0, compute_dtype=torch.bfloat16)


def muon_variants(device: torch.device) -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Returns name → function that builds an optimizer, for those that can run here."""
    found: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "torch.optim.Muon": lambda w: torch.optim.Muon(w, lr=1.0, weight_decay=0.0),
        "torch": forced("torch"),
    }
    if device.type != "cuda":
        return found | {"banks": lambda w: BankedMuon(w, banked(plain_bank))}
    # momentum, Newton-Schulz and update of a bank are one compiled function
    compiled = torch.compile(banked(plain_bank), dynamic=False)
    found["compiled banks"] = lambda w: BankedMuon(w, compiled)
    gram = gram_bank()
    if gram is not None:
        found["gram-newton-schulz"] = lambda w: BankedMuon(w, banked(gram))
    return found | {"triton": forced("triton")}


def variants_of(
    implementations: dict[str, Callable[[Any], Sequence[Tensor]]], case: Case, device: torch.device
) -> list[Variant]:
    """Returns each implementation as an eager variant and, on a GPU, also as a CUDA graph.

    An implementation outside golf_kernels that does not run is left out; its error is printed.
    """
    modes = [("", False), (", graph", True)] if device.type == "cuda" else [("", False)]
    listed = [Variant(impl + suffix, run, graph) for impl, run in implementations.items() for suffix, graph in modes]
    return [v for v in listed if v.impl.split(",")[0] in ("torch", "triton") or runs(v, case.make(0))]


def verdicts(rows: Sequence[Row], goal_ms: float) -> list[str]:
    """Returns lines that compare the results with the goals, or no lines if no Triton kernel ran."""
    times = {row["impl"]: row["p50"] for row in rows}
    ours, others = ({k: v for k, v in times.items() if k.startswith("triton") is wanted} for wanted in (True, False))
    if not ours:
        return []
    best, rival = min(ours, key=lambda k: ours[k]), min(others, key=lambda k: others[k])
    if rows[0]["op"] == "newton_schulz":
        return [
            f"{best} takes {ours[best]:.3f} ms (goal {goal_ms:.2f}), {ours[best] / rows[0]['floor']:.2f} of the floor"
        ]
    pairs = (("torch.optim.Muon", 6.0), (rival, 1.5))
    return [f"{best} is {times[k] / ours[best]:.2f} times as fast as {k!r} (goal {goal:g})" for k, goal in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser("bench_newton_schulz", __doc__.split("\n")[0]).parse_args(arguments)
    device = options.device
    # the compiled variants are compiled again for each shape
    torch._dynamo.config.recompile_limit = 64
    clock = Clock(device, options.warmup_ms, options.rounds)
    limits = ceilings(clock)
    surroundings = environment(device)
    shapes = model_shapes(1, 16, 2) if options.tiny else model_shapes()
    kinds = [(f"{len(shapes)} matrices", shapes), ("one rank of eight", matrices_of_one_rank(shapes))]
    for (name, chosen), goal_ms in zip(kinds, GOALS_MS, strict=True):
        steps = {impl: muon_step(build) for impl, build in muon_variants(device).items()}
        for case, implementations in (
            (newton_schulz_case(name, chosen, device), newton_schulz_variants(device)),
            (muon_case(name, chosen, device), steps),
        ):
            rows = measure(case, variants_of(implementations, case, device), clock, limits)
            report(rows, surroundings, keep=not options.tiny)
            for line in verdicts(rows, goal_ms):
                print(line)
    return 0


if __name__ == "__main__":
    main_guard(main)

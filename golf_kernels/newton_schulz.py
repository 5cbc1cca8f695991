"""Newton-Schulz orthogonalization of a list of matrices: `golf::newton_schulz`.

Each iteration applies an odd polynomial to every singular value σ of X `(m, n)` and keeps the singular vectors:

    X ← X / max(‖X‖_F, eps)
    X ← a·X + (b·A + c·A²)·X   with A = X·Xᵀ          (m ≤ n)
    X ← a·X + X·(b·A + c·A²)   with A = Xᵀ·X          (m > n, where this A is smaller)

The polynomial σ ↦ a·σ + b·σ³ + c·σ⁵ moves every singular value towards 1. One call takes all matrices of a model.
On a GPU, matrices of equal shape are multiplied together in batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf_kernels import cpu, dispatch, operators
from golf_kernels.sharding import dtensor_problem, is_dtensor, orthogonalize_dtensors

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CoefficientSet:
    """A published set of polynomial coefficients.

    Args:
        name: key in `COEFFICIENTS`.
        triples: (a, b, c) of each iteration. A single triple is used in every iteration.
        source: where the numbers were published.
        prescale: `frobenius` divides X by ‖X‖_F. `aol` divides row i by √Σⱼ|X·Xᵀ|ᵢⱼ, or if m > n column i by
            √Σⱼ|Xᵀ·X|ᵢⱼ. Both bound the spectral norm by 1. After `aol`, X is closer to an orthogonal matrix (Prach &
            Lampert, arXiv:2208.03160).
        safety: divisor of the pre-scaled matrix. Sets that diverge for σ > 1 need a safety above 1, because rounding
            can lift a σ above 1.
        default_steps: number of iterations if the caller names none.
        band: (start, low, high): after `default_steps` iterations, every σ that was in [start, 1] in the pre-scaled
            matrix is in [low, high].
    """

    name: str
    triples: tuple[Triple, ...]
    source: str
    prescale: str = "frobenius"
    safety: float = 1.0
    default_steps: int = 5
    band: tuple[float, float, float] | None = None

    def schedule(self, steps: int | None = None) -> list[Triple]:
        """Returns (a, b, c) of each iteration. The first triple includes the division by `safety`.

        Args:
            steps: number of iterations; None takes `default_steps`.

        Raises:
            ValueError: `steps` is below 1, or the set has several triples and their number is not `steps`.
        """
        steps = self.default_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        if len(self.triples) > 1 and steps != len(self.triples):
            raise ValueError(
                f"steps: coefficients {self.name!r} are made for exactly {len(self.triples)} iterations, found {steps}; "
                "leave steps at None, or take 'quintic', which repeats"
            )
        triples = list(self.triples) if len(self.triples) > 1 else list(self.triples) * steps
        a, b, c = triples[0]
        return [(a / self.safety, b / self.safety**3, c / self.safety**5), *triples[1:]]


_MUON_PLUS: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

COEFFICIENTS: dict[str, CoefficientSet] = {
    entry.name: entry
    for entry in (
        CoefficientSet(
            "quintic",
            ((3.4445, -4.7750, 2.0315),),
            "Keller Jordan, https://kellerjordan.github.io/posts/muon/; the default of torch.optim.Muon",
            band=(0.01, 0.6818, 1.1344),
        ),
        CoefficientSet(
            "polar_express",
            (
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            "Amsel et al., Polar Express, arXiv:2505.16932; the five triples of KellerJordan/modded-nanogpt",
            band=(0.001, 0.8588, 1.1412),
        ),
        CoefficientSet(
            "cubic",
            (
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            "`cubic5` of NVIDIA-NeMo/Emerging-Optimizers; c = 0 saves the product A·A. Its map turns negative from "
            "σ = 1.004 on, hence the safety",
            safety=1.01,
            band=(0.0101, 0.7741, 1.3000),
        ),
        CoefficientSet(
            "muon_plus",
            _MUON_PLUS,
            "KellerJordan/modded-nanogpt train_gpt_medium.py; derivation: "
            "https://leloykun.github.io/ponder/muon-opt-coeffs/",
            band=(0.01, 0.9777, 1.0318),
        ),
        CoefficientSet(
            "aol",
            _MUON_PLUS[1:],
            "Boissin et al., Turbo-Muon, https://hal.science/hal-05390446; thib-s/flash-newton-schulz NS_ours with "
            "iter=4: AOL pre-scaling and the last four triples of `muon_plus`",
            prescale="aol",
            default_steps=4,
            band=(0.05, 0.9777, 1.0318),
        ),
    )
}


def coefficient_set(coefficients: str | CoefficientSet) -> CoefficientSet:
    """Returns the set with this name. A `CoefficientSet` is returned unchanged. An unknown name raises `ValueError`."""
    if isinstance(coefficients, CoefficientSet):
        return coefficients
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients: expected one of {', '.join(COEFFICIENTS)}, found {coefficients!r}")
    return COEFFICIENTS[coefficients]


def default_compute_dtype(matrices: Sequence[Tensor]) -> torch.dtype:
    """Returns float64 if any matrix is float64, otherwise bfloat16 on CUDA and on a CPU with bfloat16 products, else float32."""
    if any(matrix.dtype == torch.float64 for matrix in matrices):
        return torch.float64
    fast = any(matrix.is_cuda for matrix in matrices) or cpu.multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def newton_schulz(
    matrices: Sequence[Tensor],
    *,
    coefficients: str | CoefficientSet = "quintic",
    steps: int | None = None,
    eps: float = 1e-7,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Orthogonalizes every matrix of a list: U·S·Vᵀ → U·f(S)·Vᵀ with f(S) close to 1.

    For DTensors (Shard or Replicate on a mesh of one dimension) the results are DTensors with the same placements: one
    rank gathers each matrix, orthogonalizes it and sends every rank its shard. All ranks of the mesh must call with the
    same list.

    Args:
        matrices: matrices `(m, n)` and banks of matrices `(b, m, n)`, on one device. Shapes, floating dtypes and
            strides may differ. The inputs are not changed.
        coefficients: a name in `COEFFICIENTS`, or a set of your own.
        steps: number of iterations; None takes the set's `default_steps`.
        eps: smallest divisor in X / max(‖X‖_F, eps). Zero matrices stay zero.
        compute_dtype: dtype of the products. None: float64 if any input is float64, otherwise bfloat16 on CUDA and
            on a CPU with bfloat16 products, else float32. Norms are computed in float32 at least and cannot overflow.

    Returns:
        New contiguous tensors with the shapes and dtypes of the inputs. A matrix with NaN or infinity gets NaN in its
        result and does not affect other matrices.

    Raises:
        ValueError: a wrong shape, dtype, device, name, eps or number of steps.
        RuntimeError: an input requires a gradient outside `torch.no_grad()`; the operator has no gradient.

    Source:
        https://kellerjordan.github.io/posts/muon/; for the coefficients see `COEFFICIENTS`.
    """
    chosen = coefficient_set(coefficients)
    flat = [value for triple in chosen.schedule(steps) for value in triple]
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number >= 0, found {eps}")
    if not matrices:
        return []
    dtype = default_compute_dtype(matrices) if compute_dtype is None else compute_dtype

    def run(whole: list[Tensor]) -> list[Tensor]:
        results: list[Tensor] = torch.ops.golf.newton_schulz(whole, flat, eps, chosen.prescale, dtype)
        return results

    sharded = [matrix for matrix in matrices if is_dtensor(matrix)]
    if not sharded:
        return run(list(matrices))
    if len(sharded) < len(matrices) or len({matrix.device_mesh for matrix in sharded}) > 1:
        raise ValueError("matrices: expected plain tensors, or DTensors on one mesh, found a mixture")
    for index, matrix in enumerate(sharded):
        problem = dtensor_problem(matrix)
        if problem is not None:
            raise ValueError(f"matrices[{index}]: expected {problem}")
    return orthogonalize_dtensors(sharded, run, dtype)


def _check(
    matrices: Sequence[Tensor], coefficients: Sequence[float], prescale: str, compute_dtype: torch.dtype
) -> None:
    for index, matrix in enumerate(matrices):
        if matrix.ndim not in (2, 3):
            raise ValueError(f"matrices[{index}]: expected shape (m, n) or (b, m, n), found {tuple(matrix.shape)}")
        if not matrix.dtype.is_floating_point:
            raise ValueError(f"matrices[{index}]: expected a floating dtype, found {matrix.dtype}")
        if matrix.device != matrices[0].device:
            raise ValueError(f"matrices[{index}]: expected device {matrices[0].device}, found {matrix.device}")
    if not coefficients or len(coefficients) % 3:
        raise ValueError(f"coefficients: expected a, b, c for each iteration, found {len(coefficients)} in all")
    if prescale not in ("frobenius", "aol"):
        raise ValueError(f"prescale: expected 'frobenius' or 'aol', found {prescale!r}")
    if not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype: expected a floating dtype, found {compute_dtype}")


def _fake(
    matrices: Sequence[Tensor], coefficients: Sequence[float], eps: float, prescale: str, compute_dtype: torch.dtype
) -> list[Tensor]:
    _check(matrices, coefficients, prescale, compute_dtype)
    return [matrix.new_empty(matrix.shape) for matrix in matrices]


def _reference(
    matrices: Sequence[Tensor], coefficients: Sequence[float], eps: float, prescale: str, compute_dtype: torch.dtype
) -> list[Tensor]:
    _check(matrices, coefficients, prescale, compute_dtype)
    groups: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        # a GPU multiplies matrices of equal shape together; a CPU is faster on one matrix that stays in its cache
        groups.setdefault(index if matrix.is_cpu else tuple(matrix.shape[-2:]), []).append(index)
    results: list[Tensor] = [matrix.new_empty(0) for matrix in matrices]
    norm_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    for indices in groups.values():
        banks = [matrices[index] if matrices[index].ndim == 3 else matrices[index].unsqueeze(0) for index in indices]
        stack = torch.cat([bank.to(norm_dtype) for bank in banks])
        if stack.numel():
            stack = _iterate(_prescale(stack, eps, prescale).to(compute_dtype), coefficients)
        for index, result in zip(indices, torch.split(stack, [len(bank) for bank in banks]), strict=True):
            # a copy, because results of an operator must not overlap in memory
            results[index] = result.to(matrices[index].dtype, copy=True).view(matrices[index].shape)
    return results


def _prescale(stack: Tensor, eps: float, prescale: str) -> Tensor:
    """Scales each matrix of a stack in place before the first iteration; see `CoefficientSet.prescale`."""
    # each matrix is divided by its largest entry first, so that squares neither overflow nor underflow
    largest, smallest = (extreme(stack, (-2, -1), keepdim=True) for extreme in (torch.amax, torch.amin))
    largest = torch.maximum(largest, -smallest)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    stack.div_(largest)
    if prescale == "frobenius":
        norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
        return stack.div_(torch.maximum(norm, eps / largest))
    tall = stack.shape[-2] > stack.shape[-1]
    gram = stack.mT @ stack if tall else stack @ stack.mT
    # eps bounds a norm, but the row sums of a Gram matrix are squares of norms
    factor = gram.abs().sum(dim=-1).clamp_min(eps**2).rsqrt()
    return stack.mul_(factor.unsqueeze(-2 if tall else -1))


def _iterate(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in zip(coefficients[0::3], coefficients[1::3], coefficients[2::3], strict=True):
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        scale = b
        if c != 0.0:
            gram, scale = torch.baddbmm(gram, gram, gram, beta=b, alpha=c), 1.0
        left, right = (x, gram) if tall else (gram, x)
        x = torch.baddbmm(x, left, right, beta=a, alpha=scale)
    return x


def _triton(*args: Any) -> list[Tensor]:
    # imported here, because importing golf_kernels must not need Triton
    from golf_kernels import newton_schulz_triton

    _check(*args[:2], *args[3:])
    results: list[Tensor] = newton_schulz_triton.newton_schulz(*args)
    return results


def triton_problem(dtypes: Sequence[torch.dtype], compute_dtype: torch.dtype | None = None) -> str | None:
    """Returns the reason why the Triton kernels cannot take these dtypes on this machine, or None if they can."""
    for dtype in (*dtypes, *([] if compute_dtype is None else [compute_dtype])):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the Triton kernels take matrices and products in float32, bfloat16 or float16, found {dtype}"
    return dispatch.triton_problem()


def _triton_supports(*args: Any) -> str | None:
    return triton_problem([matrix.dtype for matrix in args[0]], args[4]) if args else triton_problem([])


def _inputs(
    make: operators.Make,
    shapes: Sequence[Sequence[int]] = ((24, 40), (40, 24), (2, 24, 40), (1, 7)),
    coefficients: str = "quintic",
    compute_dtype: torch.dtype | None = None,
) -> operators.Inputs:
    matrices = [make(*shape, dtype=torch.float32) for shape in shapes]
    return {"matrices": matrices, "coefficients": coefficients, "compute_dtype": compute_dtype}


dispatch.define(
    "newton_schulz",
    "(Tensor[] matrices, float[] coefficients, float eps, str prescale, ScalarType compute_dtype) -> Tensor[]",
    reference=_reference,
    fake=_fake,
)
dispatch.refuse_gradient(
    "newton_schulz",
    "golf::newton_schulz has no gradient, but an input requires one; call it under torch.no_grad(), or detach it",
)
dispatch.register("newton_schulz", "triton", _triton, supports=_triton_supports)
operators.declare(
    operators.Operator(
        "newton_schulz",
        newton_schulz,
        _inputs,
        # rows that can be read 16 bytes at a time, and rows that cannot
        cases=[
            {"shapes": [(2048, columns)], "coefficients": name, "compute_dtype": dtype}
            for columns, dtype, name in itertools.product(
                (512, 333), (torch.bfloat16, torch.float16, torch.float32), COEFFICIENTS
            )
        ],
        called_by="optimize",
        bfloat16_on_cpu=True,
    )
)

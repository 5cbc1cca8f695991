"""The loss of each scored position in sliding-window evaluation, without gradients.

A batch of 32 windows scores 64 positions of each window (2,048 rows), or all 2,048 (65,536 rows) where windows do not
overlap. `compile` is the published computation under torch.compile: all logits, softcap and cross-entropy (on a CPU it is
only traced). `torch` and `triton` are the backends of `golf::window_nll`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_head import SOFTCAP, WIDTH, Head, make_head
from benchmarks.measure import common
from golf_kernels import dispatch
from train.common.errors import main_guard
from train.evaluate.scoring import BATCH_SEQS

STRIDE, WINDOW, VOCABULARY = 64, 2048, 8192


def plain_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row as the published evaluations compute it, with float32 logits."""
    logits = F.linear(hidden, weight)
    capped = SOFTCAP * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)
    return F.cross_entropy(capped, targets, reduction="none")


def exact(given: Head, rows_at_once: int = 4096) -> list[Tensor]:
    """The losses in float64, computed a few rows at a time."""
    weight = given.weight.double()
    rows = zip(given.hidden.split(rows_at_once), given.targets.split(rows_at_once), strict=True)
    return [torch.cat([plain_nll(hidden.double(), weight, targets) for hidden, targets in rows])]


def make_variants(device: torch.device) -> list[common.Variant]:
    """The variants that can run here: `compile`, and each backend."""
    plain = common.compiled(plain_nll, device)

    def backend(name: dispatch.Backend) -> common.Variant:
        return common.Variant(name, lambda given: [dispatch.run_on(name, "window_nll", *given, SOFTCAP, 0)])

    variants = [common.Variant("compile", lambda given: [plain(*given)]), backend("torch")]
    if device.type == "cuda" and dispatch.triton_problem() is None:
        variants.append(backend("triton"))
    return variants


def make_case(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> common.Case:
    """One batch of windows. Its FLOPs are one product; its bytes leave out the logits, which need not be stored."""
    return common.Case(
        "window_nll",
        f"{rows}x{width}x{vocabulary}",
        str(dtype).removeprefix("torch."),
        lambda seed: make_head(rows, width, vocabulary, dtype, device, seed),
        exact,
        flops=2 * rows * width * vocabulary,
        bytes=(rows + vocabulary) * width * dtype.itemsize + 12 * rows,
        # logits of a 16-bit product are rounded to 16 bits
        max_rel_err=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parser("bench_window_nll", "Losses of one batch of evaluation windows.").parse_args(arguments)
    device = options.device
    clock = common.Clock(device, options.warmup_ms, options.rounds)
    limits = common.ceilings(clock)
    variants = make_variants(device)
    shapes = [(BATCH_SEQS * positions, WIDTH, VOCABULARY) for positions in (STRIDE, WINDOW)]
    for shape in [(96, 16, 300)] if options.tiny else shapes:
        case = make_case(*shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        common.report(common.measure(case, variants, clock, limits), common.environment(device), keep=not options.tiny)
    return 0


if __name__ == "__main__":
    main_guard(main)

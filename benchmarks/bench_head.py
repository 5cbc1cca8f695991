"""The output head of a training step, forward and backward: loss, dx and dW for 98,304 rows of width 512.

`compile` is the head in plain PyTorch under torch.compile (on a CPU only traced). `torch` and `triton` are the backends
of `golf::softcapped_cross_entropy`, which computes the logits in chunks; `triton/32MiB` has chunks of another size. Goals on a GPU: 1.3 times as fast as `compile` with 1.5 GB less peak
memory at vocabulary 8,192, and not slower at 1,024.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import common
from golf_kernels import dispatch
from train.common.errors import main_guard

# the attribute golf_kernels.softcapped_cross_entropy is the function, not the module
head = importlib.import_module("golf_kernels.softcapped_cross_entropy")

ROWS, WIDTH, SOFTCAP = 98_304, 512, 30.0
VOCABULARIES = (1024, 2048, 4096, 8192)
# vocabulary → goals: speed-up over `compile`, and GB of peak memory saved
GOALS = {1024: (1.0, 0.0), 8192: (1.3, 1.5)}


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor


def make_head(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int) -> Head:
    """Returns random hidden states of unit variance, weights that give logits of a few units, and random targets."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(rows, width, device=device, generator=generator)
    weight = 2 * width**-0.5 * torch.randn(vocabulary, width, device=device, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
    return Head(hidden.to(dtype), weight.to(dtype), targets)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Computes the loss from hidden states, as the published scripts do."""
    logits = F.linear(hidden, weight)
    capped = SOFTCAP * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)
    return F.cross_entropy(capped, targets)


def with_gradients(loss_of: Callable[..., Tensor], given: Head) -> list[Tensor]:
    """Returns the loss, dx and dW. The gradients come from autograd."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in given[:2])
    loss = loss_of(hidden, weight, given.targets)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def exact(given: Head, rows_at_once: int = 4096) -> list[Tensor]:
    """Returns the loss, dx and dW in float64, computed a few rows at a time."""
    weight = given.weight.double().requires_grad_()
    losses, gradients = [], []
    for hidden, targets in zip(given.hidden.split(rows_at_once), given.targets.split(rows_at_once), strict=True):
        hidden = hidden.double().requires_grad_()
        loss = plain_loss(hidden, weight, targets) * (len(targets) / len(given.targets))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(hidden.grad)
    assert weight.grad is not None
    return [torch.stack(losses).sum(), torch.cat(gradients), weight.grad]


def golf_variant(backend: dispatch.Backend) -> common.Variant:
    def run(given: Head) -> list[Tensor]:
        return list(dispatch.run_on(backend, "softcapped_cross_entropy", *given, SOFTCAP, True, -100, 0.0, True, True))

    return common.Variant(backend, run)


def make_variants(device: torch.device) -> list[common.Variant]:
    """Returns the variants that can run here: `compile`, and each backend."""
    plain = functools.partial(with_gradients, common.compiled(plain_loss, device))
    variants = [common.Variant("compile", plain), golf_variant("torch")]
    if device.type == "cuda" and dispatch.triton_problem() is None:
        variants += [golf_variant(backend) for backend in ("triton", *(f"triton/{name}" for name in head.CHUNKS))]
    return variants


def make_case(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> common.Case:
    """Returns the case of one shape. FLOPs count three products. Bytes exclude the logits, which need not be stored."""
    return common.Case(
        "softcapped_cross_entropy",
        f"{rows}x{width}x{vocabulary}",
        str(dtype).removeprefix("torch."),
        lambda seed: make_head(rows, width, vocabulary, dtype, device, seed),
        exact,
        flops=6 * rows * width * vocabulary,
        # hidden states and weights are read, their gradients written
        bytes=2 * (rows + vocabulary) * width * dtype.itemsize,
        max_rel_err=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


def verdict(times: Mapping[str, float], peaks_gb: Mapping[str, float], vocabulary: int) -> str:
    """Returns a line that compares this package's fastest backend with `compile` and with the goals."""
    chain = times["compile"]
    ours = min((name for name in times if name != "compile"), key=lambda name: times[name])
    speed, memory = GOALS.get(vocabulary, (None, None))
    text = f"{ours!r} is {chain / times[ours]:.2f} times as fast as 'compile'{f' (goal {speed})' if speed else ''}"
    if peaks_gb:
        text += f" and takes {peaks_gb['compile'] - peaks_gb[ours]:.2f} GB less{f' (goal {memory})' if memory else ''}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser("bench_head", "Head, loss and gradients of a training step.")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, help="default: all four")
    options = parser.parse_args(arguments)
    device = options.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, width = (512, 64) if options.tiny else (ROWS, WIDTH)
    clock = common.Clock(device, options.warmup_ms, options.rounds)
    limits = common.ceilings(clock)
    variants = make_variants(device)
    for vocabulary in options.vocabularies:
        case = make_case(rows, width, vocabulary, dtype, device)
        given = case.make(0)
        found = common.measure(case, variants, clock, limits)
        common.report(found, common.environment(device), keep=not options.tiny)
        for row in found[1:]:
            print(f"{row['impl']}: {found[0]['p50'] / row['p50']:.2f} x {found[0]['impl']}")
        peaks = {v.impl: common.peak_bytes(v, given, device) / 1e9 for v in variants} if device.type == "cuda" else {}
        if peaks:
            print(f"peak memory, GB: {', '.join(f'{impl} {peak:.2f}' for impl, peak in peaks.items())}")
        times = {row["impl"]: row["p50"] for row in found if not row["impl"].endswith(" again")}
        print(verdict(times, peaks, vocabulary) + "\n")
    return 0


if __name__ == "__main__":
    main_guard(main)

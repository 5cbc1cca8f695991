"""Plan the measurements of `python -m golf_kernels tune`, and decide from their findings which kernels run.

The functions depend only on the findings so far, a dictionary from the name of a measurement to its finding. There are
these measurements:

    check OP BACKEND      compares an operator on one backend with float64
    call OP               times an operator: PyTorch eagerly, PyTorch compiled, and the kernel
    attention BATCH       times one layer's attention on each backend, on the training batch or the evaluation batch
    step OP               times a training step without kernels, and with this kernel alone
    step all              times a step without kernels, and with all kernels that were faster alone
    step all without OP   times a step with all these kernels, and with all but one

A finding has a `verdict`: `ok`, or what went wrong. Findings of timings also have `times`, a dictionary from
implementation to p20, p50 and p80 in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.jobs import OK
from golf_kernels.backend_names import Backend, without_variant

Findings = Mapping[str, Mapping[str, Any]]
TORCH, COMPILE, ALL = "torch", "compile", "all"
# the batches of `benchmarks.bench_attention`
BATCHES = ("training", "evaluation")


class Candidate(NamedTuple):
    """A kernel to measure: an operator on a backend.

    `in_step`: whether to measure it in the training step. `has_bench`: whether the operator has a benchmark of its own.
    """

    op: str
    backend: Backend
    in_step: bool
    has_bench: bool


class Measurement(NamedTuple):
    """One measurement. `kind` is check, call or step.

    A step runs with the kernels of the operators in `kernels`, and is compared with a step without the kernel of
    `without`. If `without` is empty, it is compared with a step without kernels.
    """

    name: str
    kind: str
    candidate: Candidate | None = None
    kernels: tuple[str, ...] = ()
    without: str = ""


def _fine(findings: Findings, name: str) -> bool:
    return findings.get(name, {}).get("verdict") == OK


def failed(candidate: Candidate, findings: Findings) -> bool:
    """Whether the check of a kernel has failed."""
    name = f"check {candidate.op} {candidate.backend}"
    return name in findings and not _fine(findings, name)


def _faster(finding: Mapping[str, Any], before: str, after: str) -> bool:
    """Whether `after` is faster beyond the spread: its p80 is below the p20 of `before`."""
    return bool(finding["times"][after][2] < finding["times"][before][0])


def _speed(finding: Mapping[str, Any], before: str, after: str) -> float:
    return float(finding["times"][before][1] / finding["times"][after][1])


def _best(finding: Mapping[str, Any]) -> str:
    """Returns the faster PyTorch variant, eager or compiled."""
    forms = [form for form in (TORCH, COMPILE) if form in finding["times"]]
    return min(forms, key=lambda form: finding["times"][form][1])


def fastest_variant(candidate: Candidate, findings: Findings) -> str:
    """The backend of a candidate, or its variant that was fastest as a call."""
    times = findings.get(f"call {candidate.op}", {}).get("times", {})
    forms = [form for form in times if without_variant(form) == candidate.backend]
    return min(forms, key=lambda form: times[form][1], default=candidate.backend)


def _won_alone(candidate: Candidate, findings: Findings) -> bool:
    name = f"step {candidate.op}"
    return _fine(findings, name) and _faster(findings[name], TORCH, candidate.op)


def _lost_as_call(candidate: Candidate, findings: Findings) -> bool:
    finding = findings.get(f"call {candidate.op}", {})
    return finding.get("verdict") == OK and not _faster(finding, _best(finding), fastest_variant(candidate, findings))


def next_measurements(candidates: Sequence[Candidate], findings: Findings) -> list[Measurement]:
    """Returns the next measurements, in order. The list is empty if nothing is left to measure.

    Measurements in the list do not depend on each other. A step with several kernels is alone in the list, because the
    next one depends on its finding.
    """
    checks = [Measurement(f"check {c.op} {c.backend}", "check", c) for c in candidates]
    if left := [m for m in checks if m.name not in findings]:
        return left
    sound = [c for c in candidates if _fine(findings, f"check {c.op} {c.backend}")]
    calls = [Measurement(f"call {c.op}", "call", c) for c in sound if c.has_bench]
    if left := [m for m in calls if m.name not in findings]:
        return left
    # before the steps, which take its result
    attention = [Measurement(f"attention {batch}", "attention") for batch in BATCHES]
    if left := [m for m in attention if m.name not in findings]:
        return left
    alone = [c for c in sound if c.in_step and not _lost_as_call(c, findings)]
    alone = [c._replace(backend=fastest_variant(c, findings)) for c in alone]
    steps = [Measurement(f"step {c.op}", "step", c, (c.op,)) for c in alone]
    if left := [m for m in steps if m.name not in findings]:
        return left
    winners = _by_gain(alone, findings)
    if len(winners) < 2:
        return []
    together = Measurement("step all", "step", None, tuple(winners))
    if together.name not in findings:
        return [together]
    if not _fine(findings, together.name):
        return []
    kept = list(winners)
    # begin with the kernel that gained least alone
    for op in reversed(winners):
        name = f"step all without {op}"
        if name not in findings:
            return [Measurement(name, "step", None, tuple(kept), op)]
        if _dropped(findings, name):
            kept.remove(op)
    return []


def _by_gain(alone: Sequence[Candidate], findings: Findings) -> list[str]:
    won = [c.op for c in alone if _won_alone(c, findings)]
    return sorted(won, key=lambda op: -_speed(findings[f"step {op}"], TORCH, op))


def _dropped(findings: Findings, name: str) -> bool:
    """Whether to drop a kernel, because the step with all kernels is not faster than the step without this one."""
    return _fine(findings, name) and not _faster(findings[name], "without", ALL)


def decisions(candidates: Sequence[Candidate], findings: Findings) -> dict[str, dict[str, dict[str, str]]]:
    """Returns operator → `call` or `step` → backend and reason. What was not measured is left out."""
    decided: dict[str, dict[str, dict[str, str]]] = {}
    alone = [c for c in candidates if c.in_step and _fine(findings, f"check {c.op} {c.backend}")]
    winners = _by_gain([c for c in alone if not _lost_as_call(c, findings)], findings)
    for c in candidates:
        check = findings.get(f"check {c.op} {c.backend}")
        if check is None:
            continue
        uses = decided.setdefault(c.op, {})
        if check["verdict"] != OK:
            reason = f"{c.backend}'s check failed: {check['verdict']}"
            uses |= {use: {"backend": "torch", "reason": reason} for use in ("call", "step")}
            continue
        call = _call_decision(c, findings)
        if call:
            uses["call"] = call
        step = _step_decision(c, findings, winners) if c.in_step else call
        if step:
            uses["step"] = step
    return {op: uses for op, uses in decided.items() if uses}


def attention_decisions(findings: Findings) -> dict[str, dict[str, str]]:
    """Returns shape of a measured batch → the fastest attention backend, and the times of all as the reason."""
    decided = {}
    for batch in BATCHES:
        finding = findings.get(f"attention {batch}", {})
        if finding.get("verdict") == OK:
            medians = sorted((quantiles[1], name) for name, quantiles in finding["times"].items())
            figures = ", ".join(f"{name} {median:.3f}" for median, name in medians)
            decided[finding["shape"]] = {
                "backend": medians[0][1],
                "reason": f"fastest, ms forward + backward: {figures}",
            }
    return decided


def _call_decision(c: Candidate, findings: Findings) -> dict[str, str] | None:
    finding = findings.get(f"call {c.op}")
    if finding is None:
        return None
    if finding["verdict"] != OK:
        return {"backend": "torch", "reason": f"{c.backend} was not measured: {finding['verdict']}"}
    best, kernel = _best(finding), fastest_variant(c, findings)
    figures = f"{_speed(finding, best, kernel):.2f} x {'torch.compile' if best == COMPILE else 'torch'}"
    if _faster(finding, best, kernel):
        return {"backend": kernel, "reason": figures}
    return {"backend": "torch", "reason": f"{kernel} is {figures}"}


def _step_decision(c: Candidate, findings: Findings, winners: Sequence[str]) -> dict[str, str] | None:
    if _lost_as_call(c, findings):
        return {
            "backend": "torch",
            "reason": f"{c.backend} was not faster in a single call, so the step was not measured",
        }
    finding = findings.get(f"step {c.op}")
    if finding is None:
        return None
    if finding["verdict"] != OK:
        return {"backend": "torch", "reason": f"the step with {c.backend} failed: {finding['verdict']}"}
    figures = f"{_speed(finding, TORCH, c.op):.2f} x in the step"
    if c.op not in winners:
        return {"backend": "torch", "reason": f"{c.backend} is {figures}"}
    together, without = findings.get("step all"), f"step all without {c.op}"
    if together is not None and together["verdict"] != OK and c.op != winners[0]:
        return {"backend": "torch", "reason": f"the step with all winners failed: {together['verdict']}"}
    if _dropped(findings, without):
        ratio = _speed(findings[without], "without", ALL)
        return {"backend": "torch", "reason": f"{c.backend} is {figures} alone, {ratio:.2f} x beside the others"}
    return {"backend": fastest_variant(c, findings), "reason": figures}

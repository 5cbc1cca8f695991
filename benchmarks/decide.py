"""Plan the measurements of `python -m golf_kernels tune`, and decide from their findings which kernels run.

Everything here is a function of the findings so far, a dictionary from a measurement's name to its result:

    check OP BACKEND      an operator on one backend against float64
    call OP               an operator at a recipe's shapes: PyTorch eagerly, compiled, and the kernel
    step OP               the training step with one kernel alone, beside the step without kernels
    step all              the step with all kernels that won, beside the step without kernels
    step all without OP   the step with all of them, beside the step without one

A finding has `verdict` (`ok` or the reason why not), and after a measurement `times`, from an implementation to its
p20, p50 and p80 in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.jobs import OK
from golf_kernels.dispatch import Backend

Findings = Mapping[str, Mapping[str, Any]]
TORCH, COMPILE, ALL = "torch", "compile", "all"


class Candidate(NamedTuple):
    """A kernel that may run: its operator, its backend, and what can be measured of it."""

    op: str
    backend: Backend
    in_step: bool
    has_bench: bool


class Measurement(NamedTuple):
    """What to measure next. `kernels` are in the step, `without` is taken out of it for comparison."""

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
    """Whether `after` is faster than `before`, by more than the spread of both."""
    return bool(finding["times"][after][2] < finding["times"][before][0])


def _speed(finding: Mapping[str, Any], before: str, after: str) -> float:
    return float(finding["times"][before][1] / finding["times"][after][1])


def _best(finding: Mapping[str, Any]) -> str:
    """The faster of PyTorch's two forms."""
    forms = [form for form in (TORCH, COMPILE) if form in finding["times"]]
    return min(forms, key=lambda form: finding["times"][form][1])


def _won_alone(candidate: Candidate, findings: Findings) -> bool:
    name = f"step {candidate.op}"
    return _fine(findings, name) and _faster(findings[name], TORCH, candidate.op)


def _lost_as_call(candidate: Candidate, findings: Findings) -> bool:
    finding = findings.get(f"call {candidate.op}", {})
    return finding.get("verdict") == OK and not _faster(finding, _best(finding), candidate.backend)


def next_measurements(candidates: Sequence[Candidate], findings: Findings) -> list[Measurement]:
    """What to measure next, in order; an empty list if nothing is left.

    Measurements of one answer do not depend on each other, except that the steps with several kernels come one by one.
    """
    checks = [Measurement(f"check {c.op} {c.backend}", "check", c) for c in candidates]
    if left := [m for m in checks if m.name not in findings]:
        return left
    sound = [c for c in candidates if _fine(findings, f"check {c.op} {c.backend}")]
    calls = [Measurement(f"call {c.op}", "call", c) for c in sound if c.has_bench]
    if left := [m for m in calls if m.name not in findings]:
        return left
    alone = [c for c in sound if c.in_step and not _lost_as_call(c, findings)]
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
    # the kernel that gained least alone is the first to be doubted
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
    """Whether a kernel does not pay beside the others: the step without it is not slower beyond the spread."""
    return _fine(findings, name) and not _faster(findings[name], "without", ALL)


def decisions(candidates: Sequence[Candidate], findings: Findings) -> dict[str, dict[str, dict[str, str]]]:
    """The backend of each operator for calls and for the step, with figures and reason. Unmeasured ones are left out."""
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


def _call_decision(c: Candidate, findings: Findings) -> dict[str, str] | None:
    finding = findings.get(f"call {c.op}")
    if finding is None:
        return None
    if finding["verdict"] != OK:
        return {"backend": "torch", "reason": f"{c.backend} was not measured: {finding['verdict']}"}
    best = _best(finding)
    figures = f"{_speed(finding, best, c.backend):.2f} x {'torch.compile' if best == COMPILE else 'torch'}"
    if _faster(finding, best, c.backend):
        return {"backend": c.backend, "reason": figures}
    return {"backend": "torch", "reason": f"{c.backend} is {figures}"}


def _step_decision(c: Candidate, findings: Findings, winners: Sequence[str]) -> dict[str, str] | None:
    if _lost_as_call(c, findings):
        return {"backend": "torch", "reason": f"{c.backend} lost as a call, so the step was not measured"}
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
    return {"backend": c.backend, "reason": figures}

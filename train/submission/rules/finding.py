"""One rule's outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What a rule came to; the value is what is printed."""

    PASSES = "ok"
    FAILS = "FAIL"
    UNKNOWN = "not seen"


@dataclass(frozen=True)
class Finding:
    """One rule's outcome.

    Attributes:
        rule: the rule, in a few words.
        verdict: what it came to.
        value: what was found.
        limit: what was allowed; empty where the rule says it.
    """

    rule: str
    verdict: Verdict
    value: str
    limit: str = ""


def passes(rule: str, value: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.PASSES, value, limit)


def fails(rule: str, value: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.FAILS, value, limit)


def unknown(rule: str, why: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.UNKNOWN, why, limit)


def pass_if(rule: str, good: bool, value: str, limit: str = "") -> Finding:
    return (passes if good else fails)(rule, value, limit)

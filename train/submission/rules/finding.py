"""The outcome of one rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """Whether a record keeps a rule. `check` prints the value."""

    PASSES = "ok"
    FAILS = "FAIL"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """The outcome of one rule.

    Attributes:
        rule: name of the rule.
        verdict: whether the record keeps it.
        value: what the record shows.
        limit: what the rule allows; empty if the rule's name says it.
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


def pass_if(good: bool, rule: str, value: str, limit: str = "") -> Finding:
    return (passes if good else fails)(rule, value, limit)

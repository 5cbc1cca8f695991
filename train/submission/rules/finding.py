"""The outcome of one rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """Whether a record keeps a rule. `check` prints the value."""

    PASSES = "ok"
    FAILS = "breaks a rule"
    UNKNOWN = "cannot be seen"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """The outcome of one rule.

    Attributes:
        rule: name of the rule.
        verdict: whether the record keeps the rule. `NOTE`: the rule is not broken, but a reader should know `value`.
        value: the facts in the record that led to the verdict.
        limit: text of the rule; empty if `rule` says everything.
    """

    rule: str
    verdict: Verdict
    value: str
    limit: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.value}" + (f" (rule: {self.limit})" if self.limit else "")


def passes(rule: str, value: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.PASSES, value, limit)


def fails(rule: str, value: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.FAILS, value, limit)


def unknown(rule: str, why: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.UNKNOWN, why, limit)


def note(rule: str, value: str, limit: str = "") -> Finding:
    return Finding(rule, Verdict.NOTE, value, limit)


def pass_if(good: bool, rule: str, value: str, limit: str = "") -> Finding:
    return (passes if good else fails)(rule, value, limit)


def note_unless(good: bool, rule: str, value: str, limit: str = "") -> Finding:
    return (passes if good else note)(rule, value, limit)

"""The text that a score is of: the challenge's validation text or another, and whether two scores are of one text."""

from __future__ import annotations

from dataclasses import dataclass

# validation texts of the challenge: name → scored tokens, bytes; from the published logs
TEXTS = {
    "sp1024": (62_021_632, 151_080_362),
    "sp1024, older export": (63_779_840, 155_769_746),
    "sp2048": (50_905_088, 150_746_272),
    "sp4096": (45_508_608, 151_074_052),
    "sp4096 of #1285": (45_514_752, 151_074_924),
    "sp8192": (40_540_160, 151_078_222),
    "CaseOps sp8192": (47_851_520, 151_084_309),
}


@dataclass(frozen=True)
class ScoredText:
    """The text that a record was scored on.

    Attributes:
        challenge: whether it is the challenge's validation text, all of it.
        tokens: scored; 0: not written down.
        row: tokens of a window; the end of the text that fills none is left out.
        tokenizer: SHA-256; empty: not written down.
    """

    challenge: bool
    tokens: int = 0
    row: int = 1
    tokenizer: str = ""

    def __str__(self) -> str:
        if self.challenge:
            return "the challenge's validation text"
        return f"{self.tokens:,} tokens that are not the challenge's validation text"


def one_text(a: ScoredText | None, b: ScoredText | None) -> bool | None:
    """Whether two scores are of one text; None: nothing shows it."""
    if a is None or b is None:
        return None
    if a.tokens and b.tokens and a.tokenizer and a.tokenizer == b.tokenizer:
        return abs(a.tokens - b.tokens) < max(a.row, b.row)
    if a.challenge and b.challenge:
        return True
    return False if a.challenge or b.challenge else None

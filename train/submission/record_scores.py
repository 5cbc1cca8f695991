"""The scores of a record, and the validation texts and scores of published records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.run.log_grammar import Log, Numbers
from train.submission.digits import is_number

# published tokenizer → tokens and bytes of the challenge's validation text that published logs state as scored
TEXTS = {
    "sp1024": (62_021_632, 151_080_362),
    "sp1024, older export": (63_779_840, 155_769_746),
    "sp2048": (50_905_088, 150_746_272),
    "sp4096": (45_508_608, 151_074_052),
    "sp4096 of #1285": (45_514_752, 151_074_924),
    "sp8192": (40_540_160, 151_078_222),
    "CaseOps sp8192": (47_851_520, 151_074_499),
    "CaseOps sp8192, untrimmed": (47_853_343, 151_080_644),
}
# published record → seeds, val_bpb per seed, val_loss per seed (empty: not published); from the record's files or logs
PUBLISHED: dict[str, tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = {
    "122": (
        ("41", "102", "1337"),
        (1.16192049, 1.15974176, 1.15915537),
        (2.38498992, 2.38051780, 2.37931417),
    ),
    "549": ((), (1.11922988, 1.12002032, 1.11888882), ()),
    "1019": (("314", "42", "999"), (1.11508120, 1.11437394, 1.11475014), (1.88276292, 1.88156874, 1.88220393)),
    "1392": (("42", "314", "999"), (1.10327377, 1.10181145, 1.10101898), ()),
    "1471": (("42", "1337", "2024"), (1.08725556, 1.08655776, 1.08585085), ()),
}


@dataclass(frozen=True)
class ScoredText:
    """The text that a record was scored on.

    Attributes:
        challenge: whether the text is the challenge's whole validation text.
        tokens: number of scored tokens; 0: not known.
        window: window length of the evaluation. The evaluation may skip the tokens after the last full window.
        tokenizer: SHA-256 of the tokenizer; empty: not known.
    """

    challenge: bool
    tokens: int = 0
    window: int = 1
    tokenizer: str = ""

    def __str__(self) -> str:
        return "the challenge's validation text" if self.challenge else f"another text of {self.tokens:,} tokens"


def same_text(a: ScoredText | None, b: ScoredText | None) -> bool | None:
    """Whether two records were scored on the same text. None: not known."""
    if a is None or b is None:
        return None
    if a.tokens and b.tokens and a.tokenizer and a.tokenizer == b.tokenizer:
        return abs(a.tokens - b.tokens) < max(a.window, b.window)
    if a.challenge and b.challenge:
        return True
    return False if a.challenge or b.challenge else None


@dataclass(frozen=True)
class RecordScores:
    """The scores of a record.

    Attributes:
        name: the record's name in messages.
        seeds: the seeds; empty: not known.
        val_bpb: bits per byte, one score per seed or a single number.
        val_loss: nats per token, one score per seed or a single number; empty: not known.
        text: the scored text; None: not known.
    """

    name: str
    seeds: tuple[str, ...]
    val_bpb: tuple[float, ...]
    val_loss: tuple[float, ...] = ()
    text: ScoredText | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token = val_loss / (val_bpb · ln 2); None without val_loss."""
        if not self.val_loss:
            return None
        return statistics.fmean(self.val_loss) / (statistics.fmean(self.val_bpb) * math.log(2))


def is_score(values: Mapping[str, Any]) -> bool:
    """Whether `values` has a positive val_loss and a positive val_bpb."""
    return all(is_number(values.get(name)) and values[name] > 0 for name in ("val_loss", "val_bpb"))


def exact_score(log: Log) -> Numbers | None:
    """Return the last final score of a log, preferably among the scores with 8 decimals; None if it is not valid."""
    finals = [values for name, values in log["finals"].items() if name.endswith("_exact")]
    finals = finals or list(log["finals"].values())
    return finals[-1] if finals and is_score(finals[-1]) else None


def scored_text(submission: Mapping[str, Any]) -> ScoredText | None:
    """Return the text that a submission.json says was scored; None if the file does not say."""
    evaluation, tokenizer = submission.get("evaluation"), submission.get("tokenizer")
    if not isinstance(evaluation, dict) or not is_number(whole := evaluation.get("validation_tokens")):
        return None
    scored, length = evaluation.get("tokens"), evaluation.get("window")
    # rule `overlap_tail` scores the last tokens several times, so it may score more tokens than the text has
    tokens = int(min(scored, whole) if is_number(scored) else whole)
    window = int(length) if is_number(length) and length >= 1 else 1
    digest = tokenizer.get("sha256") if isinstance(tokenizer, dict) else None
    return ScoredText(challenge_text(tokens, window), tokens, window, digest if isinstance(digest, str) else "")


def challenge_text(tokens: int, window: int) -> bool:
    """Whether the text is the challenge's, judged by its number of scored tokens.

    Up to a window of tokens may be missing, because an evaluation may skip the tokens after the last full window.
    """
    return any(abs(tokens - known) < window for known, _ in TEXTS.values())

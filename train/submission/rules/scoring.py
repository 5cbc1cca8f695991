"""Rules on the score: the right validation text, each token scored once, bytes counted correctly.

val_bpb = val_loss / ln 2 · tokens / bytes, so val_loss and val_bpb together give the bytes per token, to eight digits.
The bytes per token identify the validation text and the tokenizer, and show whether tokens were scored more than once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.common.errors import UserError
from train.data.tokenizer import load_tokenizer
from train.submission.digits import decimals, is_number
from train.submission.record_folder import RecordFolder
from train.submission.record_scores import TEXTS, is_score
from train.submission.rules.finding import Finding, fails, note, pass_if, passes, unknown

# the bytes per token of any two tokenizers differ by more than this fraction
_SIMILAR = 1e-4
# rule overlap_tail scores the last 64 tokens up to 32 times, which changes the bytes per token by a smaller fraction
_TAIL = 3e-5
# a larger relative error of the bytes per token hides whether tokens were scored twice
_PRECISE = 1e-6
_TEXT_LIMIT = "scored on FineWeb's first 50,000 documents"
_ONCE_LIMIT = "the whole validation text, once"
_MOST_MODEL_BYTES = 8_000_000


@dataclass(frozen=True)
class Ratio:
    """Bytes per token of one score. `error` is the largest relative error that the rounding of the score causes."""

    source: str
    value: float
    error: float

    def names(self, tolerance: float) -> list[str]:
        """Return the names in `TEXTS` with the same bytes per token, up to `tolerance` or `error`, nearest first."""
        off = {name: abs(self.value / (size / tokens) - 1) for name, (tokens, size) in TEXTS.items()}
        return sorted((name for name in off if off[name] <= max(tolerance, self.error)), key=off.__getitem__)

    def __str__(self) -> str:
        return f"{self.value:.7f} bytes per token ({self.source})"


def ratios(record: RecordFolder) -> list[Ratio]:
    """Compute the bytes per token from val_loss and val_bpb of each seed, or else of submission.json."""
    pairs = {f"seed {result.seed}": result.numbers for result in record.results}
    pairs["submission.json"] = {name: value for name, value in record.claims.values.items() if is_number(value)}
    found = [_ratio(source, pair) for source, pair in pairs.items() if is_score(pair)]
    return [one for one in found if one.source != "submission.json"] or found


def _ratio(source: str, pair: dict[str, float]) -> Ratio:
    loss, bpb = pair["val_loss"], pair["val_bpb"]
    # count at least 4 decimals, because a JSON number loses zeros at its end
    error = sum(0.6 * 10.0 ** -max(decimals(value), 4) / value for value in (loss, bpb))
    return Ratio(source, loss / (bpb * math.log(2)), 3e-8 if min(decimals(loss), decimals(bpb)) >= 7 else error)


def text(record: RecordFolder) -> Finding:
    rule = "validation text"
    facts = record.claims.values.get("evaluation")
    if isinstance(facts, dict) and is_number(tokens := facts.get("validation_tokens")):
        names = [name for name, (known, _) in TEXTS.items() if known == tokens]
        window = facts.get("window")
        # an evaluation may leave out the tokens after the last full window
        whole = TEXTS["CaseOps sp8192, untrimmed"][0]
        if is_number(window) and window >= 1 and tokens == whole // int(window) * int(window):
            names.append("CaseOps sp8192")
        return pass_if(bool(names), rule, f"{tokens:,} tokens: {names[0] if names else 'another text'}", _TEXT_LIMIT)
    found = ratios(record)
    if not found:
        return unknown(rule, "needs both val_loss and val_bpb", _TEXT_LIMIT)
    names = [name for one in found for name in one.names(_SIMILAR)]
    if names:
        return passes(rule, f"{found[0]}: {names[0]}", _TEXT_LIMIT)
    return unknown(rule, f"{found[0]}, unlike any published tokenizer", _TEXT_LIMIT)


def once(record: RecordFolder) -> Finding:
    """Check that each token is scored once. If only the last 64 tokens are scored again, give a note."""
    rule = "each token scored once"
    facts = record.claims.values.get("evaluation")
    names = ("tokens", "validation_tokens")
    if isinstance(facts, dict) and "rule" in facts and all(is_number(facts.get(name)) for name in names):
        scored, whole = facts["tokens"], facts["validation_tokens"]
        value = f"{scored:,} of {whole:,} tokens, rule {facts['rule']}"
        if scored == whole and facts["rule"] in ("once", "flat"):
            return passes(rule, value, _ONCE_LIMIT)
        return (note if scored >= whole else fails)(rule, value, _ONCE_LIMIT)
    found = [one for one in ratios(record) if one.error <= _PRECISE]
    adapted = any(result.evaluation and result.evaluation.kind == "ttt" for result in record.results)
    for one in found:
        for name in one.names(_TAIL)[:1]:
            if name not in one.names(0.0) and adapted:
                why = f"{one}, {name} has {_published(name):.7f}: test-time training may score the end of the text, too"
                return unknown(rule, why, _ONCE_LIMIT)
            if name not in one.names(0.0):
                return note(
                    rule, f"{one}, {name} has {_published(name):.7f}: the last tokens are scored again", _ONCE_LIMIT
                )
    if found and all(one.names(0.0) for one in found):
        return passes(rule, f"{found[0]}, as {found[0].names(0.0)[0]} has", _ONCE_LIMIT)
    return _like_flat(record, rule, found)


def _like_flat(record: RecordFolder, rule: str, found: list[Ratio]) -> Finding:
    """Compare the bytes per token with those of the non-overlapping windows in the same log.

    This judges records whose validation text is not a published one.
    """
    for result in record.results:
        flat = [
            one
            for one in (result.log.evaluations if result.log else ())
            if one.val_loss and one.kind == "after" and "sliding" not in one.name and one is not result.evaluation
        ]
        mine = [one for one in found if one.source == f"seed {result.seed}"]
        if flat and mine and result.log:
            other = _ratio(flat[-1].name, {"val_loss": flat[-1].val_loss or 0.0, "val_bpb": flat[-1].val_bpb})
            off = abs(mine[0].value / other.value - 1)
            if off <= mine[0].error + other.error:
                return passes(rule, "bytes per token equal those with non-overlapping windows", _ONCE_LIMIT)
            if off <= _TAIL:
                return note(
                    rule, f"{mine[0]}, {other} in {result.log.name}: the last tokens are scored again", _ONCE_LIMIT
                )
    return unknown(rule, "the number of scored tokens is not given", _ONCE_LIMIT)


def tokenizer(record: RecordFolder) -> Finding:
    rule = "tokenizer counts bytes correctly"
    known = [name for one in ratios(record) for name in one.names(_SIMILAR)]
    models = [
        name for name, size in record.files.sizes.items() if name.endswith(".model") and size <= _MOST_MODEL_BYTES
    ]
    for name in models:
        model = record.path / name
        try:
            load_tokenizer(model, _vocab_size(record.files.read(name, _MOST_MODEL_BYTES)))
        except UserError as error:
            # the bytes may still be right: CaseOps tokenizers are used with a separate table of bytes
            judge = note if known and known[0].startswith("CaseOps") else fails
            return judge(rule, f"{name}: {str(error).partition(': ')[2]}")
    if models:
        return passes(rule, f"{', '.join(models)}: has a space piece and 256 byte pieces")
    facts = record.claims.values.get("tokenizer")
    if isinstance(facts, dict) and "counts_bytes" in facts:
        return pass_if(facts["counts_bytes"] is True, rule, f"{facts.get('finding', '')}")
    if known:
        return passes(rule, f"{ratios(record)[0]}, as published for {known[0]}")
    return unknown(rule, "no tokenizer in the folder, and bytes per token unlike any published tokenizer")


def _published(name: str) -> float:
    tokens, size = TEXTS[name]
    return size / tokens


def _vocab_size(model: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_proto=model).vocab_size())
    except (OSError, RuntimeError):
        # return a wrong size, so that load_tokenizer raises an error that explains the problem
        return 0

"""The score: of which text, every token once, in bytes that were counted right.

val_bpb = val_loss / ln 2 · tokens / bytes, so a pair of published numbers gives away how many bytes a token was charged
with, to eight digits: enough to tell one validation text, one tokenizer and one rule of scoring from another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from train.common.errors import UserError
from train.data.tokenizer import load_tokenizer
from train.submission.record_folder import RecordFolder
from train.submission.record_scores import TEXTS, is_number, is_score
from train.submission.rules.finding import Finding, fails, pass_if, passes, unknown

# two pairs of numbers with 8 decimals agree to this
_SAME = 3e-8
# bytes of the last 64 tokens, which the older rule scores 31 times more
_TAIL_TOKENS, _TAIL_BYTES = 31 * 64, {"sp1024": 4_434, "sp4096": 4_991}


def text(record: RecordFolder) -> Finding:
    rule, limit = "the challenge's validation text", "FineWeb's first 50,000 documents"
    facts = record.submission.get("evaluation")
    if isinstance(facts, dict) and is_number(tokens := facts.get("validation_tokens")):
        names = [name for name, (known, _) in TEXTS.items() if known == tokens]
        return pass_if(rule, bool(names), f"{tokens:,} tokens: {names[0] if names else 'another text'}", limit)
    sizes = _bytes_per_token(record)
    if not sizes:
        return unknown(rule, "no val_loss beside a val_bpb", limit)
    near = {
        name for name, (tokens, size) in TEXTS.items() for value in sizes.values() if _close(value, size / tokens, 1e-4)
    }
    value = f"{next(iter(sizes.values())):.7f} bytes per token"
    if near:
        return passes(rule, f"{value}: {', '.join(sorted(near))}", limit)
    return unknown(rule, f"{value}, which is no published tokenizer's", limit)


def once(record: RecordFolder) -> Finding:
    rule = "every token scored once"
    facts = record.submission.get("evaluation")
    names = ("tokens", "validation_tokens")
    if isinstance(facts, dict) and "rule" in facts and all(is_number(facts.get(name)) for name in names):
        scored = f"{facts['tokens']:,} of {facts['validation_tokens']:,} tokens, rule {facts['rule']}"
        return pass_if(
            rule, facts["tokens"] == facts["validation_tokens"] and facts["rule"] in ("once", "flat"), scored
        )
    for log in record.logs:
        finals = {name: final for name, final in log.log["finals"].items() if name.endswith("_exact")}
        flat = next((final for name, final in finals.items() if "roundtrip" in name and is_score(final)), None)
        if flat and log.score and flat is not log.score:
            expected, found = _ratio(flat), _ratio(log.score)
            if not _close(found, expected, _SAME):
                return fails(
                    rule,
                    f"{log.path.name}: {found:.7f} bytes per token in the score, {expected:.7f} in the flat evaluation{_tail(found)}",
                )
    sizes = _bytes_per_token(record)
    for source, value in sizes.items():
        if _tail(value):
            return fails(rule, f"{source}: {value:.7f} bytes per token{_tail(value)}")
    known = [
        name for name, (tokens, size) in TEXTS.items() if all(_close(v, size / tokens, _SAME) for v in sizes.values())
    ]
    if sizes and known:
        return passes(
            rule, f"{next(iter(sizes.values())):.7f} bytes per token, as {known[0]} has when each counts once"
        )
    if any("roundtrip" in name for log in record.logs for name in log.log["finals"]) and sizes:
        return passes(rule, "bytes per token as in the flat evaluation, to 8 digits")
    return unknown(rule, "how many tokens were scored is not written down")


def tokenizer(record: RecordFolder) -> Finding:
    rule = "tokenizer counts bytes right"
    models = sorted(record.path.rglob("*.model"))
    for model in models:
        size = _pieces(model)
        try:
            load_tokenizer(model, size)
        except UserError as error:
            return fails(rule, f"{model.name}: {str(error).partition(': ')[2]}")
    if models:
        return passes(rule, f"{', '.join(model.name for model in models)}: a piece for the space, 256 byte pieces")
    facts = record.submission.get("tokenizer")
    if isinstance(facts, dict) and "counts_bytes" in facts:
        return pass_if(rule, facts["counts_bytes"] is True, f"{facts.get('finding', '')}")
    sizes = _bytes_per_token(record)
    known = [
        name for name, (tokens, size) in TEXTS.items() if any(_close(v, size / tokens, 1e-4) for v in sizes.values())
    ]
    if known:
        return passes(rule, f"{next(iter(sizes.values())):.7f} bytes per token, as published for {known[0]}")
    return unknown(rule, "no tokenizer in the folder, and bytes per token that no published one has")


def _bytes_per_token(record: RecordFolder) -> dict[str, float]:
    """Source → bytes per token, from each pair of loss and bpb."""
    pairs = {f"seed {seed}": record.result(seed) for seed in record.seeds}
    if not pairs:
        pairs = {"submission.json": record.submission}
    return {source: _ratio(pair) for source, pair in pairs.items() if is_score(pair)}


def _ratio(pair: Mapping[str, float]) -> float:
    return pair["val_loss"] / (pair["val_bpb"] * math.log(2))


def _tail(value: float) -> str:
    for name, extra in _TAIL_BYTES.items():
        tokens, size = TEXTS[name]
        if _close(value, (size + extra) / (tokens + _TAIL_TOKENS), _SAME):
            return f": {name} with its last 64 tokens scored 32 times"
    return ""


def _close(a: float, b: float, tolerance: float) -> bool:
    return math.isclose(a, b, rel_tol=tolerance)


def _pieces(model: object) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(model)).vocab_size())
    except (OSError, RuntimeError):
        # the loader names what is wrong with it
        return 0

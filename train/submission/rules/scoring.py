"""Rules on the score: the right validation text, each token scored once, bytes counted correctly.

val_bpb = val_loss / ln 2 · tokens / bytes, so val_loss and val_bpb together give the bytes per token, to eight digits.
The bytes per token identify the validation text and the tokenizer, and show whether tokens were scored more than once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from train.common.errors import UserError
from train.data.tokenizer import load_tokenizer
from train.submission.record_folder import RecordFolder
from train.submission.record_scores import TEXTS, is_number, is_score
from train.submission.rules.finding import Finding, fails, pass_if, passes, unknown

# relative error of a ratio of two numbers with 8 decimals
_SAME = 3e-8
# the bytes per token of two tokenizers differ by more than this, relatively
_SIMILAR = 1e-4
# rule `overlap_tail` scores the last 64 tokens 31 more times: the repeated tokens, and tokenizer → their bytes
_TAIL_TOKENS, _TAIL_BYTES = 31 * 64, {"sp1024": 4_434, "sp4096": 4_991}


def text(record: RecordFolder) -> Finding:
    rule, limit = "validation text", "FineWeb's first 50,000 documents"
    facts = record.submission.get("evaluation")
    if isinstance(facts, dict) and is_number(tokens := facts.get("validation_tokens")):
        names = [name for name, (known, _) in TEXTS.items() if known == tokens]
        return pass_if(bool(names), rule, f"{tokens:,} tokens: {names[0] if names else 'another text'}", limit)
    ratios = _bytes_per_token(record)
    if not ratios:
        return unknown(rule, "needs both val_loss and val_bpb", limit)
    value = _written(ratios)
    names = sorted({name for ratio in ratios.values() for name in _published(ratio, _SIMILAR)})
    if names:
        return passes(rule, f"{value}: {', '.join(names)}", limit)
    return unknown(rule, f"{value}, unlike any published tokenizer", limit)


def once(record: RecordFolder) -> Finding:
    rule = "each token scored once"
    facts = record.submission.get("evaluation")
    names = ("tokens", "validation_tokens")
    if isinstance(facts, dict) and "rule" in facts and all(is_number(facts.get(name)) for name in names):
        scored = f"{facts['tokens']:,} of {facts['validation_tokens']:,} tokens, rule {facts['rule']}"
        return pass_if(
            facts["tokens"] == facts["validation_tokens"] and facts["rule"] in ("once", "flat"), rule, scored
        )
    for log in record.logs:
        finals = {name: final for name, final in log.log["finals"].items() if name.endswith("_exact")}
        flat = next((final for name, final in finals.items() if "roundtrip" in name and is_score(final)), None)
        if flat and log.score and flat is not log.score:
            expected, found = _ratio(flat), _ratio(log.score)
            if not math.isclose(found, expected, rel_tol=_SAME):
                value = f"{found:.7f} bytes per token, {expected:.7f} with non-overlapping windows"
                return fails(rule, f"{log.path.name}: {value}{_repeated_tail(found)}")
    ratios = _bytes_per_token(record)
    for source, ratio in ratios.items():
        if tail := _repeated_tail(ratio):
            return fails(rule, f"{source}: {ratio:.7f} bytes per token{tail}")
    if ratios:
        known = set.intersection(*(_published(ratio, _SAME) for ratio in ratios.values()))
        if known:
            return passes(rule, f"{_written(ratios)}, as {min(known)} has if each token is scored once")
        if any("roundtrip" in name for log in record.logs for name in log.log["finals"]):
            return passes(rule, "bytes per token equal those with non-overlapping windows, to 8 digits")
    return unknown(rule, "the number of scored tokens is not given")


def tokenizer(record: RecordFolder) -> Finding:
    rule = "tokenizer counts bytes correctly"
    models = sorted(record.path.rglob("*.model"))
    for model in models:
        try:
            load_tokenizer(model, _vocab_size(model))
        except UserError as error:
            return fails(rule, f"{model.name}: {str(error).partition(': ')[2]}")
    if models:
        return passes(rule, f"{', '.join(model.name for model in models)}: has a space piece and 256 byte pieces")
    facts = record.submission.get("tokenizer")
    if isinstance(facts, dict) and "counts_bytes" in facts:
        return pass_if(facts["counts_bytes"] is True, rule, f"{facts.get('finding', '')}")
    ratios = _bytes_per_token(record)
    known = [name for ratio in ratios.values() for name in _published(ratio, _SIMILAR)]
    if known:
        return passes(rule, f"{_written(ratios)}, as published for {known[0]}")
    return unknown(rule, "no tokenizer in the folder, and bytes per token unlike any published tokenizer")


def _bytes_per_token(record: RecordFolder) -> dict[str, float]:
    """Compute the bytes per token of each seed (of submission.json if there is no seed) from val_loss and val_bpb."""
    pairs = {f"seed {seed}": record.result(seed) for seed in record.seeds}
    if not pairs:
        pairs = {"submission.json": record.submission}
    return {source: _ratio(pair) for source, pair in pairs.items() if is_score(pair)}


def _ratio(pair: Mapping[str, float]) -> float:
    return pair["val_loss"] / (pair["val_bpb"] * math.log(2))


def _written(ratios: Mapping[str, float]) -> str:
    return f"{next(iter(ratios.values())):.7f} bytes per token"


def _published(ratio: float, tolerance: float) -> set[str]:
    """Return the keys of `TEXTS` whose bytes per token are `ratio`, within a relative tolerance."""
    return {name for name, (tokens, size) in TEXTS.items() if math.isclose(ratio, size / tokens, rel_tol=tolerance)}


def _repeated_tail(ratio: float) -> str:
    for name, extra in _TAIL_BYTES.items():
        tokens, size = TEXTS[name]
        if math.isclose(ratio, (size + extra) / (tokens + _TAIL_TOKENS), rel_tol=_SAME):
            return f": {name} with its last 64 tokens scored 32 times"
    return ""


def _vocab_size(model: object) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(model)).vocab_size())
    except (OSError, RuntimeError):
        # load_tokenizer will raise an error that says what is wrong
        return 0

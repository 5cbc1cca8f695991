"""Rule: a record of the 10-minute track is trained on 8 H100 SXM."""

from __future__ import annotations

import re

from train.submission.record_folder import RecordFolder
from train.submission.record_logs import LogFile
from train.submission.rules.finding import Finding, pass_if, passes, unknown

_LIMIT = "trained on 8 × H100 SXM"
_KEYS = ("hardware", "gpu", "gpus", "platform", "accelerator", "device")
_MODEL = r"(?:NVIDIA\s+)?(?:GeForce\s+)?((?:[HABLV]\d{2,3}|GB\d{3}|MI\d{3}|RTX[ -]?(?:PRO|A)?[ -]?\d{4}|[345]090)\w*(?:[ -](?:SXM\d?|PCIe|NVL))?)"
_OTHER = re.compile(r"\b(?:cpus?|cores?|laptop|apple|mps|tpu|epyc|xeon)\b", re.IGNORECASE)
_COUNTED = re.compile(rf"(?<![\w.])(\d{{1,2}})\s{{0,2}}(?:[x×*]|GPUs?:?)?\s{{0,2}}{_MODEL}\b", re.IGNORECASE)
_BEHIND = re.compile(rf"\b{_MODEL}\s{{0,2}}[x×*]\s{{0,2}}(\d{{1,2}})\b", re.IGNORECASE)
_ALONE = re.compile(rf"\b{_MODEL}\b", re.IGNORECASE)


def hardware(record: RecordFolder) -> Finding:
    """Check the GPUs, as named in nvidia-smi's table in the logs, else in submission.json, else in README."""
    rule = "hardware"
    known = [_of_log(result.log) for result in record.results if result.log and result.log.log["gpus"]]
    if known:
        bad = next((found for found in known if not _good(*found[:2])), known[0])
        number, model, source = bad
        text = f"{number} × {model} ({source})" if number else f"{model} ({source})"
        return _verdict(record, rule, text, number, model)
    stated = record.claims.string(*_KEYS)
    facts = [result.log.log["facts"] for result in record.results if result.log]
    worlds = [int(found["world_size"]) for found in facts if "world_size" in found]
    if stated:
        number, model = _named(stated)
        return _verdict(record, rule, f"{stated[:100]} (submission.json)", min(worlds, default=number), model)
    named = {(int(found[1]), found[2]) for found in _COUNTED.finditer(record.readme)}
    alone = {found[1] for found in _ALONE.finditer(record.readme)} | {model for _, model in named}
    if not alone:
        return unknown(rule, "not named in a log, submission.json or README.md", _LIMIT)
    if len({_key(model) for model in alone}) > 1 or len({number for number, _ in named}) > 1:
        shown = [f"{number} × {model}" for number, model in sorted(named)] or sorted(alone)
        return unknown(rule, f"README.md names {', '.join(shown[:4])}", _LIMIT)
    number, model = next(iter(named), (0, next(iter(alone))))
    return _verdict(
        record, rule, f"{number} × {model} (README.md)" if number else f"{model} (README.md)", number, model
    )


def _of_log(log: LogFile) -> tuple[int, str, str]:
    gpus = log.log["gpus"]
    # take the world size if it is logged, because the machine may have more GPUs than the run used
    return int(log.log["facts"].get("world_size", len(gpus))), gpus[0] if gpus else "", f"nvidia-smi in {log.name}"


def _named(text: str) -> tuple[int, str]:
    if found := _COUNTED.search(text):
        return int(found[1]), found[2]
    if found := _BEHIND.search(text):
        return int(found[2]), found[1]
    found = _ALONE.search(text)
    return 0, found[1] if found else ""


def _key(model: str) -> str:
    return re.sub(r"[ -]?(sxm\d?|geforce|nvidia)", "", model.lower())


def _good(number: int, model: str) -> bool:
    lowered = model.lower()
    return number in (0, 8) and "h100" in lowered and not re.search("pcie|nvl", lowered)


def _verdict(record: RecordFolder, rule: str, text: str, number: int, model: str) -> Finding:
    if record.non_record:
        return passes(rule, f"{text}; the non-record track allows any")
    if not model and not _OTHER.search(text):
        return unknown(rule, text, _LIMIT)
    if number == 0 and _good(number, model):
        return unknown(rule, f"{text}: their number is not stated", _LIMIT)
    return pass_if(_good(number, model), rule, text, _LIMIT)

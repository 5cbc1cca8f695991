"""The grammar of Parameter Golf's logs: a table with one row per kind of line, and a parser of whole logs."""

from __future__ import annotations

import os
import re
from typing import Any, TypedDict

from train.common.errors import UserError
from train.common.files import read_file

# limit the digits, because logs of other programs may have numbers of thousands of digits
_INT, _NUMBER = r"\d{1,18}", r"(?:\d{1,18}(?:\.\d{1,18})?(?:e[+-]?\d{1,3})?|nan|inf)"
_STEP = rf"(?P<step>{_INT})/(?P<total>{_INT})\b"
_LOSS, _BPB = rf"val_loss:(?P<val_loss>{_NUMBER})", rf"val_bpb:(?P<val_bpb>{_NUMBER})"
_TIME = rf"{_NUMBER}(?:ms|s|min|m|h)"
_CLOCK = rf"(?:.*?\btrain_time:(?P<train_time>{_TIME})\b)?(?:.*?\bstep_avg:(?P<step_avg_ms>{_NUMBER})ms\b)?"
# how the weights are packed, such as int6+brotli or w6e16+zstd22
_FORM = r"(?P<form>\w+\+[^\s:]+)"

# kind of line → pattern. In a pattern, a blank matches blanks, commas and bars. A colon before a group matches `:` or
# `=` with blanks around it. A line is read by the first row whose pattern matches the line's start. To read another
# kind of line, add a row, or extend a pattern.
_TABLE = {
    "train_step": rf"(?:step:?\s*)?{_STEP} (?:train_)?loss:(?P<train_loss>{_NUMBER}){_CLOCK}",
    "val_step": rf"(?:step:?\s*)?{_STEP} {_LOSS} {_BPB}{_CLOCK}",
    "warmup_step": rf"warmup_step:{_STEP}",
    "stopping_early": rf"stopping_early:\s*\w+ train_time:(?P<train_time>{_TIME}) step:{_STEP}",
    "peak_memory": rf"peak memory allocated:(?P<allocated_mib>{_INT}) MiB reserved:(?P<reserved_mib>{_INT}) MiB\b",
    "size_raw": rf"Serialized model:(?P<bytes>{_INT}) bytes\b",
    "size_model": rf"Serialized model {_FORM}[^:]*:(?P<bytes>{_INT}) bytes\b",
    "size_total": rf"Total submission size {_FORM}[^:]*:(?P<bytes>{_INT}) bytes\b",
    "size_code_uncompressed": rf"Code size \(uncompressed\):(?P<bytes>{_INT}) bytes\b",
    "size_code_compressed": rf"Code size \(compressed\):(?P<bytes>{_INT}) bytes\b",
    "size_code": rf"Code size[^:]*:(?P<bytes>{_INT}) bytes\b",
    "total_eval": rf"total_eval_time:(?P<total_eval_time>{_TIME})\b",
    # a limit that the script states in its log: `clock: 1121.067s (must be < 600.0)`
    "limit": rf"(?P<what>\w+):(?P<value>{_NUMBER})s? \(must be <=?\s*(?P<limit>{_NUMBER})",
    # seconds that GPTQ's Hessians took on training data, after the last step
    "calibration": rf"(?:gptq|GPTQ):\s*(?:loop-aware )?(?:calibrated|collected)\b.*\bin (?P<calibration_s>{_NUMBER})s\b",
    # seconds that the choice of row clips took to compute losses on training data, after calibration
    "fitting": rf"fit:measured on \d+ training tokens in (?P<fitting_s>{_NUMBER})s\b",
    "train_loader": rf"train_loader:dataset:(?P<dataset>\S+) train_shards:(?P<train_shards>{_INT})\b",
    "model_params": rf"model_params:(?P<model_params>{_INT})\b",
    "world_size": rf"world_size:(?P<world_size>{_INT})\b(?: grad_accum_steps:(?P<grad_accum_steps>{_INT})\b)?",
    "seed": rf"seed:(?P<seed>{_INT})\b",
    # a final score, which may have any name; a line about progress, such as `batch 5/782`, does not match
    "final": rf"(?:final_)?(?P<name>[A-Za-z](?:[\w\s.:()+-]{{0,60}}?[\w)])?):?\s+(?:\w+:[^\s/,|]+ )*?(?:{_LOSS} )?{_BPB}\b"
    rf"(?:(?=.*\bstride:(?P<stride>{_INT}))|)(?:(?=.*\b(?:eval_time|elapsed|time):(?P<eval_time>{_TIME})\b)|).*",
    # one line of the indented block of hyperparameters
    "setting": r"(?<=\s)(?P<key>[a-z_]\w*):(?P<text>\S.*)",
}


def _compiled(form: str) -> re.Pattern[str]:
    return re.compile(r"\s*" + form.replace(" ", r"[\s,|]+").replace(":(?P<", r"\s*[:=]\s*(?P<"))


# compiled patterns, to be matched at the start of a line
GRAMMAR: dict[str, re.Pattern[str]] = {kind: _compiled(form) for kind, form in _TABLE.items()}

# prefix that other programs put before each line: a Unix time stamp, a date and time, or a rank
_PREFIX = re.compile(
    r"^\[?(?:\d{10}(?:\.\d+)?|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?Z?|rank ?\d+)\]?:?(?:[ \t]|$)", re.MULTILINE
)
# longer lines are not parsed: a result is shorter
_LONGEST_LINE = 1000
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# a row of the table that nvidia-smi prints
_GPU = re.compile(r"^\|[ ]+\d+[ ]+([A-Z][\w .-]{2,40}?)[ ]+(?:On|Off|N/A)[ ]*\|", re.MULTILINE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_TIMES = frozenset({"train_time", "eval_time", "total_eval_time"})
_WHOLE = frozenset(
    "step total stride allocated_mib reserved_mib bytes train_shards model_params world_size grad_accum_steps seed".split()
)
_TEXT = frozenset({"name", "form", "dataset", "what", "key", "text"})


Numbers = dict[str, float]
"""The numbers of a line: group name in the line's pattern of `GRAMMAR` → number. Times are in ms.

If a time is given in another unit, `<name>_error_ms` is its largest rounding error.
"""


class Log(TypedDict):
    """The contents of a log. A field without a line in the log is None or empty."""

    steps: dict[int, Numbers]  # step → its training line
    vals: dict[int, Numbers]  # step → its validation line
    finals: dict[str, Numbers]  # name without `final_`, such as `int6_roundtrip_exact` → score
    final_lines: dict[str, int]  # the same names → number of the line in the file
    sizes: dict[str, int]  # bytes of `raw`, `code`, `code_compressed`, `code_uncompressed`, `model`, `total`
    form: str | None  # such as `int6+brotli`
    facts: dict[str, Any]  # values of the key:value lines
    settings: dict[str, str]  # the block of hyper-parameters
    limits: dict[str, tuple[float, float]]  # name of a limit that the script states → value, limit
    gpus: list[str]  # names in nvidia-smi's table
    lines: list[str]  # all lines after the header
    warmup_steps: int
    stopping_early: Numbers | None
    peak_memory: Numbers | None


def parse_log(path: str | os.PathLike[str]) -> Log:
    """Parse a log of this or another program in the published grammar. A missing file raises a UserError."""
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such log") from error
    return parse_log_bytes(data)


def parse_log_bytes(data: bytes) -> Log:
    """Parse the bytes of a log. Bytes in no known format are ignored."""
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")
    text = _PREFIX.sub("", _ESCAPES.sub("", text) if "\x1b" in text else text)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    versions, begin = _header(lines)
    found = Log(
        steps={}, vals={}, finals={}, final_lines={}, sizes={}, form=None, facts={}, settings={}, limits={},
        gpus=_GPU.findall("\n".join(lines[versions:])), lines=lines[begin:], warmup_steps=0, stopping_early=None,
        peak_memory=None,
    )  # fmt: skip
    # the block of hyperparameters may come before the versions
    for line in _hyperparameters(lines[:begin]):
        _read(found, line, 0)
    for number, line in enumerate(found["lines"], begin + 1):
        if (":" in line or "=" in line) and len(line) <= _LONGEST_LINE:
            _read(found, line, number)
    return found


def _read(found: Log, line: str, number: int) -> None:
    for kind, pattern in GRAMMAR.items():
        match = pattern.match(line)
        if match:
            values: dict[str, Any] = {}
            for name, text in match.groupdict().items():
                if text:
                    values |= _values(name, text)
            _store(found, kind, values, number)
            break


def _store(found: Log, kind: str, values: dict[str, Any], number: int) -> None:
    match kind:
        case "train_step":
            found["steps"][values["step"]] = values
        case "val_step":
            found["vals"][values["step"]] = values
        case "final":
            name = " ".join(values.pop("name").split())
            found["finals"][name] = values
            found["final_lines"][name] = number
        case "warmup_step":
            found["warmup_steps"] = values["step"]
        case "stopping_early":
            found["stopping_early"] = values
        case "peak_memory":
            found["peak_memory"] = values
        case "limit":
            found["limits"][values["what"]] = values["value"], values["limit"]
        case "setting":
            found["settings"][values["key"]] = values["text"].strip()
        case "size_raw" | "size_model" | "size_total" | "size_code" | "size_code_uncompressed" | "size_code_compressed":
            found["sizes"][kind.removeprefix("size_")] = values["bytes"]
            found["form"] = values.get("form", found["form"])
        case "fitting":
            found["facts"]["calibration_s"] = found["facts"].get("calibration_s", 0.0) + values["fitting_s"]
        case _:
            found["facts"] |= values


def _header(lines: list[str]) -> tuple[int, int]:
    """Return the index of the line with the versions, and the index of the first line after the header.

    The header contains source code, which may have lines that look like results. The header ends with the separator
    after the versions. If source code follows the separator, the header ends after that code. If the file holds several
    runs, only the last run counts.
    """
    heads = [number for number, line in enumerate(lines) if line.startswith("Running Python ")]
    versions = heads[-1] if heads else 0
    begin = 0
    if heads:
        begin = next((n + 1 for n in range(versions, len(lines)) if _is_separator(lines[n])), 0)
    mains = [number for number in range(begin, len(lines)) if lines[number].startswith("if __name__ ==")]
    if mains:
        begin = mains[-1] + 1
        while begin < len(lines) and lines[begin][:1].isspace():
            begin += 1
    return versions, begin


def _is_separator(line: str) -> bool:
    return len(line) >= 20 and not line.rstrip().strip("=")


def _hyperparameters(lines: list[str]) -> list[str]:
    titles = [number for number, line in enumerate(lines) if re.fullmatch(r"hyper-?parameters:?\s*", line, re.I)]
    begin = titles[-1] + 1 if titles else len(lines)
    end = begin
    while end < len(lines) and lines[end][:1].isspace():
        end += 1
    return lines[begin:end]


def _values(name: str, text: str) -> dict[str, Any]:
    if name in _TEXT:
        return {name: text}
    if name in _WHOLE:
        return {name: int(text)}
    if name not in _TIMES:
        return {name: float(text)}
    number = text.rstrip("minsh") if text[0].isdigit() else text[:3]
    scale = 1000 * _SECONDS[text[len(number) :]]
    value = {f"{name}_ms": float(number) * scale if scale != 1 else float(number)}
    decimals = len(number.partition(".")[2])
    return value if scale == 1 else value | {f"{name}_error_ms": 0.5 * scale * 10.0**-decimals}

"""The grammar of Parameter Golf's logs: a regular expression per kind of line, and a parser of whole logs."""

from __future__ import annotations

import os
import re
from typing import Any, TypedDict

from train.common.errors import UserError
from train.common.files import read_file
from train.common.wording import SEPARATOR

_NUMBER = r"(?:\d+(?:\.\d+)?|nan|inf)"
_RESULT = rf"val_loss:(?P<val_loss>{_NUMBER}) val_bpb:(?P<val_bpb>{_NUMBER})"
# how the weights are packed, such as int6+brotli or w6e16+zstd22
_FORM = r"(?P<form>[a-z]\w*\+\S+)"
_CLOCK = rf"train_time:(?P<train_time_ms>{_NUMBER})ms"

# patterns match from the start of a line
GRAMMAR: dict[str, re.Pattern[str]] = {
    "train_step": re.compile(
        rf"step:(?P<step>\d+)/(?P<total>\d+) train_loss:(?P<train_loss>{_NUMBER}) {_CLOCK}"
        rf" step_avg:(?P<step_avg_ms>{_NUMBER})ms\b"
    ),
    "val_step": re.compile(
        rf"step:(?P<step>\d+)/(?P<total>\d+) {_RESULT} {_CLOCK} step_avg:(?P<step_avg_ms>{_NUMBER})ms\b"
    ),
    "warmup_step": re.compile(r"warmup_step:(?P<step>\d+)/(?P<total>\d+)\b"),
    "stopping_early": re.compile(rf"stopping_early: wallclock_cap {_CLOCK} step:(?P<step>\d+)/(?P<total>\d+)\b"),
    "peak_memory": re.compile(
        r"peak memory allocated: (?P<allocated_mib>\d+) MiB reserved: (?P<reserved_mib>\d+) MiB\b"
    ),
    "size_raw": re.compile(r"Serialized model: (?P<bytes>\d+) bytes\b"),
    "size_code": re.compile(r"Code size: (?P<bytes>\d+) bytes\b"),
    "size_model": re.compile(rf"Serialized model {_FORM}: (?P<bytes>\d+) bytes\b"),
    "size_total": re.compile(rf"Total submission size {_FORM}: (?P<bytes>\d+) bytes\b"),
    "final": re.compile(
        rf"final_(?P<name>\w+?) (?:stride:\d+ )?{_RESULT}(?: stride:(?P<stride>\d+))?(?: eval_time:(?P<eval_time_ms>{_NUMBER})ms)?"
    ),
    # seconds for GPTQ's Hessians on training data, after the last step
    "calibration": re.compile(
        rf"(?i:gptq):\S*(?:loop-aware )?(?:calibrated|collected)\b.* in (?P<calibration_s>{_NUMBER})s\b"
    ),
    # seconds for losses on training data that choose the row clips, after calibration
    "fitting": re.compile(rf"fit:measured on \d+ training tokens in (?P<fitting_s>{_NUMBER})s\b"),
    "train_loader": re.compile(r"train_loader:dataset:(?P<dataset>\S+) train_shards:(?P<train_shards>\d+)\b"),
    "model_params": re.compile(r"model_params:(?P<model_params>\d+)\b"),
    "world_size": re.compile(r"world_size:(?P<world_size>\d+) grad_accum_steps:(?P<grad_accum_steps>\d+)\b"),
    "seed": re.compile(r"seed:(?P<seed>\d+)\b"),
}

_WHOLE = frozenset(
    "step total stride allocated_mib reserved_mib bytes train_shards model_params world_size grad_accum_steps seed".split()
)
_TEXT = frozenset({"name", "form", "dataset"})


Numbers = dict[str, float]
"""The numbers of a line: group name in the line's pattern of `GRAMMAR` → number."""


class Log(TypedDict):
    """The contents of a log. A field is None if the log has no line for it."""

    steps: dict[int, Numbers]  # step → its training line
    vals: dict[int, Numbers]  # step → its validation line
    finals: dict[str, Numbers]  # name, such as `int6_roundtrip_exact` → final score
    sizes: dict[str, int]  # bytes of `raw`, `code`, `model`, `total`
    form: str | None  # such as `int6+brotli`
    facts: dict[str, Any]  # values of the key:value lines
    lines: list[str]  # all lines after the header
    warmup_steps: int
    stopping_early: Numbers | None
    peak_memory: Numbers | None


def parse_log(path: str | os.PathLike[str]) -> Log:
    """Parse a log in the published grammar, from this or another program. A missing file raises a UserError."""
    try:
        lines = read_file(path).decode(errors="replace").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such log") from error
    lines = lines[_header_length(lines) :]
    found = Log(
        steps={}, vals={}, finals={}, sizes={}, form=None, facts={}, lines=lines,
        warmup_steps=0, stopping_early=None, peak_memory=None,
    )  # fmt: skip
    for line in lines:
        for kind, pattern in GRAMMAR.items():
            match = pattern.match(line)
            if match:
                _store(found, kind, {name: _number(name, text) for name, text in match.groupdict().items() if text})
                break
    return found


def _store(found: Log, kind: str, values: dict[str, Any]) -> None:
    match kind:
        case "train_step":
            found["steps"][values["step"]] = values
        case "val_step":
            found["vals"][values["step"]] = values
        case "final":
            found["finals"][values.pop("name")] = values
        case "warmup_step":
            found["warmup_steps"] = values["step"]
        case "stopping_early":
            found["stopping_early"] = values
        case "peak_memory":
            found["peak_memory"] = values
        case "size_raw" | "size_code" | "size_model" | "size_total":
            found["sizes"][kind.removeprefix("size_")] = values["bytes"]
            found["form"] = values.get("form", found["form"])
        case "fitting":
            found["facts"]["calibration_s"] = found["facts"].get("calibration_s", 0.0) + values["fitting_s"]
        case _:
            found["facts"] |= values


def _header_length(lines: list[str]) -> int:
    # the source code in the header may contain lines that look like results, so parsing starts after the separator that
    # follows the versions; if the file holds several runs, the last one counts
    heads = [number for number, line in enumerate(lines) if line.startswith("Running Python ")]
    versions = heads[-1] if heads else None
    if versions is None or SEPARATOR not in lines[versions:]:
        return 0
    return lines.index(SEPARATOR, versions) + 1


def _number(name: str, text: str) -> int | float | str:
    if name in _TEXT:
        return text
    return int(text) if name in _WHOLE else float(text)

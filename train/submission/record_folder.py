"""Reads a record folder that this or another program made: README.md, submission.json, logs and script."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.run.log_grammar import Log, Numbers, parse_log
from train.submission.record_scores import exact_score, is_number


@dataclass(frozen=True)
class LogFile:
    """One training log.

    Attributes:
        path: the file.
        seed: the seed that the log states, or else the file name; "" if neither states one.
        log: the parsed log.
    """

    path: Path
    seed: str
    log: Log

    @property
    def score(self) -> Numbers | None:
        return exact_score(self.log)

    @property
    def last_step(self) -> Numbers | None:
        """The numbers of the last step's log line, such as step and train_time_ms; None if there is no such line."""
        lines = {**self.log["steps"], **self.log["vals"]}
        return lines[max(lines)] if lines else None


@dataclass(frozen=True)
class RecordFolder:
    """The contents of a record folder.

    Attributes:
        path: the folder.
        readme: the text of README.md; "" if it is missing.
        submission: the contents of submission.json; empty if it is missing or invalid.
        problem: why submission.json is invalid; "" if it is valid or missing.
        logs: the files in Parameter Golf's log format, sorted by path.
    """

    path: Path
    readme: str
    submission: dict[str, Any]
    problem: str
    logs: tuple[LogFile, ...]

    @cached_property
    def seed_results(self) -> dict[str, Numbers]:
        """Seed → its numbers in `seed_results` of submission.json; empty if that key is missing or invalid."""
        results = self.submission.get("seed_results")
        if not isinstance(results, dict):
            return {}
        return {
            str(seed): {name: value for name, value in scores.items() if is_number(value)}
            for seed, scores in results.items()
            if isinstance(scores, dict)
        }

    @cached_property
    def script(self) -> Path | None:
        """train_gpt.py, or else the only Python file at the top of the folder; None if there is no such file."""
        scripts = sorted(self.path.glob("*.py"))
        named = [path for path in scripts if path.name == "train_gpt.py"]
        return named[0] if named else scripts[0] if len(scripts) == 1 else None

    @cached_property
    def package(self) -> tuple[Path, ...]:
        """Python files in subfolders, which are shipped with the script."""
        return tuple(sorted(path for path in self.path.rglob("*.py") if path.parent != self.path))

    @cached_property
    def seeds(self) -> tuple[str, ...]:
        """The seeds with numbers in submission.json or a final score in a log."""
        logged = {log.seed for log in self.logs if log.seed and log.score}
        return tuple(sorted(set(self.seed_results) | logged, key=lambda seed: (len(seed), seed)))

    @cached_property
    def texts(self) -> dict[str, str]:
        """File name → text of README, submission.json and the logs. The source code in a log's header is left out."""
        parts = {"README.md": self.readme, "submission.json": json.dumps(self.submission, indent=0, ensure_ascii=False)}
        return parts | {log.path.name: "\n".join(log.log["lines"]) for log in self.logs}

    def find(self, pattern: str) -> list[tuple[str, str]]:
        """Return (file name, line) for each line of `texts` that matches `pattern`, ignoring case."""
        found = re.compile(pattern, re.IGNORECASE)
        return [
            (name, line.strip()) for name, text in self.texts.items() for line in text.split("\n") if found.search(line)
        ]

    def number(self, *names: str) -> float | None:
        """Return the first of these fields of submission.json that is a number, or None if none is."""
        return next((value for name in names if is_number(value := self.submission.get(name))), None)

    def result(self, seed: str) -> Numbers:
        """Return a seed's numbers, such as val_bpb and steps. Its log takes precedence over submission.json."""
        values = dict(self.seed_results.get(seed, {}))
        for log in self.logs:
            if log.seed == seed:
                values |= logged_numbers(log)
        return values


def logged_numbers(log: LogFile) -> Numbers:
    """Return the numbers of a log, under their names in `seed_results` of submission.json."""
    values: Numbers = {}
    if log.score:
        values |= {name: log.score[name] for name in ("val_loss", "val_bpb")}
        seconds = [final["eval_time_ms"] / 1000 for final in log.log["finals"].values() if "eval_time_ms" in final]
        values |= {"eval_time_s": seconds[-1]} if seconds else {}
    if log.last_step:
        last = log.last_step
        values |= {"steps": last["step"], "step_avg_ms": last["step_avg_ms"]}
        values["train_time_s"] = last["train_time_ms"] / 1000
    sizes = log.log["sizes"]
    names = {"total": "artifact_bytes", "model": "bytes_model", "code": "bytes_code"}
    values |= {name: sizes[size] for size, name in names.items() if size in sizes}
    return {name: value for name, value in values.items() if is_number(value)}


def read_record_folder(path: Path) -> RecordFolder:
    """Read a record folder.

    Raises:
        UserError: the folder does not exist, or contains no README.md, no submission.json and no log.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give a record folder, with README.md, submission.json and logs")
    readme = path / "README.md"
    submission, problem = _read_submission(path / "submission.json")
    logs = []
    for file in sorted([*path.glob("*.log"), *path.glob("*.txt"), *path.glob("logs/*")]):
        log = parse_log(file) if file.is_file() else None
        if log and (log["steps"] or log["vals"] or log["finals"]):
            digits = re.search(r"(?:seed|_s)_?(\d+)", file.stem)
            logs.append(LogFile(file, str(log["facts"].get("seed", digits[1] if digits else "")), log))
    if not (readme.is_file() or submission or problem or logs):
        raise UserError(f"{path}: not a record folder: no README.md, no submission.json and no log")
    text = readme.read_text(errors="replace") if readme.is_file() else ""
    return RecordFolder(path, text, submission, problem, tuple(logs))


def _read_submission(path: Path) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        return {}, ""
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        return {}, f"not valid JSON ({error})"
    return (values, "") if isinstance(values, dict) else ({}, "not a JSON object")

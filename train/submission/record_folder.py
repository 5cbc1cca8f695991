"""Reads README.md, submission.json, logs and script of a record folder, which this or another program made."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from train.common.errors import UserError
from train.run.log_grammar import Numbers, parse_log_bytes
from train.submission.claims import Claims
from train.submission.digits import agree, is_number
from train.submission.foreign_files import (
    MOST_SOURCE_BYTES,
    MOST_TEXT_BYTES,
    Listing,
    list_files,
    read_object,
    source_text,
)
from train.submission.record_logs import LOG_DIGITS, Clock, Evaluation, LogFile, logged_numbers

_LOG_ENDINGS = (".log", ".txt", ".out")
_MOST_LOGS = 60
# names of text files that are not logs
_NO_LOGS = re.compile(r"requirements|license|notice|readme|manifest|vocab|prompt", re.IGNORECASE)
_SOURCES = (".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".sh", ".rs", ".go")


@dataclass(frozen=True)
class SeedResult:
    """The numbers of one seed, from submission.json and from one log.

    Attributes:
        seed: the seed, or the log's name if neither submission.json nor the log states a seed.
        claimed: the seed's numbers in submission.json.
        log: the one log from which the seed's numbers are read; None: no log of this seed.
        evaluation: the evaluation in `log` with the claimed score; None: no evaluation has this score.
    """

    seed: str
    claimed: Numbers
    log: LogFile | None
    evaluation: Evaluation | None

    @cached_property
    def numbers(self) -> Numbers:
        """The seed's numbers. A number in the log replaces the number in submission.json."""
        return self.claimed | (logged_numbers(self.log, self.evaluation) if self.log else {})

    @property
    def clock(self) -> Clock | None:
        """The training time, from the log, or else from submission.json."""
        if self.log and self.log.clock:
            return self.log.clock
        steps, average = self.claimed.get("steps", 0), self.claimed.get("step_avg_ms", 0.0)
        seconds = self.claimed.get("train_time_s")
        if seconds is not None:
            return Clock(seconds, (average or 1000 * seconds / steps if steps else average) / 1000, int(steps))
        if not (steps and average):
            return None
        error = 0.5 * 10.0 ** -len(str(average).partition(".")[2])
        return Clock(steps * average / 1000, average / 1000, int(steps), steps * error / 1000)


@dataclass(frozen=True)
class RecordFolder:
    """The contents of a record folder.

    Attributes:
        path: the record folder, or the path of a submission.json alone.
        files: the regular files in the folder.
        readme: the text of README.md; "" if it is missing.
        claims: the contents of submission.json.
        logs: the files in Parameter Golf's log format, without copies.
        copies: one sentence per copied log, which names the copy and the original.
        unread: names of logs in an unknown format.
    """

    path: Path
    files: Listing
    readme: str
    claims: Claims
    logs: tuple[LogFile, ...]
    copies: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def non_record(self) -> bool:
        """Whether the record is in the non-record track, which limits neither time nor hardware."""
        parts = [part for part in self.path.resolve().parts[-3:] if part.startswith("track")]
        track = self.claims.string("track") or " ".join(parts)
        return bool(re.search(r"non.?record|unlimited", track, re.IGNORECASE))

    @cached_property
    def script(self) -> str:
        """Name of the training script: train_gpt.py, or else the largest Python file at the top of the folder.

        Files whose names begin with "train" come before other files. "" if there is no Python file.
        """
        top = [name for name in self.files.sizes if "/" not in name and name.endswith(".py")]
        named = [name for name in top if name.startswith("train")] or top
        return "train_gpt.py" if "train_gpt.py" in top else max(named, key=self.files.sizes.__getitem__, default="")

    @cached_property
    def sources(self) -> dict[str, str]:
        """File name → unpacked text of the script and the source files that it uses.

        A source file is used if the text of a used file contains its name, or if it is in a subfolder.
        """
        found: dict[str, str] = {}
        others = [name for name in self.files.sizes if name.endswith(_SOURCES)]
        waiting = [self.script] if self.script else []
        while waiting and sum(map(len, found.values())) < MOST_SOURCE_BYTES:
            name = waiting.pop()
            found[name] = source_text(self.files.read(name, MOST_SOURCE_BYTES))
            words = set(re.findall(r"\w+", found[name]))
            waiting += [
                other
                for other in others
                if other not in found and other not in waiting and ("/" in other or PurePosixPath(other).stem in words)
            ]
        return found

    @cached_property
    def score_name(self) -> str:
        """Name of the evaluation whose mean over the logs is the headline of submission.json; "" if there is none."""
        logs = [log for log in self.logs if log.evaluations]
        if self.claims.val_bpb is None or not logs:
            return ""
        for name in reversed([one.name for one in logs[-1].evaluations]):
            found = [log.find(None, name) for log in logs]
            scores = [one.val_bpb for one in found if one]
            if len(scores) == len(logs) and agree(self.claims.val_bpb, statistics.fmean(scores), digits=LOG_DIGITS):
                return name
        return ""

    @cached_property
    def results(self) -> tuple[SeedResult, ...]:
        """One result per seed. If submission.json names seeds, logs of other seeds are left out."""
        claimed, by_seed = self.claims.seeds, self._logs_by_seed
        wanted = list(dict.fromkeys([*self.claims.seed_names, *claimed])) or self._counted_seeds
        return tuple(self._result(seed, claimed.get(seed, {}), by_seed.get(seed, [])) for seed in wanted)

    @cached_property
    def other_logs(self) -> tuple[str, ...]:
        """Names of the logs that no result uses: logs of other seeds, and further logs of a seed."""
        counted = {result.log.name for result in self.results if result.log}
        return tuple(log.name for log in self.logs if log.name not in counted)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Seed → score. Seeds without a known score are left out."""
        return {one.seed: one.numbers["val_bpb"] for one in self.results if "val_bpb" in one.numbers}

    @cached_property
    def val_bpb(self) -> float | None:
        """The score of the record in submission.json, or else the mean of the seeds' scores; None: not known."""
        if self.claims.val_bpb is not None:
            return self.claims.val_bpb
        return statistics.fmean(self.scores.values()) if self.scores else None

    @cached_property
    def texts(self) -> dict[str, str]:
        """File name → text of README.md, submission.json and the logs. Source code in a log's header is left out."""
        parts = {"README.md": self.readme, "submission.json": self.claims.text}
        return parts | {log.name: "\n".join(log.log["lines"]) for log in self.logs}

    def find(self, pattern: str, *, logs: bool = True) -> list[tuple[str, str]]:
        """Search `texts` for `pattern`, written in lower case. Return (file name, excerpt of the line) per match."""
        form, found = re.compile(pattern), []
        for name, text in self.texts.items():
            if not logs and name not in ("README.md", "submission.json"):
                continue
            lowered = text.lower()
            # limit the matches and excerpts, because a file may have any number of matches and lines of any length
            for match in itertools.islice(form.finditer(lowered), 100):
                before = lowered[max(match.start() - 200, 0) : match.start()].rpartition("\n")[2]
                after = lowered[match.end() : match.end() + 200].partition("\n")[0]
                found.append((name, text[match.start() - len(before) : match.end() + len(after)].strip()))
        return list(dict.fromkeys(found))

    @cached_property
    def _logs_by_seed(self) -> dict[str, list[LogFile]]:
        found: dict[str, list[LogFile]] = {}
        claims = {seed: numbers.get("val_bpb") for seed, numbers in self.claims.seeds.items()}
        for log in self.logs:
            alike = [seed for seed, score in claims.items() if score is not None and log.find(score)]
            # without a stated seed, the log belongs to the seed whose score it contains, or else to the only seed
            only = self.claims.seed_names[0] if len(self.claims.seed_names) == 1 else log.name
            # some logs state the script's default seed; then the seed in the file's name counts, if the record has it
            named = next(
                (seed for seed in (log.seed, log.named_seed) if seed in claims or seed in self.claims.seed_names), ""
            )
            seed = named or log.seed or log.named_seed
            found.setdefault(seed or (alike[0] if len(alike) == 1 else only), []).append(log)
        return found

    @property
    def _counted_seeds(self) -> list[str]:
        """The seeds of the logs with a score or training time.

        If the headline is no mean over the logs, return only the seeds of the logs that contain the headline, if any.
        """
        scored = {
            seed: logs for seed, logs in self._logs_by_seed.items() if any(log.evaluations or log.clock for log in logs)
        }
        if self.claims.val_bpb is not None and not self.score_name:
            having = [seed for seed, logs in scored.items() if any(log.find(self.claims.val_bpb) for log in logs)]
            if having:
                return having
        return sorted(scored, key=lambda seed: (len(seed), seed))

    def _result(self, seed: str, claimed: Numbers, logs: list[LogFile]) -> SeedResult:
        claim = claimed.get("val_bpb")
        # if a seed has several logs, use the last log with the claimed score, or else the last log with a score
        wanted: list[tuple[float | None, str]] = [(claim, "")]
        if claim is None:
            wanted = [(None, self.score_name)] if self.score_name else [(self.claims.val_bpb, ""), (None, "")]
        for score, name in wanted:
            for log in reversed(logs):
                if evaluation := log.find(score, name):
                    return SeedResult(seed, claimed, log, evaluation)
        return SeedResult(seed, claimed, logs[-1] if logs else None, None)


def is_run(path: Path) -> bool:
    """Whether `python -m train` made this folder for a run."""
    return (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()


def is_record(path: Path) -> bool:
    """Whether a folder looks like a record: it has a submission.json or logs, and is not a run folder."""
    if not path.is_dir() or is_run(path):
        return False
    names = [entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
    return "submission.json" in names or any(
        name.endswith(".log") or ("README.md" in names and name.endswith(".txt") and "train" in name) for name in names
    )


def found_folders(path: Path, wanted: Callable[[Path], bool], levels: int = 3) -> list[Path]:
    """Return `[path]` if `wanted` accepts it, else the accepted folders inside, sorted.

    The search goes `levels` folders deep. It skips links and hidden folders.
    """
    if wanted(path):
        return [path]
    if not levels or not path.is_dir():
        return []
    inside = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    )
    return [found for name in inside for found in found_folders(path / name, wanted, levels - 1)]


def read_record_folder(path: Path) -> RecordFolder:
    """Read a record folder, or a submission.json alone.

    Raises:
        UserError: there is no such folder, or it contains no README.md, no submission.json and no log.
    """
    if path.is_file():
        files = Listing(path.parent, {path.name: path.stat().st_size})
        return RecordFolder(path, files, "", _claims(files, path.name), ())
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give a record folder, with README.md, submission.json and logs")
    files = list_files(path)
    claims = _claims(files, "submission.json")
    logs, copies, unread = _read_logs(files)
    if not ("README.md" in files.sizes or claims.text or logs):
        raise UserError(f"{path}: not a record folder: no README.md, no submission.json and no log")
    readme = files.read("README.md", MOST_TEXT_BYTES).decode(errors="replace")
    return RecordFolder(path, files, readme, claims, logs, copies, unread)


def _claims(files: Listing, name: str) -> Claims:
    data = files.read(name, MOST_TEXT_BYTES)
    return Claims(*read_object(data), data.decode(errors="replace")) if name in files.sizes else Claims()


def _read_logs(files: Listing) -> tuple[tuple[LogFile, ...], tuple[str, ...], tuple[str, ...]]:
    logs: list[LogFile] = []
    copies: list[str] = []
    unread: list[str] = []
    seen: dict[bytes, str] = {}
    for name in files.sizes:
        path = PurePosixPath(name)
        if path.suffix.lower() not in _LOG_ENDINGS or _NO_LOGS.search(path.name):
            continue
        if len(logs) + len(unread) >= _MOST_LOGS:
            unread.append(f"{name} and further ones")
            break
        data = files.read(name)
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            copies.append(f"{name} is a copy of {seen[digest]}")
            continue
        log = parse_log_bytes(data)
        if log["steps"] or log["vals"] or log["finals"]:
            logs.append(LogFile(name, log))
            seen[digest] = name
        elif path.suffix != ".txt" or re.search(r"log|train|run|seed", path.name.lower()):
            unread.append(name)
    return tuple(logs), tuple(copies), tuple(unread)


def stated(numbers: Numbers, *names: str) -> float | None:
    """Return the first known number among `names`, or None."""
    return next((numbers[name] for name in names if is_number(numbers.get(name))), None)

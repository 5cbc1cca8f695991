"""Reads the finished runs of a record, one per seed. Checks that the runs differ only in their seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.common.files import read_file, sha256_file
from train.common.wording import SEPARATOR
from train.config import Config
from train.data.tokenizer import byte_tables, find_tokenizer, is_operator, load_tokenizer
from train.data.validation import load_validation
from train.evaluate.scores import find_evaluation
from train.run.folder import RunFolder, changed_settings
from train.run.log_grammar import Log, parse_log
from train.submission.record import summarize
from train.submission.record_scores import exact_score
from train.submission.summary import Summary

_COUNTED_TOKENS = 1_000_000


@dataclass(frozen=True)
class FinishedRun:
    """A run with its final score.

    Attributes:
        folder: the run folder.
        config: settings of the trained model.
        summary: the run's numbers.
        log_path: the log file.
        log: the parsed log.
        evaluation: the entry in evaluation.json for the final score.
    """

    folder: RunFolder
    config: Config
    summary: Summary
    log_path: Path
    log: Log
    evaluation: dict[str, Any]

    @property
    def seed(self) -> str:
        return str(self.config.seed)

    @property
    def published_log(self) -> bytes:
        """The log as records publish it, with the source code at its beginning."""
        log, source = read_file(self.log_path), self.folder.source
        return read_file(source) + f"{SEPARATOR}\n".encode() + log if source.exists() else log

    @property
    def calibration_seconds(self) -> float | None:
        seconds: float | None = self.log["facts"].get("calibration_s")
        return seconds


def read_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Read the runs of one record, sorted by seed.

    Raises:
        UserError: a run is not finished, its log is truncated or contradicts its other files, two runs have the same
            seed, or two runs differ in another setting.
    """
    runs = [read_run(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        changed = changed_settings(first.config, run.config, free=("seed",))
        if changed:
            listed = ", ".join(f"{name}={new}, not {old}" for name, old, new in changed[:4])
            raise UserError(
                f"{run.folder.path}: settings differ from {first.folder.path}: {listed}: give runs that differ in their seed only"
            )
    for run in runs:
        twins = [str(other.folder.path) for other in runs if other.seed == run.seed]
        if len(twins) > 1:
            raise UserError(f"seed {run.seed}: used by {' and '.join(twins)}: give one run per seed")
    return sorted(runs, key=lambda run: run.config.seed)


def read_run(path: Path) -> FinishedRun:
    """Read one run.

    Raises:
        UserError: the run is not finished, or its log is truncated or contradicts its other files.
    """
    folder = RunFolder(path)
    config = folder.trained_config()
    log_path = path / f"train_seed{config.seed}.log"
    if not log_path.is_file():
        raise UserError(f"{log_path}: missing: a record contains the log of every run: restore it, or train again")
    log = parse_log(log_path)
    score = exact_score(log)
    if score is None:
        raise UserError(f"{log_path}: no final score: the run did not finish, or the log is truncated: train again")
    summary = summarize(folder)
    for name in ("val_loss", "val_bpb"):
        measured = getattr(summary, name)
        if not math.isclose(measured, score[name], rel_tol=0, abs_tol=5.1e-9):
            raise UserError(
                f"{log_path}: {name} is {score[name]:.8f}, but evaluation.json has {measured:.8f}: the log describes "
                "another artifact: train again"
            )
    if log["sizes"].get("model") != summary.bytes_model:
        raise UserError(
            f"{log_path}: the model has {log['sizes'].get('model')} bytes, but {folder.artifact} has {summary.bytes_model}: the log "
            "describes another artifact: train again"
        )
    return FinishedRun(folder, config, summary, log_path, log, find_evaluation(folder, config))


def tokenizer_facts(config: Config) -> dict[str, Any]:
    """Describe the tokenizer, and check its byte count on validation text.

    The check compares the byte count of the first million validation tokens with the bytes of their decoded text. The
    bytes of a sidecar are compared with those of the pieces, where no space and no operator is in the piece.

    Returns:
        File name, SHA-256 and vocabulary size of the tokenizer; `counts_bytes`: whether both counts are equal, for a
        sidecar to 1 %; `finding`: a sentence with both counts.

    Raises:
        UserError: the tokenizer or the validation text is missing, or `load_tokenizer` refuses the tokenizer.
    """
    path = find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path)
    text = load_validation(config)
    tokenizer = load_tokenizer(path, config.vocab_size, operators=text.has_sidecar)
    tables = byte_tables(tokenizer, config.vocab_size)
    facts = {"file": path.name, "sha256": sha256_file(path), "vocab_size": config.vocab_size}
    tokens = text.tokens[:_COUNTED_TOKENS]
    begins = (tokens == tokenizer.bos_id()).nonzero()[0]
    documents = f"{len(begins):,} validation documents"
    if text.has_sidecar:
        operators = [index for index in range(tokenizer.vocab_size()) if is_operator(tokenizer.IdToPiece(index))]
        # a space may stand for a run of whitespace in the original text
        plain = ~tables.has_leading_space[tokens[1:]] & ~np.isin(tokens[1:], operators)
        counted = int(text.target_bytes[: len(plain)][plain].sum())
        written = int(tables.base_bytes[tokens[1:]][plain].sum())
        return facts | {
            "counts_bytes": counted > 0 and abs(counted / written - 1) < 0.01,
            "finding": f"{documents}: the sidecar counts {counted:,} bytes in pieces without a space, which have {written:,}",
        }
    counted = decoded = 0
    for begin, end in itertools.pairwise([*begins, len(tokens)]):
        document = tokens[begin:end].astype(int)
        # the million tokens may end inside a character of the last document
        while end == len(tokens) and tokenizer.IsByte(int(document[-1])):
            document = document[:-1]
        counted += int(tables.count(document).sum())
        decoded += len(tokenizer.Decode(document[1:].tolist()).encode())
    return facts | {
        "counts_bytes": counted == decoded and counted > 0,
        "finding": f"{documents}: the tokenizer counts {counted:,} bytes, the text has {decoded:,}",
    }

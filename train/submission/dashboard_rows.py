"""The rows of the dashboard: the numbers and curves of each run, and of each seed of a record."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.config import Config
from train.data.manifest import read_manifest
from train.run.folder import RunFolder
from train.run.logger import finite, read_metrics, series
from train.submission.record_folder import RecordFolder, SeedResult, read_record_folder
from train.submission.record_scores import challenge_text, scored_text
from train.submission.rules.scoring import ratios
from train.submission.rules.size import CAP_BYTES
from train.submission.summary import Summary

# longer curves are downsampled, because a screen cannot show more points
MAX_POINTS = 1500

Row = dict[str, Any]
Points = Sequence[tuple[int, float, float]]


def run_row(folder: RunFolder, config: Config) -> Row:
    """Return the row of a run folder. The run may be unfinished."""
    records = read_metrics(folder.metrics)
    loss, bpb = series(records, "train", "train_loss"), series(records, "val", "val_bpb")
    summary = Summary.read(folder.summary) if folder.summary.exists() else None
    numbers = summary.to_dict() if summary else {}
    return {
        **_row(folder.path.name, config.seed, {"loss": loss, "bpb": bpb, "speed": speed(loss)}),
        "kind": "run",
        "recipe": config.recipe,
        "date": numbers.get("date", "")[:10] or None,
        "status": "finished" if summary else "not finished",
        "hardware": numbers.get("hardware", ""),
        "label": numbers.get("label", ""),
        "max_bytes": config.max_artifact_bytes,
        "val_bpb": finite(numbers.get("val_bpb")),
        "before_bpb": finite(numbers.get("prequant_val_bpb")),
        "after_bpb": finite(numbers.get("flat_val_bpb")),
        "ttt_bpb": None,
        "train_s": finite(numbers.get("train_seconds")),
        "eval_s": finite(numbers.get("eval_seconds")),
        **{name: finite(numbers.get(name)) for name in "steps step_avg_ms bytes_total bytes_model bytes_code".split()},
        "parts": summary.byte_parts if summary else {},
        "text": _text_of_run(folder.find_data(config), summary) if summary else None,
    }


def record_rows(path: Path) -> list[Row]:
    """Return one row per seed of a record folder, or one row for the record if it has no seeds.

    Raises:
        UserError: the folder is not a record, or contains neither a score nor a curve.
    """
    record = read_record_folder(path)
    results = [result for result in record.results if "val_bpb" in result.numbers or result.log]
    if not results and record.val_bpb is not None:
        results = [SeedResult("", {"val_bpb": record.val_bpb}, None, None)]
    if not results:
        unread = f": a log in an unknown form: {', '.join(record.unread)}" if record.unread else ""
        raise UserError(f"{path}: neither a score nor a log{unread}")
    text = _text_of_record(record)
    return [{**_record_row(record, result), "text": text} for result in results]


def _record_row(record: RecordFolder, result: SeedResult) -> Row:
    numbers, log = result.numbers, result.log
    loss = log.curve("train_loss") if log else []
    curves: dict[str, Points] = {"loss": loss, "bpb": log.curve("val_bpb") if log else []}
    # a clock that is logged in minutes times only many steps together, not a single step
    error = log.clock.error_s if log and log.clock else 0.0
    curves["speed"] = speed(_spaced(loss, 20 * error))
    total = numbers.get("artifact_bytes", record.claims.number("artifact_bytes"))
    model = numbers.get("bytes_model", record.claims.number("bytes_model"))
    code = numbers.get("bytes_code", record.claims.number("bytes_code"))
    known = {name: int(size) for name, size in (("model", model), ("code", code)) if size is not None}
    gpus = log.log["gpus"] if log else []
    return {
        **_row(record.name, int(result.seed) if result.seed.isdigit() else None, curves),
        "kind": "record",
        "group_name": record.name,
        "recipe": record.claims.string("name"),
        "date": record.claims.string("date")[:10] or None,
        "status": "finished",
        "hardware": record.claims.string("hardware", "gpu", "platform") or (f"{len(gpus)} × {gpus[0]}" if gpus else ""),
        "label": record.claims.string("label"),
        "max_bytes": CAP_BYTES,
        "val_bpb": numbers.get("val_bpb"),
        "before_bpb": numbers.get("before_bpb", numbers.get("prequant_bpb")),
        "after_bpb": numbers.get("after_bpb"),
        "ttt_bpb": numbers.get("ttt_bpb"),
        "steps": numbers.get("steps"),
        "step_avg_ms": numbers.get("step_avg_ms"),
        "train_s": numbers.get("train_time_s"),
        "eval_s": numbers.get("eval_time_s"),
        "bytes_total": total if total is not None else sum(known.values()) or None,
        "bytes_model": model,
        "bytes_code": code,
        "parts": known or ({"total": total} if total is not None else {}),
    }


def _row(name: str, seed: int | None, curves: dict[str, Points]) -> Row:
    return {"id": name, "seed": seed, "series": {kind: thinned(points) for kind, points in curves.items()}}


def _text_of_run(config: Config, summary: Summary) -> Row:
    try:
        manifest = read_manifest(config.data_path)
    except UserError:
        manifest = None
    window, challenge = config.window, challenge_text(summary.tokens, config.window)
    # tokens after the last full window are not scored
    whole = challenge or manifest is None or manifest.val.tokens - summary.tokens <= window
    name = "FineWeb" if challenge else Path(config.data_path).name or "unknown"
    return {"name": name, "tokens": summary.tokens, "window": window, "challenge": challenge, "whole": whole}


def _text_of_record(record: RecordFolder) -> Row | None:
    """Describe the scored text. None if neither token counts nor bytes per token identify the text."""
    text, facts = scored_text(record.claims.values), record.claims.values.get("evaluation")
    if text is not None and isinstance(facts, dict):
        whole = facts["validation_tokens"] - text.tokens < text.window
        name = "FineWeb" if text.challenge else f"{facts['validation_tokens']:,} tokens"
        return {"name": name, "tokens": text.tokens, "window": text.window, "challenge": text.challenge, "whole": whole}
    names = [name for one in ratios(record) for name in one.names(1e-4)]
    if not names:
        return None
    return {"name": "FineWeb", "tokens": 0, "window": 1, "challenge": True, "whole": True}


def speed(points: Points) -> list[tuple[int, float, float]]:
    """Compute (step, seconds, ms per step) between neighbouring points; step and seconds are the later point's."""
    return [
        (after[0], after[1], 1000 * (after[1] - before[1]) / (after[0] - before[0]))
        for before, after in itertools.pairwise(points)
    ]


def _spaced(points: Points, seconds: float) -> Points:
    kept: list[tuple[int, float, float]] = []
    for point in points:
        if not kept or point[1] - kept[-1][1] >= seconds:
            kept.append(point)
    return kept


def thinned(points: Points) -> list[tuple[int, float, float]]:
    """Keep at most MAX_POINTS + 1 points, among them the last point."""
    stride = -(-len(points) // MAX_POINTS) or 1
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]

"""Scores and the file that keeps them: a run's evaluation.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from train.config import Config
from train.errors import UserError
from train.files import atomic_write
from train.run import RunFolder


@dataclass(frozen=True)
class EvalResult:
    """A score.

    Attributes:
        val_loss: nats per token.
        val_bpb: bits per byte.
        tokens: scored positions.
        bytes: bytes of text they stand for.
        windows: windows over all ranks.
        seconds: duration on this rank.
    """

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    windows: int
    seconds: float


def evaluation_entry(result: EvalResult, config: Config, *, weights: str, **facts: Any) -> dict[str, Any]:
    """One score with the settings it was made under, as evaluation.json and metrics.jsonl hold it."""
    stride = config.eval_stride
    form = f"int{config.matrix_bits}" if weights == "artifact" else "prequant"
    return {
        "name": f"{form}_{'sliding_window' if stride else 'roundtrip'}",
        "weights": weights,
        "stride": stride,
        "rule": config.eval_rule if stride else "flat",
        "seq_len": config.window,
        "max_tokens": config.eval_max_tokens,
        **asdict(result),
        **facts,
    }


def write_evaluation(folder: RunFolder, entry: dict[str, Any]) -> None:
    """Add a score to the run's evaluation.json, in the place of one made under the same settings."""
    key = " ".join(f"{name}={entry[name]}" for name in ("weights", "rule", "seq_len", "stride", "max_tokens"))
    scores = read_evaluation(folder) if folder.evaluation.exists() else {}
    atomic_write(folder.evaluation, json.dumps({**scores, key: entry}, indent=1) + "\n")


def read_evaluation(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """The scores in evaluation.json, by their settings."""
    try:
        return dict(json.loads(folder.need(folder.evaluation, f"python -m train.evaluate {folder.path}").read_text()))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise UserError(f"{folder.evaluation}: not readable ({error}): delete it and evaluate again") from error

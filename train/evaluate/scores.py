"""The score of a model, and evaluation.json, which stores the scores of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_type_hints

from train.common.errors import UserError
from train.common.files import read_json, sha256_file, write_json
from train.common.values import fits
from train.config import Config
from train.data.paid_prefix import NOT_COMPLIANT
from train.run.folder import RunFolder


@dataclass(frozen=True)
class EvalResult:
    """A score, and how it was measured."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    tokens: int  # scored positions
    bytes: int  # bytes of the scored text
    windows: int  # number of windows of all ranks
    seconds: float  # duration on this rank
    layer0: str = ""  # "on" if windows share layer 0's queries, keys and values; else "off" and the reason

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> EvalResult:
        """Make the score of stored values. Errors begin with `source`.

        Raises:
            UserError: a value is missing, or is of another type.
        """
        kinds = get_type_hints(cls)
        values = {"layer0": "", **values}
        if values.keys() != kinds.keys() or not all(fits(values[name], kind) for name, kind in kinds.items()):
            raise UserError(f"{source}: not a score: {ascii(dict(values))[:200]}")
        return cls(**values)

    @property
    def layer0_line(self) -> str:
        """Log line: whether overlapping windows reuse layer 0's queries, keys and values."""
        return f"reuse of layer 0's queries, keys and values in overlapping windows: {self.layer0}"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def evaluation_entry(
    result: EvalResult, config: Config, *, weights: str, max_tokens: int = 0, **facts: Any
) -> dict[str, Any]:
    """Make the entry for evaluation.json and metrics.jsonl: the score, the settings that affect it, and `facts`."""
    stride = config.eval_stride
    prefix = f"int{config.matrix_bits}" if weights == "artifact" else "prequant"
    label = {"label": NOT_COMPLIANT} if config.paid_prefix_file else {}
    return {
        "name": f"{prefix}_{'sliding_window' if stride else 'roundtrip'}{'_paid_prefix' if label else ''}",
        **_settings(config, weights, max_tokens),
        **asdict(result),
        "tokens_per_second": round(result.tokens_per_second, 1),
        **facts,
        **label,
    }


def write_evaluation(folder: RunFolder, entry: dict[str, Any]) -> None:
    """Add a score to the run's evaluation.json. An earlier score with the same settings is replaced.

    The caller must hold an exclusive lock on the run folder, or call this inside `RunFolder.writing`.
    """
    scores = read_evaluation(folder) if folder.evaluation.exists() else {}
    if entry["weights"] == "artifact":
        # the digest identifies the scored artifact; evaluation.json files of earlier versions lack it
        entry["artifact_sha256"] = sha256_file(folder.artifact)
    write_json(folder.evaluation, {**scores, _key(entry): entry})


def find_evaluation(folder: RunFolder, config: Config) -> dict[str, Any]:
    """Find the artifact's score in evaluation.json that was measured with the settings of `config`.

    Raises:
        UserError: there is no such score, or it belongs to an earlier artifact.
    """
    wanted = _settings(config, "artifact")
    for entry in read_evaluation(folder).values():
        if isinstance(entry, dict) and all(entry.get(name) == value for name, value in wanted.items()):
            if entry.get("artifact_sha256") not in (None, sha256_file(folder.need(folder.artifact, "python -m train"))):
                raise UserError(f"{folder.evaluation}: the score of another model.golf: evaluate again")
            if missing := _MEASURED - set(entry):
                raise UserError(f"{folder.evaluation}: a score without {', '.join(sorted(missing))}: evaluate again")
            return entry
    raise UserError(
        f"{folder.evaluation}: no score of the artifact with {_key(wanted)}: run python -m train.evaluate {folder.path} "
        f"--stride {config.eval_stride}"
    )


def _settings(config: Config, weights: str, max_tokens: int = 0) -> dict[str, Any]:
    return {
        "weights": weights,
        "stride": config.eval_stride,
        "rule": config.eval_rule if config.eval_stride else "flat",
        "seq_len": config.window,
        "max_tokens": max_tokens,
        "logits_rounding": rounding_of(config, config.eval_stride),
        "data_path": config.data_path,
        "paid_prefix_file": config.paid_prefix_file,
    }


def rounding_of(config: Config, stride: int) -> str:
    """Return the rounding of the logits in an evaluation with this stride.

    With stride 0, every value except "none" means "bf16". The published scripts score such windows with the training
    loss, which rounds the logits only before the softcap.
    """
    return "bf16" if not stride and config.logits_rounding != "none" else config.logits_rounding


def _key(entry: dict[str, Any]) -> str:
    return " ".join(f"{name}={entry[name]}" for name in _KEY if entry[name] != "")


_MEASURED = {field.name for field in fields(EvalResult) if field.default is MISSING}
_KEY = ("weights", "rule", "seq_len", "stride", "max_tokens", "logits_rounding", "data_path", "paid_prefix_file")


def read_evaluation(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Read evaluation.json. The result maps settings, written as text, to the entry of the score."""
    path = folder.need(folder.evaluation, f"python -m train.evaluate {folder.path}")
    return read_json(path, "delete it and evaluate again")

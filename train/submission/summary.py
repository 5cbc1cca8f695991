"""The numbers of one finished run; every table, plot and line about it is rendered from them."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.common.wording import counted

if TYPE_CHECKING:
    from train.artifact.budget import BudgetRow

# parts of parameter names, and what a picture calls the tensors that have them
_PARTS = {
    ".attention.": "attention",
    ".mlp.": "MLP",
    "embedding": "embeddings",
    "bigram.": "embeddings",
    "ve.": "embeddings",
}

STAGES = ("data", "train", "quantize", "artifact", "evaluate")


@dataclass(frozen=True)
class Summary:
    """What a run from text to record measured; the content of summary.json.

    Attributes:
        run_id: name of the run's folder.
        recipe: recipe it was started from.
        seed: its seed.
        date: when training ended, ISO 8601.
        steps: optimizer steps.
        step_avg_ms: training clock over steps.
        train_seconds: training clock.
        stage_seconds: stage → wall-clock seconds of the pass whose result counts; stages are `STAGES`. Of a resumed run's
            training, `train_seconds`.
        step0_val_bpb: flat, before the first step; None: not measured, as in the following ones.
        prequant_val_bpb: flat, of the trained weights before quantization.
        val_loss: nats per token of the reloaded artifact under the run's evaluation.
        val_bpb: bits per byte of the same.
        flat_val_bpb: flat, of the reloaded artifact.
        eval_seconds: duration of the evaluation that gave `val_bpb`.
        tokens: tokens it scored.
        bytes: bytes of text they stand for.
        bytes_code: code that a submission carries.
        bytes_model: the artifact.
        bytes_prefix: a paid prefix; 0: none.
        bytes_total: the sum of the three, which counts against the cap.
        max_bytes: the cap.
        parameters: trained and saved numbers of the model.
        hardware: devices, by name and number.
        torch: version.
        python: version.
        yardsticks: compressor, and what it has seen before → bits per byte of the validation text, e.g. `xz -9 after the
            training text`; see `train.data.build.yardsticks`.
        model_groups: group of tensors → bytes in the artifact, in all `bytes_model`; empty: not measured.
        target_bytes: that `target_mb` was to reach by pruning; 0: none.
        label: what stands beside every score of a run that breaks the rules; empty: nothing.
        resumed: steps at which training went on after a kill.
        recurrence_missed: step at which recurrence was to begin, where training ended before it; 0: it began, or none was set.
    """

    run_id: str
    recipe: str
    seed: int
    date: str
    steps: int
    step_avg_ms: float
    train_seconds: float
    stage_seconds: dict[str, float]
    val_loss: float
    val_bpb: float
    eval_seconds: float
    tokens: int
    bytes: int
    bytes_code: int
    bytes_model: int
    bytes_total: int
    max_bytes: int
    parameters: int
    hardware: str
    torch: str
    python: str
    step0_val_bpb: float | None = None
    prequant_val_bpb: float | None = None
    flat_val_bpb: float | None = None
    yardsticks: dict[str, float] = field(default_factory=dict)
    model_groups: dict[str, int] = field(default_factory=dict)
    bytes_prefix: int = 0
    target_bytes: int = 0
    label: str = ""
    resumed: list[int] = field(default_factory=list)
    recurrence_missed: int = 0

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if not _fits(value := getattr(self, name), kind):
                raise UserError(f"{name}: expected {_type_name(kind)}, got {value!r}: run python -m train again")
        total = self.bytes_code + self.bytes_prefix + self.bytes_model
        if total != self.bytes_total:
            parts = "bytes_code + bytes_prefix + bytes_model" if self.bytes_prefix else "bytes_code + bytes_model"
            raise UserError(f"bytes_total: expected {parts} = {total}, got {self.bytes_total}")
        if self.model_groups and sum(self.model_groups.values()) != self.bytes_model:
            raise UserError(
                f"model_groups: expected a sum of bytes_model = {self.bytes_model}, got {sum(self.model_groups.values())}"
            )
        strangers = set(self.stage_seconds) - set(STAGES)
        if strangers:
            raise UserError(
                f"stage_seconds: expected stages from {', '.join(STAGES)}, got {', '.join(sorted(strangers))}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "summary") -> Summary:
        """The inverse of `to_dict`.

        Raises:
            UserError: a field is missing, unknown or of the wrong type; the message begins with `source`.
        """
        hints = typing.get_type_hints(cls)
        optional = {
            item.name for item in fields(cls) if item.default is not MISSING or item.default_factory is not MISSING
        }
        missing = [name for name in hints if name not in values and name not in optional]
        unknown = [name for name in values if name not in hints]
        if missing or unknown:
            problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
            raise UserError(f"{source}: expected the fields of a run's summary: {problem}: run python -m train again")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read summary.json.

        Raises:
            UserError: it is missing, no JSON object, or see `from_dict`.
        """
        if not path.exists():
            raise UserError(f"{path}: missing: the run is not finished (python -m train writes it at its end)")
        return cls.from_dict(read_json(path, "run python -m train again"), str(path))

    def write(self, path: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_json(path, self.to_dict())


def group_bytes(rows: Iterable[BudgetRow]) -> dict[str, int]:
    """Bytes of each part of a model in an artifact's budget, the largest first: what `Summary.model_groups` holds.

    The groups of the matrices of a block are taken together, as are those of the embedding tables.
    """
    totals: dict[str, int] = {}
    for row in rows:
        part = next((part for name, part in _PARTS.items() if name in row.group), row.group)
        totals[part] = totals.get(part, 0) + row.packed_bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def size_line(summary: Summary) -> str:
    """Bytes against the cap, in words."""
    share = 100 * summary.bytes_total / summary.max_bytes
    prefix = f" + paid prefix {summary.bytes_prefix:,}" if summary.bytes_prefix else ""
    over = summary.bytes_total - summary.target_bytes
    missed = f", {over:,} over the target of {summary.target_bytes:,}" if summary.target_bytes and over > 0 else ""
    return (
        f"code {summary.bytes_code:,}{prefix} + model {summary.bytes_model:,} = {summary.bytes_total:,} of {summary.max_bytes:,} "
        f"bytes ({share:.1f} %){missed}"
    )


def stage_line(summary: Summary) -> str:
    """Seconds of each stage that ran, in the order of the pipeline, and their sum."""
    parts = [f"{name} {summary.stage_seconds[name]:.1f}" for name in STAGES if name in summary.stage_seconds]
    note = f" ({note})" if (note := resumed_note(summary)) else ""
    return f"{', '.join(parts)}; {sum(summary.stage_seconds.values()):.1f} in all{note}"


def resumed_note(summary: Summary) -> str:
    """Where training went on after a kill, and what that means for its seconds; empty: it did not."""
    if not summary.resumed:
        return ""
    steps = f"step{'s' if len(summary.resumed) > 1 else ''} {', '.join(f'{step:,}' for step in summary.resumed)}"
    return f"training was resumed at {steps}: train is its clock alone"


def recurrence_note(summary: Summary) -> str:
    """What became of a recurrence that training was too short for; empty: nothing of the kind."""
    return f"never began (step {summary.recurrence_missed:,})" if summary.recurrence_missed else ""


def summary_text(summary: Summary, run_dir: str | Path | None = None) -> str:
    """The short block with which a run ends.

    Args:
        summary: the run's numbers.
        run_dir: the run's folder, to be named in the last line.
    """
    before = [
        (summary.flat_val_bpb, "flat"),
        (summary.prequant_val_bpb, "before quantization, flat"),
        (summary.step0_val_bpb, "before training"),
    ]
    lines = [
        ("label", summary.label),
        ("val_bpb", f"{summary.val_bpb:.4f} bits per byte, from the bytes of the artifact"),
        ("", ", ".join(f"{value:.4f} {label}" for value, label in before if value is not None)),
        ("beside it", ", ".join(f"{name} {value:.4f}" for name, value in summary.yardsticks.items())),
        ("size", size_line(summary)),
        (
            "training",
            f"{counted(summary.steps, 'step')} of {summary.step_avg_ms:.2f} ms, {summary.train_seconds:.1f} s",
        ),
        ("recurrence", recurrence_note(summary)),
        (
            "scored",
            f"{summary.tokens:,} tokens, {summary.bytes:,} bytes of text as normalized, {summary.eval_seconds:.1f} s",
        ),
        ("seconds", stage_line(summary)),
        ("folder", str(run_dir or "")),
    ]
    title = f"{summary.run_id} (recipe {summary.recipe}, seed {summary.seed}, {summary.parameters:,} parameters)"
    return "\n".join([title, *(f"  {label:<10} {text}" for label, text in lines if text)])


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    if typing.get_origin(kind) is dict:
        _, inner = typing.get_args(kind)
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, inner) for k, v in value.items())
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if type(None) in typing.get_args(kind):
        return value is None or _fits(value, float)
    return isinstance(value, kind)


def _type_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))

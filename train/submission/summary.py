"""The numbers of one finished run, which summary.json stores, and lines of text that show these numbers."""

from __future__ import annotations

import statistics
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.common.values import fits
from train.common.wording import counted, stopped_early

if TYPE_CHECKING:
    from train.artifact.budget import BudgetRow

STAGES = ("data", "train", "quantize", "artifact", "evaluate")
# substring of the name of a group of tensors → part of the model to which the group belongs
_PARTS = {
    ".attention.": "attention",
    ".mlp.": "MLP",
    "embedding": "embeddings",
    "bigram.": "embeddings",
    "ve.": "embeddings",
}


@dataclass(frozen=True)
class Summary:
    """The contents of summary.json. None means not measured.

    Attributes:
        run_id: name of the run folder.
        recipe: the recipe.
        seed: the seed.
        date: date and time at which training ended, ISO 8601.
        steps: number of optimizer steps.
        step_avg_ms: `train_seconds` per step, in milliseconds.
        train_seconds: training time in seconds, for the steps alone, without validation.
        stage_seconds: stage → wall-clock seconds; for a resumed run, `train` equals `train_seconds`.
        step0_val_bpb: bits per byte before the first step, with non-overlapping windows.
        prequant_val_bpb: bits per byte of the trained weights before quantization, with non-overlapping windows.
        val_loss: nats per token of the reloaded artifact, with the run's evaluation settings.
        val_bpb: bits per byte, from the evaluation that gave `val_loss`.
        flat_val_bpb: bits per byte of the reloaded artifact, with non-overlapping windows.
        eval_seconds: duration of the evaluation that gave `val_bpb`.
        tokens: number of tokens that the evaluation of `val_bpb` scored.
        bytes: bytes of the scored text after SentencePiece's normalization; with a sidecar, of the original text.
        bytes_code: bytes of the submission's code.
        bytes_model: bytes of the artifact.
        bytes_prefix: bytes of the paid prefix; 0: none.
        bytes_total: sum of the bytes of code, artifact and prefix; at most `max_bytes` are allowed.
        max_bytes: largest allowed `bytes_total`.
        parameters: number of values in the artifact's tensors.
        hardware: names and number of the devices.
        torch, python: versions of PyTorch and Python.
        yardsticks: name of a compressor → its bits per byte on the validation text; see `train.data.build.compressor_bpb`.
        model_groups: part of the model → bytes in the artifact; empty: not measured.
        target_bytes: `bytes_total` that pruning aims at (setting `target_mb`); 0: no pruning.
        label: text shown with every score of a run that breaks the rules; empty: none.
        resumed: steps at which training was resumed.
        recurrence_missed: 0 unless training ended before recurrence started. Then the step at which recurrence would
            have started, or (a number below 1) the fraction of training before recurrence.
        steps_planned: planned number of steps, if the time limit ended training earlier. 0: training did all its steps,
            or the recipe trains until the time limit.
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
    recurrence_missed: float = 0
    steps_planned: int = 0

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if not fits(value := getattr(self, name), kind):
                raise UserError(f"{name}: expected {_type_name(kind)}, got {value!r}")
        if self.model_groups and sum(self.model_groups.values()) != self.bytes_model:
            raise UserError(
                f"model_groups: expected a sum of bytes_model = {self.bytes_model}, got {sum(self.model_groups.values())}"
            )
        if sum(self.byte_parts.values()) != self.bytes_total:
            raise UserError(
                f"bytes_total: expected {sum(self.byte_parts.values())}, the sum of {self.byte_parts}, got {self.bytes_total}"
            )
        unknown = set(self.stage_seconds) - set(STAGES)
        if unknown:
            raise UserError(
                f"stage_seconds: expected stages from {', '.join(STAGES)}, got {', '.join(sorted(unknown))}"
            )

    @property
    def byte_parts(self) -> dict[str, int]:
        """Name → bytes of each part of the submission: code, model and paid prefix."""
        prefix = {"paid prefix": self.bytes_prefix} if self.bytes_prefix else {}
        return {**(self.model_groups or {"model": self.bytes_model}), **prefix, "code": self.bytes_code}

    def labelled(self, text: str) -> str:
        """Put the label, if there is one, before `text`."""
        return f"{self.label}. {text}" if self.label else text

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "summary") -> Summary:
        """Make a summary from a dictionary that `to_dict` returned.

        Raises:
            UserError: a field is missing, unknown or of the wrong type; the message begins with `source`.
        """
        known = [item.name for item in fields(cls)]
        missing = [
            item.name
            for item in fields(cls)
            if item.name not in values and item.default is MISSING and item.default_factory is MISSING
        ]
        unknown = [name for name in values if name not in known]
        if missing or unknown:
            problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
            raise UserError(f"{source}: not a run's summary ({problem}): run python -m train.submission record again")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read summary.json.

        Raises:
            UserError: the file is missing or not a JSON object, or `from_dict` refuses its contents.
        """
        if not path.exists():
            raise UserError(f"{path}: missing: the run is not finished (python -m train writes it last)")
        return cls.from_dict(read_json(path, "run python -m train.submission record again"), str(path))

    def write(self, path: Path) -> None:
        """Write summary.json atomically."""
        write_json(path, self.to_dict())


def group_bytes(rows: Iterable[BudgetRow]) -> dict[str, int]:
    """Return the artifact's bytes per part of the model, largest part first; see `Summary.model_groups`."""
    totals: dict[str, int] = {}
    for row in rows:
        part = next((part for name, part in _PARTS.items() if name in row.group), row.group)
        totals[part] = totals.get(part, 0) + row.packed_bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; the deviation of a single value is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def size_line(summary: Summary) -> str:
    """State the bytes of code and model, the sum, and the largest allowed sum."""
    prefix = f" + paid prefix {summary.bytes_prefix:,}" if summary.bytes_prefix else ""
    over = summary.bytes_total - summary.target_bytes
    missed = (
        f", {over:,} over the pruning target of {summary.target_bytes:,}" if summary.target_bytes and over > 0 else ""
    )
    return (
        f"code {summary.bytes_code:,}{prefix} + model {summary.bytes_model:,} = {summary.bytes_total:,} of {summary.max_bytes:,} "
        f"bytes ({summary.bytes_total / summary.max_bytes:.1%}){missed}"
    )


def stage_line(summary: Summary) -> str:
    """State the seconds of each stage, and the sum."""
    parts = [f"{name} {summary.stage_seconds[name]:.1f}" for name in STAGES if name in summary.stage_seconds]
    note = f" ({note})" if (note := resumed_note(summary)) else ""
    return f"{', '.join(parts)}; total {sum(summary.stage_seconds.values()):.1f} s{note}"


def resumed_note(summary: Summary) -> str:
    """State the steps at which training was resumed; "" if there are none."""
    if not summary.resumed:
        return ""
    steps = f"step{'s' if len(summary.resumed) > 1 else ''} {', '.join(f'{step:,}' for step in summary.resumed)}"
    return f"resumed at {steps}, so train is the training time"


def recurrence_note(summary: Summary) -> str:
    """State that training ended before recurrence started; "" if recurrence was not missed."""
    missed = summary.recurrence_missed
    if not missed:
        return ""
    begin = f"step {missed:,}" if missed >= 1 else f"{missed:.4g} of it was done"
    return f"never started: training ended before {begin}"


def stopped_note(summary: Summary) -> str:
    """State that the time limit ended training early; "" if `steps_planned` is 0."""
    return stopped_early(summary.steps, summary.steps_planned) if summary.steps_planned else ""


def summary_text(summary: Summary, run_dir: str | Path | None = None) -> str:
    """Return the block of text that a run prints last. Its last line names `run_dir`."""
    others = [
        (summary.flat_val_bpb, "non-overlapping windows"),
        (summary.prequant_val_bpb, "before quantization"),
        (summary.step0_val_bpb, "before training"),
    ]
    lines = [
        ("label", summary.label),
        ("val_bpb", f"{summary.val_bpb:.4f} bits per byte of text, by the model loaded from the artifact"),
        ("", ", ".join(f"{value:.4f} {label}" for value, label in others if value is not None)),
        ("comparison", "; ".join(f"{value:.4f} {name}" for name, value in summary.yardsticks.items())),
        ("size", size_line(summary)),
        (
            "training",
            f"{counted(summary.steps, 'step')}, {summary.step_avg_ms:.2f} ms per step, {summary.train_seconds:.1f} s",
        ),
        ("", stopped_note(summary)),
        ("recurrence", recurrence_note(summary)),
        (
            "evaluation",
            f"{summary.tokens:,} tokens, {summary.bytes:,} bytes of text, {summary.eval_seconds:.1f} s",
        ),
        ("stages", stage_line(summary)),
        ("folder", str(run_dir or "")),
    ]
    title = f"{summary.run_id} (recipe {summary.recipe}, seed {summary.seed}, {summary.parameters:,} parameters)"
    return "\n".join([title, *(f"  {label:<10} {text}" for label, text in lines if text)])


def _type_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))

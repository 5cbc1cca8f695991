"""Writes and reads a run's log, `train_seed<SEED>.log`, and its numbers, `metrics.jsonl`.

Log lines keep the fields and units of published logs (see `train.run.log_grammar`), so existing scripts can parse them.
New fields go to the end of a line.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from train.common.errors import UserError
from train.common.files import read_file
from train.common.wording import SEPARATOR

if TYPE_CHECKING:
    from train.run.sinks import Sink


class RunLogger:
    """Writes a run's log and metrics line by line. An interruption loses at most the current line.

    If the files exist, the logger appends after their last complete line. Only rank 0 writes files.

    Args:
        run_dir: the run folder, which must exist.
        seed: the run's seed, part of the log's name.
        rank: rank of this process.
        echo: also print each line.
        sinks: further loggers that get each metric, see `train.run.sinks`. `close` closes them too.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        seed: int,
        rank: int = 0,
        *,
        echo: bool = True,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.path = Path(run_dir) / f"train_seed{seed}.log"
        self.metrics_path = Path(run_dir) / "metrics.jsonl"
        self.echo = echo
        self.sinks = tuple(sinks)
        # the last finished step
        self.step = 0
        self._log: TextIO | None = None
        self._metrics: TextIO | None = None
        self.resumed = False
        if rank == 0:
            self.resumed = self.path.exists() and self.path.stat().st_size > 0
            self._log = _open_for_lines(self.path)
            self._metrics = _open_for_lines(self.metrics_path)

    def close(self) -> None:
        for file in (self._log, self._metrics):
            if file is not None:
                file.close()
        self._log = self._metrics = None
        for sink in self.sinks:
            sink.close()
        self.sinks = ()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, text: str, *, console: bool = True) -> None:
        """Write `text` to the log and, unless `console` is False, to the console."""
        if self._log is None:
            return
        _write_line(self._log, text)
        if self.echo and console:
            # unlike print, tqdm.write does not break a progress bar
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def metric(self, kind: str, **values: Any) -> None:
        """Append the JSON object `{"kind": kind, **values}` to metrics.jsonl; NaN and infinities become null."""
        append_metric(self._metrics, kind, values)
        # a metric without a step, such as the final score, gets the step of the previous metric
        self.step = values.get("step", self.step)
        prefix = f"{kind}/{values['name']}" if "name" in values else kind
        numbers = {f"{prefix}/{name}": value for name, value in values.items() if name != "step" and _is_number(value)}
        for sink in self.sinks:
            sink.scalars(self.step, numbers)

    def header(self, *, gpu_report: str | None = None) -> None:
        """Write the header: versions and the output of `nvidia-smi`. A resumed run gets no second header.

        If `gpu_report` is given, the header contains it instead of the output of `nvidia-smi`.
        """
        if self._log is None or self.resumed:
            return
        # imported here, because importing torch takes seconds and the commands that read runs do not need it
        import torch

        for text in (
            f"Running Python {sys.version}",
            f"Running PyTorch {torch.__version__}",
            _nvidia_smi() if gpu_report is None else gpu_report,
            SEPARATOR,
        ):
            self.line(text, console=False)

    def facts(
        self, *, dataset: str, train_shards: int, model_params: int, world_size: int, grad_accum_steps: int, seed: int
    ) -> None:
        self.line(f"train_loader:dataset:{dataset.replace(' ', '_')} train_shards:{train_shards}")
        self.line(f"model_params:{model_params}")
        self.line(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps}")
        self.line(f"seed:{seed}")

    def warmup_step(self, step: int, total: int, note: str = "") -> None:
        self.line(f"warmup_step:{step}/{total}{note}")

    def train_step(self, step: int, total: int, train_loss: float, train_time_ms: float, **extra: Any) -> None:
        """Log the training loss of a step and the training time. The fields `extra` are appended to the line."""
        average = train_time_ms / max(step, 1)
        tail = "".join(f" {name}:{_format(value)}" for name, value in extra.items())
        self.line(
            f"step:{step}/{total} train_loss:{train_loss:.4f} train_time:{train_time_ms:.0f}ms step_avg:{average:.2f}ms{tail}"
        )
        self.metric("train", step=step, train_loss=train_loss, seconds=train_time_ms / 1000, **extra)

    def val_step(self, step: int, total: int, val_loss: float, val_bpb: float, train_time_ms: float) -> None:
        """Log a validation after `step` steps. `train_time_ms` is the training time, without validation."""
        average = train_time_ms / max(step, 1)
        self.line(
            f"step:{step}/{total} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
            f"train_time:{train_time_ms:.0f}ms step_avg:{average:.2f}ms"
        )
        self.metric("val", step=step, val_loss=val_loss, val_bpb=val_bpb, seconds=train_time_ms / 1000)

    def resume(self, step: int, train_time_ms: float) -> None:
        """Log that training resumes at `step`.

        `series` then ignores metrics that were logged before for later steps.
        """
        self.line(f"resumed: step:{step} train_time:{train_time_ms:.0f}ms")
        self.metric("resume", step=step, seconds=train_time_ms / 1000)

    def stopping_early(self, step: int, total: int, train_time_ms: float) -> None:
        self.line(f"stopping_early: wallclock_cap train_time:{train_time_ms:.0f}ms step:{step}/{total}")

    def peak_memory(self, allocated_bytes: int, reserved_bytes: int) -> None:
        mebi = 1024 * 1024
        self.line(f"peak memory allocated: {allocated_bytes // mebi} MiB reserved: {reserved_bytes // mebi} MiB")
        self.metric("memory", allocated_bytes=allocated_bytes, reserved_bytes=reserved_bytes)

    def sizes(
        self,
        *,
        raw_bytes: int,
        code_bytes: int,
        model_bytes: int,
        prefix_bytes: int = 0,
        bits: int = 6,
        codec: str = "brotli",
    ) -> None:
        """Log the bytes of the trained weights (`raw_bytes`), code, artifact (`model_bytes`) and submission."""
        form = f"int{bits}+{codec}"
        self.line(f"Serialized model: {raw_bytes} bytes")
        self.line(f"Code size: {code_bytes} bytes")
        self.line(f"Serialized model {form}: {model_bytes} bytes")
        if prefix_bytes:
            self.line(f"Paid prefix: {prefix_bytes} bytes")
        self.line(f"Total submission size {form}: {code_bytes + prefix_bytes + model_bytes} bytes")
        sizes = {"raw_bytes": raw_bytes, "code_bytes": code_bytes, "model_bytes": model_bytes}
        self.metric("sizes", **sizes, prefix_bytes=prefix_bytes, form=form)

    def final(
        self,
        name: str,
        val_loss: float,
        val_bpb: float,
        seconds: float,
        *,
        stride: int = 0,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Log a final score in two lines, with 4 and with 8 decimals.

        Args:
            name: such as `int6_roundtrip`; the lines begin with `final_` and this name.
            val_loss: nats per token.
            val_bpb: bits per byte.
            seconds: duration of the evaluation.
            stride: new tokens per window; 0: windows do not overlap, and the lines have no stride.
            facts: further values for metrics.jsonl.
        """
        for text in final_lines(name, val_loss, val_bpb, seconds, stride=stride):
            self.line(text)
        score = {"name": name, "val_loss": val_loss, "val_bpb": val_bpb, "stride": stride, "seconds": seconds}
        self.metric("final", **score | (facts or {}))


def final_lines(name: str, val_loss: float, val_bpb: float, seconds: float, *, stride: int = 0) -> tuple[str, str]:
    """Return the two log lines of `RunLogger.final`."""
    tail = f"{f' stride:{stride}' if stride else ''} eval_time:{seconds * 1000:.0f}ms"
    return (
        f"final_{name} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}{tail}",
        f"final_{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}",
    )


def append_metric(target: TextIO | str | os.PathLike[str] | None, kind: str, values: dict[str, Any]) -> None:
    """Append one JSON object to `target`, an open metrics file or its path. If `target` is None, do nothing."""
    if target is None:
        return
    if isinstance(target, (str, os.PathLike)):
        with _open_for_lines(Path(target)) as file:
            append_metric(file, kind, values)
        return
    record = {"kind": kind, **{name: finite(value) for name, value in values.items()}}
    _write_line(target, json.dumps(record, allow_nan=False))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the objects of metrics.jsonl. An incomplete last line is ignored.

    Raises:
        UserError: the file is missing, or a complete line is not a JSON object with a `kind`.
    """
    try:
        text = read_file(path).decode(errors="replace")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing: expected the metrics.jsonl of a run of python -m train") from error
    *whole, _torn = text.split("\n")
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: expected a JSON object, found {line[:40]!r}") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise UserError(f"{path}: line {number}: expected an object with a kind, found {line[:40]!r}")
        records.append(record)
    return records


def series(records: list[dict[str, Any]], kind: str, field: str) -> list[tuple[int, float, float]]:
    """Return the points (step, seconds, value) of the field `field` in the metrics of one kind, sorted by step.

    Points without a value are left out. If training resumed from a checkpoint, later points of the earlier process are
    left out too.
    """
    points: dict[int, tuple[int, float, float]] = {}
    for record in records:
        if record["kind"] == "resume":
            points = {step: point for step, point in points.items() if step <= record["step"]}
        elif record["kind"] == kind and record.get(field) is not None:
            points[record["step"]] = (record["step"], record["seconds"], record[field])
    return [points[step] for step in sorted(points)]


def resumed_steps(records: list[dict[str, Any]]) -> list[int]:
    """Return the steps at which training resumed, sorted.

    Resuming at an earlier step removes later steps from the list.
    """
    steps: list[int] = []
    for record in records:
        if record["kind"] == "resume":
            steps = [*(step for step in steps if step < record["step"]), record["step"]]
    return [step for step in steps if step]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: Any) -> Any:
    """Return the value, or None for NaN and infinities, which JSON cannot store."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_line(file: TextIO, text: str) -> None:
    try:
        file.write(text + "\n")
    except OSError as error:
        # Python's error for a full disk has no file name
        error.filename = file.name
        raise


def _open_for_lines(path: Path) -> TextIO:
    # remove an incomplete last line: the next line would be appended to it
    if path.exists():
        data = read_file(path)
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    return open(path, "a", buffering=1, encoding="utf-8")


def _nvidia_smi() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi: not installed"
    return subprocess.run([command], capture_output=True, text=True, check=False).stdout.rstrip()

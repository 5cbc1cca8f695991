"""The record of one run: submission.json, README.md and plots in its folder, rendered from its summary and metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from train.artifact import read_artifact
from train.common.errors import UserError
from train.common.files import atomic_write, read_json
from train.common.wording import counted
from train.config import Config
from train.data.manifest import read_manifest
from train.evaluate.scores import find_evaluation
from train.run.folder import RunFolder
from train.run.logger import read_metrics, resumed_steps
from train.submission.plots import plot_bpb, plot_loss, plot_size_budget
from train.submission.summary import Summary, group_bytes, recurrence_note, size_line, stage_line, summary_text

TRACKS = ("10min_16mb", "non-record-16mb")


def write_record(
    run_dir: str | os.PathLike[str],
    summary: Summary | None = None,
    *,
    author: str | None = None,
    github_id: str | None = None,
    name: str | None = None,
    blurb: str | None = None,
    track: str = "non-record-16mb",
) -> list[Path]:
    """Write a finished run's record into its folder; what stood there before is replaced file by file.

    Args:
        run_dir: the run's folder, with config.json, metrics.jsonl and, unless `summary` is given, summary.json.
        summary: the run's numbers.
        author, github_id: who submits; None: git's user.name and github.user, or empty where git has none.
        name: title of the submission; None: the recipe's name.
        blurb: one sentence about it; None: one made of the numbers.
        track: a name in `TRACKS`.

    Returns:
        The files written.

    Raises:
        UserError: a file of the run is missing or unreadable, or its metrics hold no curve.
    """
    folder = RunFolder(Path(run_dir))
    config = folder.read_config()
    summary = summary or Summary.read(folder.summary)
    records = read_metrics(folder.path / "metrics.jsonl")
    submission = submission_json(
        summary,
        config,
        author=git_setting("user.name") if author is None else author,
        github_id=git_setting("github.user") if github_id is None else github_id,
        name=name or summary.recipe,
        blurb=blurb,
        track=track,
    )
    paths = [folder.path / item for item in ("loss.png", "bpb.png", "size_budget.png", "submission.json", "README.md")]
    plot_loss(paths[0], records, summary)
    plot_bpb(paths[1], records, summary, validation="flat", evaluation=evaluation(config))
    plot_size_budget(paths[2], summary)
    atomic_write(paths[3], json.dumps(submission, indent=2, ensure_ascii=False) + "\n")
    atomic_write(paths[4], readme(summary, config, submission["name"]))
    return paths


def record_run(folder: RunFolder) -> str:
    """Gather a finished run's numbers, write its summary and its record, and return the block that it ends with."""
    summary = summarize(folder)
    summary.write(folder.summary)
    write_record(folder.path, summary)
    return summary_text(summary, folder.path)


def submission_json(
    summary: Summary, config: Config, *, author: str, github_id: str, name: str, blurb: str | None, track: str
) -> dict[str, Any]:
    """The record's json: the 14 keys that published records share, then what this program adds.

    One seed has no deviation, so `val_bpb_std` is null. `artifact_bytes` counts code and model, as published.
    """
    seed_result = {
        "val_loss": round(summary.val_loss, 8),
        "val_bpb": round(summary.val_bpb, 8),
        "artifact_bytes": summary.bytes_total,
        "steps": summary.steps,
        "step_avg_ms": round(summary.step_avg_ms, 2),
        "eval_time_s": round(summary.eval_seconds, 3),
    }
    return {
        "author": author,
        "github_id": github_id,
        "name": name,
        "blurb": " ".join(filter(None, (summary.label, blurb))) if blurb else default_blurb(summary, config),
        "date": summary.date[:10],
        "track": track,
        "val_loss": seed_result["val_loss"],
        "val_bpb": seed_result["val_bpb"],
        "val_bpb_std": None,
        "seeds": [summary.seed],
        "seed_results": {str(summary.seed): seed_result},
        "bytes_total": summary.bytes_total,
        "bytes_code": summary.bytes_code,
        "hardware": summary.hardware,
        "bytes_model": summary.bytes_model,
        "pytorch_version": summary.torch,
        "train_time_seconds": round(summary.train_seconds, 3),
        **({"bytes_paid_prefix": summary.bytes_prefix} if summary.bytes_prefix else {}),
        **({"label": summary.label} if summary.label else {}),
        "pre_quant_val_bpb": None if summary.prequant_val_bpb is None else round(summary.prequant_val_bpb, 8),
    }


def default_blurb(summary: Summary, config: Config) -> str:
    """One sentence made of the run's numbers."""
    return (
        f"{f'{summary.label}. ' if summary.label else ''}Recipe {summary.recipe}: {summary.parameters:,} parameters, {counted(summary.steps, 'step')} in {summary.train_seconds:.1f} s "
        f"on {summary.hardware}; {form(config)} artifact and code take {summary.bytes_total:,} bytes and score "
        f"{summary.val_bpb:.4f} bits per byte ({evaluation(config)})."
    )


def readme(summary: Summary, config: Config, name: str) -> str:
    """The README of the run; every number in it is the summary's."""
    bits = [
        (f"**artifact, {evaluation(config)}**", f"**{summary.val_bpb:.8f}**"),
        ("artifact, flat", _bpb(summary.flat_val_bpb)),
        ("before quantization, flat", _bpb(summary.prequant_val_bpb)),
        ("before training, flat", _bpb(summary.step0_val_bpb)),
        *((f"{compressor}, for comparison", _bpb(value)) for compressor, value in summary.yardsticks.items()),
    ]
    facts = [
        ("val_loss (nats per token)", f"{summary.val_loss:.8f}"),
        (
            "scored",
            f"{summary.tokens:,} tokens, {summary.bytes:,} bytes as normalized, in {summary.eval_seconds:.1f} s",
        ),
        ("steps", f"{summary.steps:,}"),
        *((("recurrence", note),) if (note := recurrence_note(summary)) else ()),
        ("ms per step", f"{summary.step_avg_ms:.2f}"),
        ("training clock (s)", f"{summary.train_seconds:.1f}"),
        ("seconds per stage", stage_line(summary)),
        ("bytes", size_line(summary)),
        *((f"bytes of {group}", f"{size:,}") for group, size in summary.model_groups.items()),
        ("parameters", f"{summary.parameters:,}"),
        ("hardware", summary.hardware),
        ("versions", f"Python {summary.python}, PyTorch {summary.torch}"),
    ]
    return "\n".join(
        [
            f"# {name}: {summary.val_bpb:.4f} bits per byte{f' ({summary.label})' if summary.label else ''}",
            "",
            f"Run `{summary.run_id}` of {summary.date}: recipe `{summary.recipe}`, seed {summary.seed}.",
            "",
            *_table(("validation", "bits per byte"), [row for row in bits if row[1]]),
            "",
            *_table(("measured", ""), facts),
            "",
            "![Loss over steps and seconds](loss.png)",
            "",
            "![Bits per byte over steps and seconds](bpb.png)",
            "",
            "![Bytes of code and model against the cap](size_budget.png)",
            "",
            "`config.json` holds every setting of the run, `metrics.jsonl` the points of the curves and "
            f"`train_seed{summary.seed}.log` its log. The artifact is scored again with",
            "",
            f"    python -m train.evaluate {config.runs_dir}/{summary.run_id}",
            "",
        ]
    )


def evaluation(config: Config) -> str:
    """How the final score was made, in words."""
    if config.eval_stride == 0:
        return f"flat, rows of {config.window}"
    rule = "" if config.eval_rule == "once" else f", rule {config.eval_rule}"
    return f"sliding window {config.window}, stride {config.eval_stride}{rule}"


def form(config: Config) -> str:
    """How the artifact is stored, in words."""
    return f"int{config.matrix_bits} {config.quantizer} + {config.codec}"


def _bpb(value: float | None) -> str:
    return "" if value is None else f"{value:.8f}"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]


def git_setting(key: str) -> str:
    """A value of git's configuration; empty where there is no git or no such value."""
    git = shutil.which("git")
    if git is None:
        return ""
    return subprocess.run([git, "config", key], capture_output=True, text=True, check=False).stdout.strip()


def summarize(folder: RunFolder) -> Summary:
    """Gather a run's numbers from what its stages left in its folder.

    Raises:
        UserError: a stage has not run, or the artifact is newer than its score.
    """
    config, asked = folder.trained_config(), folder.read_config()
    training = folder.read_training(
        steps=int, seconds=float, date=str, hardware=str, torch=str, python=str, first=dict, last=dict
    )
    score = find_evaluation(folder, config)
    flat = find_evaluation(folder, config.replace(eval_stride=0))
    artifact = read_artifact(folder.artifact)
    # as logged when the artifact was written: the sources may have changed since
    records = read_metrics(folder.metrics)
    sizes = [record for record in records if record["kind"] == "sizes" and isinstance(record.get("code_bytes"), int)]
    if not sizes:
        raise UserError(f"{folder.metrics}: no sizes in it: run python -m train.quantize {folder.path} again")
    stage_seconds = read_json(folder.stages, "delete it") if folder.stages.exists() else {}
    resumed = resumed_steps(records)
    if resumed:
        # no process saw all of it, and what a kill lost is in none of its steps
        stage_seconds["train"] = training["seconds"]
    bytes_code, bytes_prefix = sizes[-1]["code_bytes"], sizes[-1].get("prefix_bytes", 0)
    manifest = read_manifest(config.data_path)
    return Summary(
        run_id=folder.path.name,
        recipe=config.recipe,
        seed=config.seed,
        date=training["date"],
        steps=training["steps"],
        step_avg_ms=1000 * training["seconds"] / max(training["steps"], 1),
        train_seconds=training["seconds"],
        stage_seconds=stage_seconds,
        resumed=resumed,
        recurrence_missed=0 if asked.recur_layers == config.recur_layers else asked.recur_start_step,
        val_loss=score["val_loss"],
        val_bpb=score["val_bpb"],
        eval_seconds=score["seconds"],
        tokens=score["tokens"],
        bytes=score["bytes"],
        bytes_code=bytes_code,
        bytes_model=artifact.info.model_bytes,
        bytes_prefix=bytes_prefix,
        bytes_total=bytes_code + bytes_prefix + artifact.info.model_bytes,
        max_bytes=config.max_artifact_bytes,
        target_bytes=config.pruning_target_bytes,
        parameters=sum(tensor.shape.numel() for tensor in artifact.tensors.values()),
        hardware=training["hardware"],
        torch=training["torch"],
        python=training["python"],
        step0_val_bpb=training["first"].get("val_bpb"),
        prequant_val_bpb=training["last"].get("val_bpb"),
        flat_val_bpb=flat["val_bpb"],
        yardsticks={
            f"{name} after the training text": value
            for name, value in (manifest.yardsticks if manifest else {}).items()
        },
        label=score.get("label", ""),
        model_groups=group_bytes(artifact.info.rows()),
    )

"""Gathers a run's numbers from its folder, and writes the run's submission.json, README.md and plots."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.artifact.storage import read_artifact
from train.common.errors import UserError
from train.common.files import atomic_write, read_json
from train.common.wording import counted
from train.config import Config
from train.data.manifest import read_manifest
from train.evaluate.scores import find_evaluation
from train.run.folder import RunFolder
from train.run.logger import read_metrics, resumed_steps
from train.submission.plots import plot_bpb, plot_loss, plot_size_budget
from train.submission.summary import (
    Summary,
    group_bytes,
    mean_and_deviation,
    recurrence_note,
    size_line,
    stage_line,
    stopped_note,
    summary_text,
)


def git_setting(key: str) -> str:
    """Return a value of git's configuration, or "" if git or the value is missing."""
    git = shutil.which("git")
    if git is None:
        return ""
    return subprocess.run([git, "config", key], capture_output=True, text=True, check=False).stdout.strip()


@dataclass(frozen=True)
class RecordDetails:
    """Facts about a record that only its author knows.

    Attributes:
        author, github_id: the author's name and GitHub name; default: `user.name` and `github.user` of git's settings.
        name: the record's title; empty: use the recipe's name.
        blurb: one sentence about the record; empty: `submission_json` writes a sentence from the numbers.
        track: name of the leaderboard, such as `non-record-16mb`.
    """

    author: str = field(default_factory=lambda: git_setting("user.name"))
    github_id: str = field(default_factory=lambda: git_setting("github.user"))
    name: str = ""
    blurb: str = ""
    track: str = "non-record-16mb"


def record_run(folder: RunFolder) -> str:
    """Write the summary and the record of a finished run. Return the text of the summary."""
    summary = summarize(folder)
    write_record(folder, summary)
    return summary_text(summary, folder.path)


def summarize(folder: RunFolder) -> Summary:
    """Gather a run's numbers from the files that its stages wrote into its folder.

    Raises:
        UserError: a stage has not run, or the artifact has not been scored since it was written.
    """
    config, started = folder.trained_config(), folder.read_config()
    training = folder.read_training(
        steps=int, seconds=float, date=str, hardware=str, torch=str, python=str, first=dict, last=dict
    )
    score = find_evaluation(folder, config)
    flat = find_evaluation(folder, config.replace(eval_stride=0))
    artifact = read_artifact(folder.artifact)
    # take the code's size from the metrics, because the sources may have changed since the artifact was written
    records = read_metrics(folder.metrics)
    sizes = [record for record in records if record["kind"] == "sizes" and isinstance(record.get("code_bytes"), int)]
    if not sizes:
        raise UserError(f"{folder.metrics}: no sizes in it: run python -m train.quantize {folder.path} again")
    stage_seconds = read_json(folder.stages, "delete it") if folder.stages.exists() else {}
    resumed = resumed_steps(records)
    if resumed:
        # several processes trained, so no process measured the whole stage
        stage_seconds["train"] = training["seconds"]
    bytes_code, bytes_prefix = sizes[-1]["code_bytes"], sizes[-1].get("prefix_bytes", 0)
    manifest = read_manifest(folder.find_data(config).data_path)
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
        steps_planned=config.iterations
        if config.warmdown_by == "steps" and training["steps"] < config.iterations
        else 0,
        recurrence_missed=0
        if started.recur_layers == config.recur_layers
        else started.recur_start_frac or started.recur_start_step,
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
            f"{name} primed with the training text": value
            for name, value in (manifest.yardsticks if manifest else {}).items()
        },
        label=score.get("label", ""),
        model_groups=group_bytes(artifact.info.rows()),
    )


def write_record(folder: RunFolder, summary: Summary, details: RecordDetails | None = None) -> list[Path]:
    """Write the summary and the record of a finished run into its folder. Existing files are replaced.

    Returns:
        Paths of the record's files.

    Raises:
        UserError: a file of the run is missing or unreadable, or metrics.jsonl holds no loss or no validation.
    """
    config = folder.read_config()
    records = read_metrics(folder.metrics)
    submission = submission_json([summary], config, details or RecordDetails(), summary.bytes_code) | {
        "train_time_seconds": round(summary.train_seconds, 3),
        "pre_quant_val_bpb": _rounded(summary.prequant_val_bpb),
    }
    summary.write(folder.summary)
    paths = [folder.path / item for item in ("loss.png", "bpb.png", "size_budget.png", "submission.json", "README.md")]
    plot_loss(paths[0], records, summary)
    plot_bpb(paths[1], records, summary, describe_evaluation(config))
    plot_size_budget(paths[2], summary)
    atomic_write(paths[3], json.dumps(submission, indent=2, ensure_ascii=False) + "\n")
    atomic_write(paths[4], run_readme(summary, config, submission["name"]))
    return paths


def submission_json(
    summaries: Sequence[Summary], config: Config, details: RecordDetails, code_bytes: int
) -> dict[str, Any]:
    """Return the contents of submission.json: the 14 keys of published records, then further keys.

    Args:
        summaries: one summary per seed.
        config: settings of the first run.
        details: facts that the author gives.
        code_bytes: bytes of the shipped code. The key `artifact_bytes` is the sum of code, model and paid prefix.
    """
    results = {str(summary.seed): _seed_result(summary, code_bytes) for summary in summaries}
    # compute mean and deviation from the rounded scores, so that a reader of the file gets the same results
    bpb, bpb_std = mean_and_deviation([result["val_bpb"] for result in results.values()])
    loss, loss_std = mean_and_deviation([result["val_loss"] for result in results.values()])
    first, largest = summaries[0], max(summaries, key=lambda summary: summary.bytes_model)
    bytes_total = results[str(largest.seed)]["artifact_bytes"]
    return {
        "author": details.author,
        "github_id": details.github_id,
        "name": details.name or config.recipe,
        "blurb": first.labelled(details.blurb or _blurb(summaries, config, bpb, bytes_total)),
        "date": max(summary.date for summary in summaries)[:10],
        "track": details.track,
        "val_loss": _rounded(loss),
        "val_bpb": _rounded(bpb),
        "val_bpb_std": _rounded(bpb_std),
        "seeds": [summary.seed for summary in summaries],
        "seed_results": results,
        "bytes_total": bytes_total,
        "bytes_code": code_bytes,
        "hardware": first.hardware,
        "bytes_model": largest.bytes_model,
        **({"bytes_paid_prefix": first.bytes_prefix} if first.bytes_prefix else {}),
        **({"label": first.label} if first.label else {}),
        "val_loss_std": _rounded(loss_std),
        "pytorch_version": first.torch,
        "python_version": first.python,
    }


def _seed_result(summary: Summary, code_bytes: int) -> dict[str, Any]:
    result = {
        "val_loss": _rounded(summary.val_loss),
        "val_bpb": _rounded(summary.val_bpb),
        "artifact_bytes": summary.bytes_model + summary.bytes_prefix + code_bytes,
        "steps": summary.steps,
        "step_avg_ms": round(summary.step_avg_ms, 2),
        "eval_time_s": round(summary.eval_seconds, 3),
        "bytes_model": summary.bytes_model,
        "train_time_s": round(summary.train_seconds, 3),
    }
    if summary.prequant_val_bpb is not None:
        result["pre_quant_val_bpb"] = _rounded(summary.prequant_val_bpb)
    return result


def _blurb(summaries: Sequence[Summary], config: Config, bpb: float, bytes_total: int) -> str:
    fewest, most = (pick(summary.steps for summary in summaries) for pick in (min, max))
    steps = f"{fewest:,} to {most:,} steps" if fewest < most else counted(most, "step")
    seeds = f" as the mean of {len(summaries)} seeds" if len(summaries) > 1 else ""
    return (
        f"Recipe {config.recipe}: {summaries[0].parameters:,} parameters, {steps} on {summaries[0].hardware}; "
        f"{artifact_format(config)} artifact and code take {bytes_total:,} bytes and score {bpb:.4f} bits per byte"
        f"{seeds} ({describe_evaluation(config)})."
    )


def run_readme(summary: Summary, config: Config, name: str) -> str:
    """Return the text of a run's README.md."""
    scores: list[tuple[str, float | None]] = [
        ("artifact, non-overlapping windows", summary.flat_val_bpb),
        ("before quantization, non-overlapping windows", summary.prequant_val_bpb),
        ("before training, non-overlapping windows", summary.step0_val_bpb),
        *((f"for comparison: {compressor}", value) for compressor, value in summary.yardsticks.items()),
    ]
    facts = [
        ("val_loss (nats per token)", f"{summary.val_loss:.8f}"),
        (
            "evaluation",
            f"{summary.tokens:,} tokens, {summary.bytes:,} bytes of text, {summary.eval_seconds:.1f} s",
        ),
        ("training steps", stopped_note(summary) or f"{summary.steps:,}"),
        *((("recurrence", note),) if (note := recurrence_note(summary)) else ()),
        ("ms per step", f"{summary.step_avg_ms:.2f}"),
        ("training time (s)", f"{summary.train_seconds:.1f}"),
        ("seconds per stage", stage_line(summary)),
        ("size", size_line(summary)),
        *((f"bytes of {group}", f"{size:,}") for group, size in summary.model_groups.items()),
        ("parameters", f"{summary.parameters:,}"),
        ("hardware", summary.hardware),
        ("versions", f"Python {summary.python}, PyTorch {summary.torch}"),
    ]
    return "\n".join(
        [
            title(name, summary.val_bpb, summary.label),
            "",
            f"This is run `{summary.run_id}` of {summary.date}: recipe `{summary.recipe}`, seed {summary.seed}. "
            "Scores are bits per byte of the validation text after SentencePiece's normalization; with case operators, of the original text.",
            "",
            *table(
                ("score", "bits per byte"),
                [
                    (f"**artifact, {describe_evaluation(config)}**", f"**{summary.val_bpb:.8f}**"),
                    *((label, f"{value:.8f}") for label, value in scores if value is not None),
                ],
            ),
            "",
            *table(("measurement", "value"), facts),
            "",
            "![Loss over steps and seconds](loss.png)",
            "",
            "![Bits per byte over steps and seconds](bpb.png)",
            "",
            "![Bytes of code and model against the cap](size_budget.png)",
            "",
            f"`config.json` holds the run's settings, `metrics.jsonl` the points of the curves, `train_seed{summary.seed}.log` "
            "the log. To score the artifact again:",
            "",
            f"    python -m train.evaluate {config.runs_dir}/{summary.run_id}",
            "",
        ]
    )


def title(name: str, bpb: float, label: str) -> str:
    """Return the first line of a README."""
    return f"# {name}: {bpb:.4f} bits per byte{f' ({label})' if label else ''}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def describe_evaluation(config: Config) -> str:
    """Describe the windows of the final evaluation. Name `eval_rule` unless it is "once"."""
    if config.eval_stride == 0:
        return f"non-overlapping windows of {config.window}"
    rule = "" if config.eval_rule == "once" else f", rule {config.eval_rule}"
    return f"sliding window {config.window}, stride {config.eval_stride}{rule}"


def artifact_format(config: Config) -> str:
    """Describe how the artifact stores the weights: bits, quantizer and codec."""
    return f"int{config.matrix_bits} {config.quantizer} + {config.codec}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 8)

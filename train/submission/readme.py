"""Writes the README.md of a record folder from the numbers of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.common.wording import counted
from train.config import LOCAL
from train.submission.bases import Base
from train.submission.record import artifact_format, describe_evaluation, table, title
from train.submission.record_scores import RecordScores, scored_text
from train.submission.runs import FinishedRun
from train.submission.statistics import compare, incomparable
from train.submission.summary import STAGES, resumed_note

_CODE_FORMS = {
    "": "train_gpt.py and the modules of train and golf_kernels that it imports",
    "plain": "one file",
    "wrapped": "one file, minified and compressed",
    "raw": "one file, minified and compressed to bytes that are not UTF-8",
}


def record_readme(
    runs: Sequence[FinishedRun], submission: dict[str, Any], single_file: str, base: Base, proof: str
) -> str:
    """Return the text of README.md.

    Args:
        runs: one run per seed.
        submission: the contents of submission.json.
        single_file: form of the packed train_gpt.py, one of `train.single_file.pack.FORMS`; empty: not packed.
        base: the recipe, run or record to which the README compares this record.
        proof: a sentence that says how the script was checked.
    """
    first, config = runs[0], runs[0].config
    deviation = "" if submission["val_bpb_std"] is None else f" ± {submission['val_bpb_std']:.8f}"
    return "\n".join(
        [
            title(submission["name"], submission["val_bpb"], first.summary.label),
            "",
            f"**val_bpb {submission['val_bpb']:.8f}**{deviation} over {counted(len(runs), 'seed')}, "
            f"{describe_evaluation(config)}. {first.summary.parameters:,} parameters, {counted(config.num_layers, 'layer')} "
            f"of width {config.model_dim}, vocabulary {config.vocab_size:,}, {artifact_format(config)}. {submission['hardware']}.",
            "",
            submission["blurb"],
            "",
            "## Results",
            "",
            *_results(runs, submission),
            "",
            f"## Differences from {base.name}",
            "",
            *_differences(first, submission, base),
            "",
            "## Reproduce",
            "",
            *_commands(runs),
            "",
            "## Size",
            "",
            *_sizes(runs, submission),
            "",
            f"Code: {_CODE_FORMS[single_file]}. {proof}",
            "",
            "## Time",
            "",
            *_times(runs),
            "",
            "## Hardware, versions, data",
            "",
            *_machine(first, submission),
            "",
        ]
    )


def _results(runs: Sequence[FinishedRun], submission: dict[str, Any]) -> list[str]:
    head = ("seed", "val_bpb", "val_loss", "val_bpb before quantization", "steps", "ms per step", "bytes")
    rows = []
    for run in runs:
        result = submission["seed_results"][run.seed]
        before = result.get("pre_quant_val_bpb")
        rows.append(
            (run.seed, f"**{result['val_bpb']:.8f}**", f"{result['val_loss']:.8f}", "" if before is None else f"{before:.8f}",
             f"{result['steps']:,}", f"{result['step_avg_ms']:.2f}", f"{result['artifact_bytes']:,}")
        )  # fmt: skip
    rows.append(("mean", f"**{submission['val_bpb']:.8f}**", f"{submission['val_loss']:.8f}", "", "", "", ""))
    if submission["val_bpb_std"] is not None:
        rows.append(("std", f"{submission['val_bpb_std']:.8f}", f"{submission['val_loss_std']:.8f}", "", "", "", ""))
    facts = submission["evaluation"]
    scored = (
        f"The evaluation scored {facts['tokens']:,} of {facts['validation_tokens']:,} validation tokens ({facts['bytes']:,} bytes) "
        f"in {facts['windows']:,} windows, rule `{facts['rule']}`."
    )
    return [*table(head, rows), "", scored]


def _differences(run: FinishedRun, submission: dict[str, Any], base: Base) -> list[str]:
    compared = base if base.settings is not None else Base.of_recipe(run.config.recipe)
    before = compared.settings or {}
    changed = [
        (f"`{name}`", _value(before[name]), _value(value))
        for name, value in run.folder.read_config().to_dict().items()
        if name not in LOCAL and name in before and before[name] != value
    ]
    lines = (
        table(("setting", compared.name, "this record"), changed)
        if changed
        else [f"No setting differs from {compared.name}."]
    )
    if compared is not base:
        lines = [f"The settings of {base.name} are not known.", "", *lines]
    if base.scores is not None and len(submission["seeds"]) > 1:
        results = submission["seed_results"]
        bpb, loss = (tuple(result[name] for result in results.values()) for name in ("val_bpb", "val_loss"))
        ours = RecordScores(submission["name"], tuple(results), bpb, loss, scored_text(submission))
        reason = incomparable(ours, base.scores)
        lines += ["", *([f"Not compared: {reason}."] if reason else ["```", compare(ours, base.scores).text(), "```"])]
    return lines


def _commands(runs: Sequence[FinishedRun]) -> list[str]:
    config = runs[0].config
    data = f"DATA_PATH={config.data_path} "
    if config.tokenizer_path:
        data += f"TOKENIZER_PATH={config.tokenizer_path} "
    processes = runs[0].log["facts"].get("world_size", 1)
    return [
        "```bash",
        "pip install -r requirements.txt",
        *(f"SEED={run.seed} {data}torchrun --standalone --nproc_per_node={processes} train_gpt.py" for run in runs),
        "```",
        "",
        "The script contains all other settings; `config.json` lists those that differ from the defaults.",
    ]


def _sizes(runs: Sequence[FinishedRun], submission: dict[str, Any]) -> list[str]:
    largest = max(runs, key=lambda run: run.summary.bytes_model).summary
    parts = {**largest.byte_parts, "code": submission["bytes_code"]}
    rows = [(part, f"{size:,}") for part, size in parts.items()]
    rows.append(("**total**", f"**{submission['bytes_total']:,}**"))
    rows.append((f"left of {largest.max_bytes:,}", f"{largest.max_bytes - submission['bytes_total']:,}"))
    return [
        f"Seed {largest.seed} has the largest artifact, {largest.bytes_model:,} bytes:",
        "",
        *table(("part", "bytes"), rows),
    ]


def _times(runs: Sequence[FinishedRun]) -> list[str]:
    stages = [stage for stage in STAGES if any(stage in run.summary.stage_seconds for run in runs)]
    head = ("seed", "training time", "calibration", "evaluation", *(f"{stage} stage" for stage in stages))
    rows = []
    for run in runs:
        calibration = "none" if run.calibration_seconds is None else f"{run.calibration_seconds:.1f}"
        seconds = (f"{run.summary.stage_seconds.get(stage, 0.0):.1f}" for stage in stages)
        rows.append(
            (run.seed, f"{run.summary.train_seconds:.3f}", calibration, f"{run.summary.eval_seconds:.3f}", *seconds)
        )
    note = "Times in seconds. The training time covers the steps; calibration on training data follows and counts as training too."
    resumed = [f" Seed {run.seed}: {said}." for run in runs if (said := resumed_note(run.summary))]
    return [*table(head, rows), "", note + "".join(resumed)]


def _machine(run: FinishedRun, submission: dict[str, Any]) -> list[str]:
    tokenizer = submission["tokenizer"]
    return [
        f"- {submission['hardware']}, Python {submission['python_version']}, PyTorch {submission['pytorch_version']}",
        f"- data `{Path(run.config.data_path).name}`; tokenizer `{tokenizer['file']}`, {tokenizer['vocab_size']:,} pieces, sha256 "
        f"`{tokenizer['sha256']}`",
        f"- check of the byte count: {tokenizer['finding']}",
    ]


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}" or "–"

"""README.md of a record folder: every number in it is read from the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.common.wording import counted
from train.config import LOCAL
from train.submission.record import evaluation, form
from train.submission.record_scores import Base, RecordScores, scored_text
from train.submission.runs import FinishedRun
from train.submission.statistics import comparison_text, incomparable
from train.submission.summary import STAGES, resumed_note

_FORM_NAMES = {
    "plain": "one file",
    "wrapped": "one file, minified and compressed",
    "raw": "one file, minified and compressed to bytes that are no UTF-8",
}


def record_readme(
    runs: Sequence[FinishedRun], submission: dict[str, Any], single_file: str, base: Base, proof: str
) -> str:
    """The README.

    Args:
        runs: one per seed.
        submission: submission.json.
        single_file: form of the script; empty: modules in folders.
        base: what it is compared with.
        proof: how the script was proven.
    """
    first, config = runs[0], runs[0].config
    parameters = f"{first.summary.parameters:,} parameters"
    shape = f"{counted(config.num_layers, 'layer')} of width {config.model_dim}, vocabulary {config.vocab_size:,}"
    label = first.summary.label
    lines = [
        f"# {submission['name']}: {submission['val_bpb']:.4f} bits per byte{f' ({label})' if label else ''}",
        "",
        f"**val_bpb {submission['val_bpb']:.8f}**{_deviation(submission['val_bpb_std'])} over {len(runs)} "
        f"seed{'s' if len(runs) > 1 else ''}, {evaluation(config)}. {parameters}, {shape}, {form(config)}. "
        f"{submission['hardware']}.",
        "",
        submission["blurb"],
        "",
        "## Results",
        "",
        *_results(runs, submission),
        "",
        f"## What is different from {base.name}",
        "",
        *_differences(first, submission, base),
        "",
        "## Reproduce",
        "",
        *_commands(runs),
        "",
        "## Bytes",
        "",
        *_budget(runs, submission),
        "",
        f"The code is {_FORM_NAMES.get(single_file, 'train_gpt.py with the modules of train and golf_kernels that it imports')}: {proof}.",
        "",
        "## Time",
        "",
        *_times(runs),
        "",
        *_machine(first, submission),
        "",
    ]
    return "\n".join(lines)


def _deviation(value: float | None) -> str:
    return "" if value is None else f" ± {value:.8f}"


def _results(runs: Sequence[FinishedRun], submission: dict[str, Any]) -> list[str]:
    head = ("seed", "val_bpb", "val_loss", "before quantization", "steps", "ms per step", "bytes")
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
        rows.append(
            ("deviation", f"{submission['val_bpb_std']:.8f}", f"{submission['val_loss_std']:.8f}", "", "", "", "")
        )
    facts = submission["evaluation"]
    scored = (
        f"Scored: {facts['tokens']:,} of the {facts['validation_tokens']:,} tokens of the validation text, {facts['bytes']:,} bytes, "
        f"in {facts['windows']:,} windows, rule `{facts['rule']}`."
    )
    return [*_table(head, rows), "", scored]


def _differences(run: FinishedRun, submission: dict[str, Any], base: Base) -> list[str]:
    named = base if base.settings is not None else Base.of_recipe(run.config)
    before = named.settings or {}
    changed = [
        (f"`{name}`", _value(before[name]), _value(value))
        for name, value in run.folder.read_config().to_dict().items()
        if name not in LOCAL and name in before and before[name] != value
    ]
    none = f"Its settings are not known; against {named.name} no setting is different."
    lines = _table(("setting", named.name, "here"), changed)
    if not changed:
        lines = ["No setting."] if named is base else [none]
    if base.scores is not None and len(submission["seeds"]) > 1:
        results = submission["seed_results"]
        bpb, loss = (tuple(result[name] for result in results.values()) for name in ("val_bpb", "val_loss"))
        ours = RecordScores(submission["name"], tuple(results), bpb, loss, scored_text(submission))
        reason = incomparable(ours, base.scores)
        compared = [f"Not compared: {reason}."] if reason else ["```", comparison_text(ours, base.scores), "```"]
        lines += ["", *compared]
    return lines


def _commands(runs: Sequence[FinishedRun]) -> list[str]:
    config = runs[0].config
    world = runs[0].log["facts"].get("world_size", 1)
    launch = f"torchrun --standalone --nproc_per_node={world} train_gpt.py"
    data = f"DATA_PATH={config.data_path} "
    if config.tokenizer_path:
        data += f"TOKENIZER_PATH={config.tokenizer_path} "
    return [
        "```bash",
        "pip install -r requirements.txt",
        *(f"SEED={run.seed} {data}{launch}" for run in runs),
        "```",
        "",
        "Every other setting is in the script, and in `config.json`.",
    ]


def _budget(runs: Sequence[FinishedRun], submission: dict[str, Any]) -> list[str]:
    largest = max(runs, key=lambda run: run.summary.bytes_model).summary
    spare = largest.max_bytes - submission["bytes_total"]
    rows = [(group, f"{size:,}") for group, size in largest.model_groups.items()]
    rows += [("paid prefix", f"{largest.bytes_prefix:,}")] if largest.bytes_prefix else []
    rows += [("model", f"{largest.bytes_model:,}"), ("code", f"{submission['bytes_code']:,}")]
    rows.append(("**total**", f"**{submission['bytes_total']:,}**"))
    rows.append((f"to the limit of {largest.max_bytes:,}", f"{spare:,}"))
    return [f"Of seed {largest.seed}, the largest:", "", *_table(("part", "bytes"), rows)]


def _times(runs: Sequence[FinishedRun]) -> list[str]:
    stages = [stage for stage in STAGES if any(stage in run.summary.stage_seconds for run in runs)]
    head = (
        "seed",
        "training clock (s)",
        "calibration (s)",
        "evaluation (s)",
        *(f"stage {stage} (s)" for stage in stages),
    )
    rows = []
    for run in runs:
        extra = run.calibration_seconds
        cells = [
            f"{run.summary.train_seconds:.3f}",
            "none" if extra is None else f"{extra:.1f}",
            f"{run.summary.eval_seconds:.3f}",
        ]
        cells += [f"{run.summary.stage_seconds.get(stage, 0.0):.1f}" for stage in stages]
        rows.append((run.seed, *cells))
    note = "The training clock holds the steps alone; what is calibrated on training data comes behind it and counts with it."
    resumed = [f" Seed {run.seed}: {said}." for run in runs if (said := resumed_note(run.summary))]
    return [*_table(head, rows), "", note + "".join(resumed)]


def _machine(run: FinishedRun, submission: dict[str, Any]) -> list[str]:
    tokenizer = submission["tokenizer"]
    return [
        "## Machine, versions, data",
        "",
        f"- {submission['hardware']}, Python {submission['python_version']}, PyTorch {submission['pytorch_version']}",
        f"- data: `{Path(run.config.data_path).name}`; tokenizer `{tokenizer['file']}`, {tokenizer['vocab_size']:,} pieces, sha256 "
        f"`{tokenizer['sha256']}`",
        f"- bytes counted twice: {tokenizer['finding']}",
    ]


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}" or "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]

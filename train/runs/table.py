"""Formats the table of runs, and the page about one run."""

from __future__ import annotations

from collections.abc import Sequence

from train.common.errors import UserError
from train.recipes import recipe_names
from train.run.folder import RunFolder
from train.runs.read import Run, printable, read_run
from train.submission.summary import summary_text

HEAD = ("run", "status", "bpb", "text", "steps", "seconds", "bytes", "recipe and what differs from it")
_RIGHT = ("bpb", "steps", "seconds", "bytes")


def runs_table(folders: Sequence[RunFolder], width: int | None) -> str:
    """Return a table with one line per run. If a run cannot be read, its line says why.

    Lines are cut to `width` characters; None: not cut.
    """
    rows: list[tuple[str, ...]] = [HEAD]
    texts, validated = set(), False
    for folder in folders:
        try:
            run = read_run(folder)
        except UserError as error:
            rows.append((folder.path.name, "damaged", "", "", "", "", "", str(error)))
            continue
        rows.append(_row(run))
        texts.add(run.text)
        validated |= not run.summary and bool(run.curve)
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(size) if title in _RIGHT else cell.ljust(size)
            for title, cell, size in zip(HEAD, row, widths, strict=False)
        ]
        lines.append(_cut("  ".join([*cells, row[-1]]).rstrip(), width))
    if validated:
        lines.append("~ the last validation during training, before quantization; not the artifact's score")
    if len(texts) > 1:
        lines.append("scores on different texts are not comparable")
    return "\n".join(lines)


def _row(run: Run) -> tuple[str, ...]:
    summary = run.summary
    score = f"{summary.val_bpb:.4f}" if summary else f"{run.curve[-1][2]:.4f}~" if run.curve else "-"
    if summary and summary.label:
        score = f"{summary.label.partition(':')[0]} {score}"
    steps = f"{run.steps:,}" if run.status in ("finished", "trained") else f"{run.steps:,}/{run.config.iterations:,}"
    size = f"{summary.bytes_total:,}" if summary else "-"
    differs = " ".join([run.config.recipe, *run.differences])
    return run.folder.path.name, run.status, score, run.text, steps, f"{run.seconds:,.1f}", size, differs


def run_page(run: Run) -> str:
    """Describe a run: numbers, settings that differ from the recipe, and files."""
    if run.summary:
        lines = [summary_text(run.summary, run.folder.path)]
    else:
        done = f"step {run.steps:,} of at most {run.config.iterations:,}, {run.seconds:,.1f} s"
        lines = [
            f"{printable(run.folder.path.name)} (recipe {run.config.recipe}, seed {run.config.seed})",
            f"  training   {done}",
        ]
        if run.curve:
            lines.append(f"  val_bpb    {run.curve[-1][2]:.4f} at step {run.curve[-1][0]:,}, before quantization")
        lines.append(f"  folder     {run.folder.path}")
    lines.append(f"  status     {run.status}")
    if run.status in ("interrupted", "trained"):
        lines.append(f"  resume     {resume_command(run)}")
    known = run.config.recipe in recipe_names()
    lines += ["", f"differs from recipe {run.config.recipe}:" if known else "settings:"]
    lines += [f"  {line}" for line in run.differences or ["nothing"]]
    files = sorted(path for path in run.folder.path.iterdir() if path.is_file() and not path.name.startswith("."))
    lines += ["", "files:", *(f"  {path.stat().st_size:>13,} B  {printable(path.name)}" for path in files)]
    return "\n".join(lines)


def resume_command(run: Run) -> str:
    """Return the command that continues a run."""
    parent = run.folder.path.parent
    place = "" if str(parent) == "runs" else f" --runs_dir {parent}"
    return f"python -m train --run_id {run.folder.path.name}{place} --resume auto"


def _cut(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else f"{line[: max(width - 1, 0)]}…"

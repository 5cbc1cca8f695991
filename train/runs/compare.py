"""Compares scores, settings and curves of two runs.

`python -m train.submission compare` compares records of many seeds.
"""

from __future__ import annotations

from pathlib import Path

from train.common.errors import UserError
from train.common.files import sha256_file
from train.config import Config
from train.data.manifest import DatasetInfo, SplitInfo, read_manifest
from train.data.tokenizer import find_tokenizer
from train.run.folder import changed_settings
from train.runs.read import Run, printable, text_of
from train.submission.plots import plot_runs
from train.submission.record_scores import ScoredText, challenge_text, same_text


def compare_runs(a: Run, b: Run, picture: Path) -> str:
    """Return a table of both runs. If a run has a curve, draw the curves into the PNG `picture`."""
    same = same_scored_text(a, b)
    lines = [f"A  {a.folder.path} ({a.status}), text {a.text}", f"B  {b.folder.path} ({b.status}), text {b.text}", ""]
    rows = _rows(a, b, comparable=same is not False)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, *cells in rows:
        right = [cell.rjust(size) for cell, size in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    lines.append("")
    if same is None:
        lines.append("It is not known whether both are scored on the same text.")
    if same is False:
        lines.append("The scores are not comparable: the validation texts differ.")
    else:
        lines.append("One seed each, so a small difference may be chance; train.submission compare tests records.")
    # shorten the names, so that the legend leaves room for the curves
    curves = {f"{letter}: {printable(run.folder.path.name)[:40]}": run.curve for letter, run in (("A", a), ("B", b))}
    if not any(curves.values()):
        return "\n".join([*lines, "No curves: neither run has a validation."])
    labels = dict.fromkeys(f"{run.summary.label}. " for run in (a, b) if run.summary and run.summary.label)
    title = "Validation" if same else "Validation (texts differ)" if same is False else "Validation (texts may differ)"
    plot_runs(
        picture, "".join(labels) + title, curves, [run.summary.val_bpb if run.summary else None for run in (a, b)]
    )
    return "\n".join([*lines, f"Curves: {picture}"])


def _numbers(run: Run) -> dict[str, tuple[float | None, str]]:
    """Name of a number in the table → its value (None: not measured) and its format."""
    summary = run.summary
    return {
        "bpb of the artifact": (summary.val_bpb if summary else None, ".4f"),
        "bpb, no overlap": (summary.flat_val_bpb if summary else None, ".4f"),
        "bpb before quantization": (run.curve[-1][2] if run.curve else None, ".4f"),
        "steps": (run.steps, ","),
        "seconds of training": (run.seconds, ",.1f"),
        "ms per step": (1000 * run.seconds / run.steps if run.steps else None, ",.2f"),
        "bytes of code and model": (summary.bytes_total if summary else None, ","),
    }


def _rows(a: Run, b: Run, *, comparable: bool) -> list[tuple[str, ...]]:
    """Return the lines of the table: name, value of A, value of B, difference."""
    rows: list[tuple[str, ...]] = [("", "A", "B", "A - B")]
    labels = [run.summary.label if run.summary else "" for run in (a, b)]
    if any(labels):
        rows.append(("", *labels, ""))
    others = _numbers(b)
    for name, (left, spec) in _numbers(a).items():
        right, _ = others[name]
        shown = left is not None and right is not None and (comparable or not name.startswith("bpb"))
        difference = format((left or 0) - (right or 0), f"+{spec}") if shown else ""
        rows.append((name, *("-" if value is None else format(value, spec) for value in (left, right)), difference))
    changed = changed_settings(a.config, b.config)
    return rows + [(name, text_of(old), text_of(new), "") for name, old, new in changed]


def same_scored_text(a: Run, b: Run) -> bool | None:
    """Whether two runs were scored on the same validation text. None: not known."""
    left, right = _manifest(a), _manifest(b)
    if left and right:
        # this comparison holds even if the tokenizers differ
        return _counts(left.val) == _counts(right.val)
    same = same_text(_scored_text(a, left), _scored_text(b, right))
    if same is not None or not a.summary or not b.summary:
        return same
    # an evaluation leaves less than a window at the end unscored
    unscored = max(run.config.window * s.bytes / s.tokens for run, s in ((a, a.summary), (b, b.summary)))
    if abs(a.summary.bytes - b.summary.bytes) > unscored:
        return False
    return True if a.summary.bytes == b.summary.bytes and a.config.data_path == b.config.data_path else None


def _counts(text: SplitInfo) -> tuple[int | None, ...]:
    return text.documents, text.text_bytes, text.normalized_bytes


def _scored_text(run: Run, manifest: DatasetInfo | None) -> ScoredText:
    tokens = run.summary.tokens if run.summary else manifest.val.tokens if manifest else 0
    digest = manifest.tokenizer_sha256 if manifest else _tokenizer_digest(run.folder.find_data(run.config))
    return ScoredText(challenge_text(tokens, run.config.window), tokens, run.config.window, digest)


def _manifest(run: Run) -> DatasetInfo | None:
    """Read the manifest of the run's dataset.

    None if there is none, or if the dataset was built again after the run.
    """
    try:
        manifest = read_manifest(run.folder.find_data(run.config).data_path)
    except UserError:
        return None
    # the run left less than a window of tokens unscored, unless the dataset has changed
    if manifest and run.summary and not 0 <= manifest.val.tokens - run.summary.tokens <= run.config.window:
        return None
    return manifest


def _tokenizer_digest(config: Config) -> str:
    try:
        return sha256_file(find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path))
    except (UserError, OSError):
        return ""

"""Writes an HTML page with curves, step times, sizes and scores of all runs in a folder. The page needs no network."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from train.common.errors import UserError
from train.common.files import atomic_write
from train.config import Config
from train.run.folder import RunFolder, changed_settings
from train.run.logger import finite, read_metrics, series
from train.submission.summary import Summary

TEMPLATE = Path(__file__).with_name("dashboard.html")
# longer curves are downsampled, because a screen cannot show more points
MAX_POINTS = 1500
NUMBERS = "val_bpb val_loss steps step_avg_ms train_seconds eval_seconds bytes_total parameters".split()
_NAMED_SETTINGS = 3


def write_dashboard(paths: Sequence[Path], out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Write the HTML page.

    Args:
        paths: run folders, or folders that contain run folders.
        out: the HTML file.

    Returns:
        The data of each run, and a message for each run that cannot be shown.

    Raises:
        UserError: no run can be shown.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out: the folder {out.parent} does not exist: create it first")
    runs, problems = collect(find_runs(paths))
    if not runs:
        raise UserError("; ".join(problems))
    atomic_write(out, page(runs, ", ".join(map(str, paths)), problems))
    return runs, problems


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Find the run folders among `paths`, inside them, and inside the sweeps in them, sorted by path.

    Raises:
        UserError: a path is not a folder, or holds no run.
    """
    found = set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder: give a run folder, or a folder that contains run folders")
        inside = [path] if (path / "config.json").is_file() else [*path.glob("*"), *path.glob("*/*")]
        runs = [item for item in inside if (item / "config.json").is_file() and (item / "metrics.jsonl").is_file()]
        if not runs:
            raise UserError(f"{path}: no run in it: python -m train makes one under runs/")
        found |= set(runs)
    return [RunFolder(path) for path in sorted(found)]


def page(runs: list[dict[str, Any]], source: str, problems: Sequence[str] = ()) -> str:
    """Return the HTML page, with the data and the plotting library embedded."""
    notes = [f"Colors: settings. Dash patterns: seeds. Curves of more than {MAX_POINTS:,} points are downsampled."]
    notes += [f"Not shown: {'; '.join(problems)}."] if problems else []
    data = json.dumps({"runs": runs, "source": source, "notes": notes}, allow_nan=False)
    # a "</script>" in a run's name must not end the script element
    data = data.replace("</", "<\\/")
    return TEMPLATE.read_text().replace("/*PLOTLY*/", get_plotlyjs(), 1).replace("/*DATA*/", data, 1)


def collect(folders: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the data of each run. Missing and non-finite numbers become None.

    Returns:
        The data of each run, and a message for each run that cannot be read.
    """
    configs: list[Config] = []
    runs, problems = [], []
    for folder in folders:
        try:
            config = folder.read_config()
            shown = _run(folder, config)
        except UserError as error:
            problems.append(str(error))
            continue
        configs.append(config)
        # runs that differ only in their seed form a group; the group's number is the index of its first run
        group = next(
            index for index, other in enumerate(configs) if not changed_settings(other, config, free=("seed",))
        )
        runs.append({**shown, "group": group})
    varied = varied_settings({run["group"]: configs[run["group"]] for run in runs})
    for run in runs:
        run["varied"] = varied[run["group"]]
        run["group_name"] = _group_name(run["recipe"], run["varied"])
    return runs, problems


def speed(points: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Compute (step, seconds, ms per step) between neighbouring points; step and seconds are the later point's."""
    return [
        (after[0], after[1], 1000 * (after[1] - before[1]) / (after[0] - before[0]))
        for before, after in itertools.pairwise(points)
    ]


def _run(folder: RunFolder, config: Config) -> dict[str, Any]:
    records = read_metrics(folder.metrics)
    loss, bpb = series(records, "train", "train_loss"), series(records, "val", "val_bpb")
    curves = {"loss": loss, "bpb": bpb, "speed": speed(loss)}
    summary = Summary.read(folder.summary) if folder.summary.exists() else None
    numbers = summary.to_dict() if summary else {}
    return {
        "id": folder.path.name,
        "recipe": config.recipe,
        "seed": config.seed,
        "date": numbers.get("date", "")[:10] or None,
        "status": "finished" if summary else "not finished",
        "hardware": numbers.get("hardware", ""),
        "label": numbers.get("label", ""),
        "max_bytes": config.max_artifact_bytes,
        **{name: finite(numbers.get(name)) for name in NUMBERS},
        "parts": summary.byte_parts if summary else {},
        "series": {name: _thinned(points) for name, points in curves.items()},
    }


def _thinned(points: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Keep at most MAX_POINTS + 1 points, the last one always."""
    stride = -(-len(points) // MAX_POINTS) or 1
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def varied_settings(groups: dict[int, Config]) -> dict[int, dict[str, Any]]:
    """Find the settings that differ between groups of one recipe; return each group's values of them."""
    found = {}
    for number, config in groups.items():
        others = [other for other in groups.values() if other.recipe == config.recipe]
        varied = {name for other in others for name, _, _ in changed_settings(config, other, free=("seed",))}
        found[number] = {name: value for name, value in config.to_dict().items() if name in varied}
    return found


def _group_name(recipe: str, varied: dict[str, Any]) -> str:
    parts = [f"{name}={value}" for name, value in varied.items()]
    more = f" and {len(parts) - _NAMED_SETTINGS} more" if len(parts) > _NAMED_SETTINGS else ""
    return ", ".join([recipe, *parts[:_NAMED_SETTINGS]]) + more

"""Writes an HTML page that compares runs and record folders: leaderboard, curves, step times, sizes.

The page loads nothing from a network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from train.common.errors import UserError
from train.common.files import atomic_write
from train.common.values import ConfigError
from train.config import Config
from train.recipes import load_recipe
from train.run.folder import RunFolder, changed_settings
from train.submission.dashboard_rows import MAX_POINTS, Row, record_rows, run_row
from train.submission.record_folder import found_folders, is_record, is_run

TEMPLATE = Path(__file__).with_name("dashboard.html")


def write_dashboard(paths: Sequence[Path], out: Path) -> tuple[list[Row], list[str]]:
    """Write the HTML page.

    Args:
        paths: run folders, record folders, or folders that contain run or record folders. Record folders are only read.
        out: the HTML file.

    Returns:
        One row per run and per seed of a record, and one message per folder that cannot be shown.

    Raises:
        UserError: no folder can be shown.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out: the folder {out.parent} does not exist: create it first")
    rows, problems = collect(find_shown(paths))
    if not rows:
        raise UserError("; ".join(problems))
    atomic_write(out, page(rows, ", ".join(map(str, paths)), problems))
    return rows, problems


def find_shown(paths: Sequence[Path]) -> list[Path]:
    """Find the run folders and record folders among `paths` and inside them, sorted by path.

    Raises:
        UserError: a path is not a folder, or contains neither a run folder nor a record folder.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder: give a run or record folder, or a folder that contains some")
        inside = found_folders(path, lambda folder: is_run(folder) or is_record(folder))
        if not inside:
            raise UserError(f"{path}: no run and no record in it: python -m train makes a run under runs/")
        found |= set(inside)
    return sorted(found)


def default_out(paths: Sequence[Path]) -> Path:
    """Return the default path of the page: dashboard.html in the first folder that contains run folders."""
    own = (path for path in paths if path.is_dir() and not is_record(path) and found_folders(path, is_run))
    return next(own, Path()) / "dashboard.html"


def page(rows: list[Row], source: str, problems: Sequence[str] = ()) -> str:
    """Return the HTML page, with the data and the plotting library embedded."""
    notes = [
        "Scores on another text, or on fewer tokens, are marked and listed below the others.",
        f"Curves of more than {MAX_POINTS:,} points are downsampled.",
    ]
    notes += [f"Not shown: {'; '.join(problems)}."] if problems else []
    data = json.dumps({"runs": rows, "source": source, "notes": notes}, allow_nan=False)
    # "<!--" or "</script>" in a name must not end the script element
    data = data.replace("<", "\\u003c")
    return TEMPLATE.read_text().replace("/*PLOTLY*/", get_plotlyjs(), 1).replace("/*DATA*/", data, 1)


def collect(folders: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """Read the rows of each folder. Missing and non-finite numbers become None.

    Returns:
        The rows, and one message per folder that cannot be read.
    """
    configs: dict[int, Config] = {}
    rows, problems = [], []
    for number, folder in enumerate(folders):
        try:
            if not is_run(folder):
                rows += [{**row, "group": number, "varied": {}} for row in record_rows(folder)]
                continue
            config = RunFolder(folder).read_config()
            shown = run_row(RunFolder(folder), config)
        except UserError as error:
            problems.append(str(error))
            continue
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            problems.append(f"{folder}: damaged ({type(error).__name__}: {str(error)[:60]})")
            continue
        # runs that differ only in their seed form a group; the group gets the number of its first run
        alike = (index for index, other in configs.items() if not changed_settings(other, config, free=("seed",)))
        group = next(alike, number)
        configs.setdefault(group, config)
        rows.append({**shown, "group": group})
    varied = varied_settings(configs)
    for row in rows:
        if row["group"] in varied:
            row["varied"] = varied[row["group"]]
            row["group_name"] = _group_name(configs[row["group"]], row["varied"])
    _rank(rows)
    return rows, problems


def varied_settings(groups: dict[int, Config]) -> dict[int, dict[str, Any]]:
    """Find the settings that vary among the groups of a recipe. Return group → setting → value."""
    found = {}
    for number, config in groups.items():
        others = [other for other in groups.values() if other.recipe == config.recipe]
        varied = {name for other in others for name, _, _ in changed_settings(config, other, free=("seed",))}
        found[number] = {name: value for name, value in config.to_dict().items() if name in varied}
    return found


def _group_name(config: Config, varied: dict[str, Any]) -> str:
    """Return the recipe's name and the varied settings whose values are not the recipe's."""
    try:
        base = load_recipe(config.recipe).config().to_dict()
    except ConfigError:
        base = {}
    changed = [f"{name}={value}" for name, value in varied.items() if name not in base or base[name] != value]
    return ", ".join([config.recipe, *(changed or ["as the recipe"] if varied else [])])


def _rank(rows: list[Row]) -> None:
    """Mark the rows whose scores cannot be compared with the scores on the reference text.

    The reference text is the challenge's if any row was scored on it, else the text with the most tokens.
    """
    texts = [row["text"] for row in rows if row["text"]]
    whole = next((text for text in texts if text["challenge"]), None) or max(
        texts, key=lambda text: text["tokens"], default=None
    )
    for row in rows:
        text = row["text"]
        row["rank"], row["badge"] = 0, ""
        if text is None:
            row["badge"] = "text not stated" if row["val_bpb"] is not None else ""
        elif not text["whole"] or (
            whole
            and not text["challenge"]
            and text["name"] == whole["name"]
            and text["tokens"] + text["window"] <= whole["tokens"]
        ):
            row["rank"], row["badge"] = 2, f"fewer tokens: {text['tokens']:,}"
        elif (whole and text["challenge"] != whole["challenge"]) or (
            whole and not whole["challenge"] and text["name"] != whole["name"]
        ):
            row["rank"], row["badge"] = 1, f"another text: {text['name']}"

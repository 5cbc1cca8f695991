"""A record folder from one run per seed: README, json, logs and script, complete or not there at all."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import atomic_write
from train.common.wording import counted
from train.config import Config
from train.data.validation import load_validation
from train.single_file.pack import as_literal, pack, recipe_settings, script_modules, script_settings
from train.single_file.sources import decoded
from train.submission.readme import record_readme
from train.submission.record import evaluation, form
from train.submission.record_folder import mean_and_deviation
from train.submission.record_scores import Base
from train.submission.runs import FinishedRun, read_runs, tokenizer_facts

_PROOF_TOKENS = 32_768
# libraries that are imported by a name in a string
_CODEC_PACKAGES = {"brotli": "brotli", "zstd": "zstandard", "ans": "constriction"}


@dataclass(frozen=True)
class RecordDetails:
    """What people say about a record.

    Attributes:
        author, github_id: who submits.
        name: title; empty: the recipe's name.
        blurb: one sentence; empty: one made of the numbers.
        track: the track.
    """

    author: str
    github_id: str
    name: str
    blurb: str
    track: str


def build_record(
    paths: Sequence[Path], out: Path, details: RecordDetails, *, single_file: str = "", base: Base | None = None
) -> str:
    """Write a record folder.

    Args:
        paths: finished runs, one per seed.
        out: the folder, which must not exist.
        details: what people say about it.
        single_file: form of the one-file script, see `train.single_file.pack`; empty: the modules in folders beside
            it.
        base: what the settings and scores are compared with; None: the recipe.

    Returns:
        How the script was proven, in words.

    Raises:
        UserError: the folder exists, a run is not fit for it, or the script does not give the artifact's score.
    """
    if out.exists():
        raise UserError(f"{out}: exists: choose another --out, or remove it")
    runs = read_runs(paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        started = runs[0].folder.read_config()
        write_script(folder, started, single_file)
        proof = prove(folder, runs[0])
        code_bytes = sum(path.stat().st_size for path in folder.rglob("*.py"))
        submission = record_json(runs, details, code_bytes)
        for run in runs:
            shutil.copyfile(run.log_path, folder / f"train_seed{run.seed}.log")
        _write_json(folder / "config.json", {"recipe": started.recipe, **recipe_settings(started)})
        _write_json(folder / "submission.json", submission)
        atomic_write(folder / "requirements.txt", requirements(folder, started))
        atomic_write(
            folder / "README.md",
            record_readme(runs, submission, single_file, base or Base.of_recipe(runs[0].config), proof),
        )
        folder.chmod(0o755)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return proof


def record_json(runs: Sequence[FinishedRun], details: RecordDetails, code_bytes: int) -> dict[str, Any]:
    """submission.json: the 14 common keys, then what the rule check reads. Sizes count the script that is shipped."""
    results = {run.seed: _seed_result(run, code_bytes) for run in runs}
    # means of what is written, so that they can be computed again from it
    bpb, bpb_std = mean_and_deviation([result["val_bpb"] for result in results.values()])
    loss, loss_std = mean_and_deviation([result["val_loss"] for result in results.values()])
    first = runs[0]
    largest = max(runs, key=lambda run: run.summary.bytes_model)
    prefix_bytes = first.summary.bytes_prefix
    bytes_total = largest.summary.bytes_model + prefix_bytes + code_bytes
    scored = {
        "rule": first.evaluation["rule"],
        "stride": first.evaluation["stride"],
        "window": first.evaluation["seq_len"],
        "windows": first.evaluation["windows"],
        "tokens": first.evaluation["tokens"],
        "bytes": first.evaluation["bytes"],
        "validation_tokens": len(load_validation(first.config).tokens) - 1,
    }
    return {
        "author": details.author,
        "github_id": details.github_id,
        "name": details.name or first.config.recipe,
        "blurb": details.blurb or _blurb(runs, bpb, bytes_total),
        "date": max(run.summary.date for run in runs)[:10],
        "track": details.track,
        "val_loss": round(loss, 8),
        "val_bpb": round(bpb, 8),
        "val_bpb_std": None if bpb_std is None else round(bpb_std, 8),
        "seeds": [run.config.seed for run in runs],
        "seed_results": results,
        "bytes_total": bytes_total,
        "bytes_code": code_bytes,
        "hardware": first.summary.hardware,
        "bytes_model": largest.summary.bytes_model,
        **({"bytes_paid_prefix": prefix_bytes, "label": first.summary.label} if first.summary.label else {}),
        "val_loss_std": None if loss_std is None else round(loss_std, 8),
        "pytorch_version": first.summary.torch,
        "python_version": first.summary.python,
        "calibration": _calibration(first.config),
        "evaluation": scored,
        "tokenizer": tokenizer_facts(first.config),
    }


def write_script(folder: Path, config: Config, single_file: str) -> None:
    """Write train_gpt.py, and beside it the modules it imports unless it holds them itself."""
    settings = script_settings(config)
    if single_file:
        atomic_write(folder / "train_gpt.py", pack(config.recipe, settings, single_file))
        return
    carried = script_modules(config.recipe, settings)
    for name, source in carried.sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    atomic_write(
        folder / "train_gpt.py",
        f'"""Trains, quantizes, packs and scores."""\n\nfrom train.common.errors import main_guard\nfrom train.train_gpt import main\n\nSETTINGS = {as_literal({"RECIPE": config.recipe, **settings})}\n'
        f"# modules that these settings do not need, and which would\nLEFT_OUT = {as_literal(carried.left_out)}\n\n"
        'if __name__ == "__main__":\n    main_guard(lambda: main(SETTINGS, LEFT_OUT))\n',
    )


def prove(folder: Path, run: FinishedRun) -> str:
    """Score the run's artifact with the script in `folder`, and with this package.

    Returns:
        What was shown, in words.

    Raises:
        UserError: the two scores differ, or the script fails.
    """
    ours, theirs = package_score(run), script_score(folder, run)
    if ours["val_bpb"] != theirs["val_bpb"]:
        raise UserError(
            f"train_gpt.py: scores the artifact of {run.folder.path} as {theirs['val_bpb']:.8f}, the package as {ours['val_bpb']:.8f}: "
            "take another --single-file form, and report this"
        )
    return (
        f"run alone on a CPU from an empty folder, train_gpt.py scores the artifact of seed {run.seed} on {theirs['tokens']:,} "
        f"tokens as {theirs['val_bpb']:.8f} bits per byte, to the last bit what the package gives"
    )


def package_score(run: FinishedRun) -> dict[str, Any]:
    """The score of the run's artifact on the text's first tokens, on a CPU, by this package."""
    root = Path(__file__).resolve().parents[2]
    return _score(["-m", "train.evaluate"], run, root, PYTHONPATH=str(root))


def script_score(folder: Path, run: FinishedRun) -> dict[str, Any]:
    """The same by the script in `folder`, which is copied to where nothing else is."""
    with tempfile.TemporaryDirectory() as name:
        alone = Path(shutil.copytree(folder, Path(name) / "alone"))
        return _score(["train_gpt.py", "evaluate"], run, alone)


def requirements(folder: Path, config: Config) -> str:
    """The packages that the script in `folder` imports, in the versions installed here, without what they were built for.

    An index that serves torch 2.13.0 has no 2.13.0+cpu.
    """
    carried = script_modules(config.recipe, script_settings(config))
    sources = [*carried.sources.values(), decoded((folder / "train_gpt.py").read_bytes())]
    names = {name for source in sources for node in ast.walk(ast.parse(source)) for name in _imported(node)}
    names |= {_CODEC_PACKAGES[config.codec]} if config.codec in _CODEC_PACKAGES else set()
    providers = importlib.metadata.packages_distributions()
    packages = {providers[name][0] for name in names - {"train", "golf_kernels"} if name in providers}
    versions = {package: importlib.metadata.version(package).partition("+")[0] for package in packages}
    return "".join(f"{package}=={versions[package]}\n" for package in sorted(packages))


def _calibration(config: Config) -> str:
    if config.quantizer == "rtn":
        return "none"
    return "training data" if config.gptq_calib_source == "train" else "text that the model wrote"


def _blurb(runs: Sequence[FinishedRun], bpb: float, total: int) -> str:
    first = runs[0]
    fewest, most = (pick(run.summary.steps for run in runs) for pick in (min, max))
    steps = f"{fewest:,} to {most:,} steps" if fewest < most else counted(most, "step")
    label = f"{first.summary.label}. " if first.summary.label else ""
    return (
        f"{label}Recipe {first.config.recipe}: {first.summary.parameters:,} parameters, {steps} on {first.summary.hardware}; "
        f"{form(first.config)} artifact and code take at most {total:,} bytes and score {bpb:.4f} bits per byte "
        f"({evaluation(first.config)}), mean of {counted(len(runs), 'seed')}."
    )


def _seed_result(run: FinishedRun, code_bytes: int) -> dict[str, Any]:
    summary = run.summary
    result = {
        "val_loss": round(summary.val_loss, 8),
        "val_bpb": round(summary.val_bpb, 8),
        "artifact_bytes": summary.bytes_model + summary.bytes_prefix + code_bytes,
        "steps": summary.steps,
        "step_avg_ms": round(summary.step_avg_ms, 2),
        "eval_time_s": round(summary.eval_seconds, 3),
        "bytes_model": summary.bytes_model,
        "train_time_s": round(summary.train_seconds, 3),
    }
    if run.calibration_seconds is not None:
        result["calibration_s"] = run.calibration_seconds
    if summary.prequant_val_bpb is not None:
        result["pre_quant_val_bpb"] = round(summary.prequant_val_bpb, 8)
    return result


def _score(program: list[str], run: FinishedRun, folder: Path, **environ: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        scored = Path(name)
        # an evaluation leaves its score in the run folder, so it gets one of its own
        _write_json(scored / "config.json", run.config.to_dict())
        shutil.copyfile(run.folder.artifact, scored / run.folder.artifact.name)
        arguments = [str(scored), "--json", "--device", "cpu", "--max-tokens", str(_PROOF_TOKENS), "--paid-prefix", ""]
        arguments += ["--data-path", str(Path(run.config.data_path).resolve())]
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environ}
        command = [sys.executable, *program, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(program)}: could not score {run.folder.artifact}: {reason}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.partition(".")[0]]
    return []


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

"""Makes a record folder (README, submission.json, logs, script) from one run per seed. A failure leaves no folder."""

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
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import atomic_write
from train.config import Config
from train.data.validation import load_validation
from train.single_file.pack import as_literal, pack, recipe_settings, script_modules, script_settings
from train.single_file.sources import decoded
from train.submission.bases import Base
from train.submission.readme import record_readme
from train.submission.record import RecordDetails, submission_json
from train.submission.runs import FinishedRun, read_runs, tokenizer_facts

# number of validation tokens on which the script's score is checked
_CHECKED_TOKENS = 32_768
# program that runs a script, then checks that python found all modules of this project in the script's folder
_RUNNER = """import runpy, sys
root, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    ours = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()
            if name.partition(".")[0] in ("train", "golf_kernels")}
    for name, path in ours.items():
        if not path.startswith(root):
            sys.exit(f"{name} was found in {path or 'no file'}, not in the record")
"""
# codec → its module. `_imported` misses these modules, because the code imports them by a name in a string.
_CODEC_PACKAGES = {"brotli": "brotli", "zstd": "zstandard", "ans": "constriction"}


def build_record(
    paths: Sequence[Path],
    out: Path,
    details: RecordDetails | None = None,
    *,
    single_file: str = "",
    base: Base | None = None,
) -> str:
    """Write a record folder.

    Args:
        paths: finished runs, one per seed.
        out: the folder, which must not exist.
        details: title, author and other facts that the author gives.
        single_file: form of the packed train_gpt.py, one of `train.single_file.pack.FORMS`; empty: not packed.
        base: recipe or record to which the README compares the new record; None: the recipe of the runs.

    Returns:
        A sentence that says how the script was checked.

    Raises:
        UserError: the folder exists, `read_runs` refuses a run, or the script's score differs from this package's.
    """
    if out.exists():
        raise UserError(f"{out}: exists: choose another --out, or remove it")
    runs = read_runs(paths)
    first = runs[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        started = first.folder.read_config()
        write_script(folder, started, single_file)
        proof = prove(folder, first)
        code_bytes = sum(path.stat().st_size for path in folder.rglob("*.py"))
        submission = record_json(runs, details or RecordDetails(), code_bytes)
        for run in runs:
            atomic_write(folder / f"train_seed{run.seed}.log", run.published_log)
        _write_json(folder / "config.json", {"recipe": started.recipe, **recipe_settings(started)})
        _write_json(folder / "submission.json", submission)
        atomic_write(folder / "requirements.txt", requirements(folder, started))
        base = base or Base.of_recipe(first.config.recipe)
        atomic_write(folder / "README.md", record_readme(runs, submission, single_file, base, proof))
        folder.chmod(0o755)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return proof


def record_json(runs: Sequence[FinishedRun], details: RecordDetails, code_bytes: int) -> dict[str, Any]:
    """Return the contents of submission.json: those of `submission_json`, and further keys that `check` reads."""
    first = runs[0]
    submission = submission_json([run.summary for run in runs], first.config, details, code_bytes)
    for run in runs:
        if run.calibration_seconds is not None:
            submission["seed_results"][run.seed]["calibration_s"] = run.calibration_seconds
    return submission | {
        "calibration": _calibration(first.config),
        "evaluation": {
            **{name: first.evaluation[name] for name in ("rule", "stride", "windows", "tokens", "bytes")},
            "window": first.evaluation["seq_len"],
            "validation_tokens": len(load_validation(first.config).tokens) - 1,
        },
        "tokenizer": tokenizer_facts(first.folder.find_data(first.config)),
    }


def write_script(folder: Path, config: Config, single_file: str) -> None:
    """Write train_gpt.py. If `single_file` is empty, also write the modules that it imports."""
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
        f"# module that this script lacks: condition on which it is needed\nLEFT_OUT = {as_literal(carried.left_out)}\n\n"
        'if __name__ == "__main__":\n    main_guard(lambda: main(SETTINGS, LEFT_OUT))\n',
    )


def prove(folder: Path, run: FinishedRun) -> str:
    """Check that the script in `folder` and this package compute the same score of the run's artifact.

    Returns:
        A sentence that states the score.

    Raises:
        UserError: the two scores differ, or the script fails.
    """
    ours, theirs = package_score(run), script_score(folder, run)
    if ours["val_bpb"] != theirs["val_bpb"]:
        raise UserError(
            f"train_gpt.py: scores the artifact of {run.folder.path} as {theirs['val_bpb']:.8f}, the package as {ours['val_bpb']:.8f}: "
            "this is a bug: report it, and take another --single-file form"
        )
    return (
        f"Run on a CPU from an empty folder, train_gpt.py scores the artifact of seed {run.seed} at {theirs['val_bpb']:.8f} bits "
        f"per byte on {theirs['tokens']:,} tokens, exactly as this package does."
    )


def package_score(run: FinishedRun) -> dict[str, Any]:
    """Score the run's artifact with this package on a CPU, on the first `_CHECKED_TOKENS` validation tokens."""
    root = Path(__file__).resolve().parents[2]
    return _score("train.evaluate", ["-m", "train.evaluate"], run, root, PYTHONPATH=str(root))


def script_score(folder: Path, run: FinishedRun) -> dict[str, Any]:
    """Score the run's artifact with the script on a CPU, on the same tokens. The script runs in a copy of `folder`."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        alone = Path(shutil.copytree(folder, root / "alone"))
        # a packed script unpacks its modules into the folder for temporary files
        (root / "unpacked").mkdir()
        program = [*alone_program(root), "train_gpt.py", "evaluate"]
        environ = {"PYTHONPATH": os.pathsep.join(_package_folders()), "TMPDIR": str(root / "unpacked")}
        return _score("train_gpt.py evaluate", program, run, alone, **environ)


def alone_program(root: Path) -> list[str]:
    """Return the start of a command that runs a script and fails if a module of this project is not found in `root`.

    The command ignores `.pth` files, by which an editable install would let python find missing modules elsewhere.
    """
    return ["-S", "-c", _RUNNER, str(root)]


def _package_folders() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def requirements(folder: Path, config: Config) -> str:
    """Return requirements.txt: the packages that the script imports, in the versions installed here.

    Local version labels are removed, because PyPI has torch 2.13.0 but not 2.13.0+cpu.
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


def _score(title: str, program: list[str], run: FinishedRun, folder: Path, **environ: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        scored = Path(name)
        # a temporary run folder, because an evaluation writes its score into the run folder
        _write_json(scored / "config.json", run.config.to_dict())
        shutil.copyfile(run.folder.artifact, scored / run.folder.artifact.name)
        arguments = [
            str(scored),
            "--json",
            "--device",
            "cpu",
            "--max-tokens",
            str(_CHECKED_TOKENS),
            "--paid-prefix",
            "",
        ]
        arguments += ["--data-path", str(Path(run.folder.find_data(run.config).data_path).resolve())]
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environ}
        command = [sys.executable, *program, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{title}: could not score {run.folder.artifact}: {reason}")
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

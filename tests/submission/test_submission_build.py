"""A record folder made of real runs: complete, true to the runs, or not there at all."""

import ast
import importlib.metadata
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from submission_runs import narrow

import train.artifact.requantize
from train.command_line import resolve
from train.common.errors import UserError
from train.config import Config
from train.data.paid_prefix import NOT_COMPLIANT
from train.evaluate.scores import read_evaluation
from train.pipeline import run_pipeline
from train.run.folder import RunFolder
from train.single_file.code_size import counted_code_bytes
from train.single_file.pack import FORMS
from train.submission import build, readme
from train.submission.__main__ import main
from train.submission.bases import find_base
from train.submission.build import build_record, recipe_settings
from train.submission.check import apply_rules
from train.submission.record import RecordDetails
from train.submission.record_folder import read_record_folder
from train.submission.rules.finding import Finding, Verdict
from train.submission.runs import FinishedRun, read_run, read_runs, tokenizer_facts
from train.submission.summary import Summary

DETAILS = RecordDetails("Ada", "ada", "", "", "10min_16mb")


@pytest.fixture(scope="module")
def runs(narrow_runs: list[Path]) -> list[Path]:
    return narrow_runs


@pytest.fixture(scope="module")
def record(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("records") / "mine"
    build_record(runs, out, DETAILS)
    return out


def copies(runs: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copytree(run, folder / run.name)) for run in runs]


@pytest.fixture
def no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "prove", lambda folder, run: "not proven")


def test_the_check_passes_but_for_what_a_laptop_cannot_meet(record: Path) -> None:
    findings = apply_rules(read_record_folder(record))
    assert [item.rule for item in findings if item.verdict is Verdict.FAILS] == [
        "hardware",
        "validation text",
    ]
    assert [str(item) for item in findings if item.verdict in (Verdict.UNKNOWN, Verdict.NOTE)] == []


def test_the_numbers_are_those_of_the_runs(record: Path, runs: list[Path]) -> None:
    submission = json.loads((record / "submission.json").read_text())
    scores = {}
    for run in runs:
        entries = read_evaluation(RunFolder(run)).values()
        scores[run.name.removeprefix("seed")] = next(entry for entry in entries if entry["stride"] == 32)
    code = sum(path.stat().st_size for path in record.rglob("*.py"))
    assert submission["bytes_code"] == code
    for seed, entry in scores.items():
        result = submission["seed_results"][seed]
        assert (result["val_bpb"], result["val_loss"]) == (round(entry["val_bpb"], 8), round(entry["val_loss"], 8))
        assert result["artifact_bytes"] == code + (runs[0].parent / f"seed{seed}/model.golf").stat().st_size
        steps = json.loads((runs[0].parent / f"seed{seed}/training.json").read_text())
        assert (result["steps"], result["train_time_s"]) == (4, round(steps["seconds"], 3))
    written = [result["val_bpb"] for result in submission["seed_results"].values()]
    assert submission["val_bpb"] == round(statistics.fmean(written), 8)
    assert submission["val_bpb_std"] == round(statistics.stdev(written), 8)
    assert submission["seeds"] == [42, 314, 999]
    assert submission["evaluation"]["tokens"] == submission["evaluation"]["validation_tokens"] == scores["42"]["tokens"]
    assert submission["tokenizer"]["counts_bytes"] is True
    for run in runs:
        log = f"train_{run.name}.log"
        # a record's log begins with the source of the code
        published = (run / "source.txt").read_text() + "=" * 100 + "\n" + (run / log).read_text()
        assert (record / log).read_text() == published and "\ndef run_pipeline(" in published


def test_an_earlier_run_has_the_source_in_its_log_already(runs: list[Path], tmp_path: Path) -> None:
    run = read_run(Path(shutil.copytree(runs[0], tmp_path / "run")))
    log = run.published_log
    run.log_path.write_bytes(log)
    run.folder.source.unlink()
    assert read_run(run.folder.path).published_log == log


def test_the_readme_tells_it_to_the_last_digit(record: Path) -> None:
    text = (record / "README.md").read_text()
    submission = json.loads((record / "submission.json").read_text())
    for seed, result in submission["seed_results"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {seed} | **"))
        cells = [cell.strip(" *").replace(",", "") for cell in row.strip("|").split("|")]
        names = ("val_bpb", "val_loss", "pre_quant_val_bpb", "steps", "step_avg_ms", "artifact_bytes")
        assert [float(cell) for cell in cells[1:]] == [result[name] for name in names]
    assert f"**val_bpb {submission['val_bpb']:.8f}** ± {submission['val_bpb_std']:.8f} over 3 seeds" in text
    # the parts of the model and the code are the total
    budget = text.partition("## Size")[2].partition("## Time")[0]
    parts = [
        int(number.replace(",", "")) for number in re.findall(r"^\| (?!left).* \| \**([\d,]+)\** \|$", budget, re.M)
    ]
    assert sum(parts[:-1]) == parts[-1] == submission["bytes_total"]
    assert "| `model_dim` | 128 | 32 |" in text
    assert text.count("torchrun --standalone --nproc_per_node=1 train_gpt.py") == 3


def test_the_readme_says_which_runs_were_resumed(runs: list[Path]) -> None:
    first, second, third = read_runs(runs)
    resumed = [replace(run, summary=replace(run.summary, resumed=[2, 3])) for run in (second, third)]
    note = readme._times([first, *resumed])[-1]
    said = "resumed at steps 2, 3, so train is the training time."
    clock = "Times in seconds. The training time covers the steps; calibration on training data follows and counts as training too."
    assert note == f"{clock} Seed 314: {said} Seed 999: {said}"
    assert readme._times([*resumed, first])[-1] == note and readme._times([first])[-1] == clock


def test_the_settings_in_the_script_are_those_of_the_run(record: Path, runs: list[Path]) -> None:
    tree = ast.parse((record / "train_gpt.py").read_text())
    settings = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    config, _ = resolve([], settings)
    trained = RunFolder(runs[0]).read_config()
    local = ("run_id", "runs_dir", "seed", "data_path", "device")
    assert config == trained.replace(**{name: getattr(config, name) for name in local})
    assert settings["RECIPE"] == "quickstart" and config.recur_layers == (1, 2)


def test_a_setting_that_a_recipe_changes_back_to_the_default_is_kept() -> None:
    config = Config(recipe="quickstart")
    settings = {name.upper(): str(value) for name, value in recipe_settings(config).items()}
    assert settings["MODEL_DIM"] == "512"


def test_requirements_are_the_packages_installed_here(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (record / "requirements.txt").read_text().splitlines()
    installed = importlib.metadata.version("torch")
    assert f"torch=={installed.split('+')[0]}" in lines
    assert {line.partition("==")[0] for line in lines} >= {"brotli", "numpy", "sentencepiece", "torch"}
    for local in ("2.13.0+cpu", "2.13.0+cu128"):
        monkeypatch.setattr(importlib.metadata, "version", lambda package, local=local: local)
        found = build.requirements(record, Config(recipe="quickstart"))
        assert set(found.splitlines()) >= {"torch==2.13.0", "numpy==2.13.0"} and "+" not in found
    assert json.loads((record / "submission.json").read_text())["pytorch_version"] == torch.__version__


@pytest.mark.parametrize("form", ["", *FORMS])
def test_the_script_knows_no_name_and_is_as_large_as_the_run_counted(
    form: str, runs: list[Path], tmp_path: Path, no_proof: None
) -> None:
    config = RunFolder(runs[0]).read_config()
    scripts = []
    for number, name in enumerate(["", '"""\nraise SystemExit("run")\n"""one\\']):
        build_record(runs[:1], tmp_path / f"{number}", replace(DETAILS, name=name), single_file=form)
        submission = json.loads((tmp_path / f"{number}/submission.json").read_text())
        assert submission["name"] == name or not name
        assert (tmp_path / f"{number}/README.md").read_text().startswith(f"# {name}")
        scripts.append((tmp_path / f"{number}/train_gpt.py").read_bytes())
        if form:
            counted = counted_code_bytes(config.replace(code_form=form))
            assert counted == len(scripts[-1]) == submission["bytes_code"]
    assert len(set(scripts)) == 1


def test_a_run_that_ended_before_its_recurrence_counts_the_script_that_is_shipped(
    runs: list[Path], tmp_path: Path, no_proof: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the fit weighs its groups by the loss of a few tokens, which is what it takes its time for
    monkeypatch.setattr("train.artifact.fit_to_target.FIT_TOKENS", 1 << 12)
    dataset = Path(RunFolder(runs[0]).read_config().data_path)
    # whose size, unlike a compressed one's, is sure to tell the two apart
    config = narrow(
        dataset, tmp_path / "runs", 42, iterations=2, recur_start_step=2, matrix_clip="sdclip", code_form="plain"
    )
    target = counted_code_bytes(config.replace(target_bytes=1_000_000)) + 29_000
    config = config.replace(target_bytes=target)
    folder = run_pipeline(config)
    sizes = [counted_code_bytes(settings) for settings in (folder.read_config(), folder.trained_config())]
    assert sizes[0] != sizes[1]
    build_record([folder.path], tmp_path / "mine", DETAILS, single_file="plain")
    shipped = (tmp_path / "mine/train_gpt.py").stat().st_size
    assert Summary.read(folder.summary).bytes_code == shipped == sizes[0]
    text = (folder.path / "train_seed42.log").read_text()
    fitted = [int(size) for size in re.findall(rf"^fit:(\d+) of {target} bytes", text, re.M)]
    assert shipped + folder.artifact.stat().st_size in fitted
    assert train.artifact.requantize.main([str(folder.path)]) == 0
    text = (folder.path / "train_seed42.log").read_text()
    assert re.findall(r"^Code size: (\d+) bytes", text, re.M) == [str(shipped)] * 2


def test_a_base_is_compared_in_settings_and_scores(
    runs: list[Path], record: Path, tmp_path: Path, no_proof: None
) -> None:
    build_record(runs, tmp_path / "a", DETAILS, base=find_base("1019"))
    text = (tmp_path / "a/README.md").read_text()
    assert "## Differences from #1019" in text and "Result:" not in text
    assert re.search(r"Not compared: scored on different texts: .* on another text of .* tokens, #1019 on", text)
    build_record(runs, tmp_path / "b", DETAILS, base=find_base("sp8192_sdclip"))
    assert "| `vocab_size` | 8192 | 512 |" in (tmp_path / "b/README.md").read_text()
    base = find_base(str(record))
    assert base.scores is not None and base.settings is not None and base.settings["model_dim"] == 32
    build_record(runs, tmp_path / "same", DETAILS, base=base)
    text = (tmp_path / "same/README.md").read_text()
    assert "Both are scored on " in text and "Result: A is not better by enough in any unit." in text
    build_record(runs[:1], tmp_path / "c", DETAILS, base=base)
    text = (tmp_path / "c/README.md").read_text()
    assert "No setting differs from " in text and "Result:" not in text and "over 1 seed," in text
    with pytest.raises(UserError, match=r"--base: nothing: no such record folder, .* or recipe \(baseline"):
        find_base("nothing")


def test_a_label_stands_in_readme_and_json_and_the_check_finds_it(
    runs: list[Path], tmp_path: Path, no_proof: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = build.read_runs

    def labelled(paths: list[Path]) -> list[FinishedRun]:
        changes = {"label": NOT_COMPLIANT, "bytes_prefix": 4388}
        found = []
        for run in read(paths):
            total = run.summary.bytes_total + 4388
            found.append(replace(run, summary=replace(run.summary, **changes, bytes_total=total)))
        return found

    monkeypatch.setattr(build, "read_runs", labelled)
    build_record(runs, tmp_path / "mine", DETAILS)
    submission = json.loads((tmp_path / "mine/submission.json").read_text())
    assert submission["label"] == NOT_COMPLIANT and submission["blurb"].startswith(NOT_COMPLIANT)
    assert submission["bytes_total"] == submission["bytes_model"] + submission["bytes_code"] + 4388
    text = (tmp_path / "mine/README.md").read_text()
    assert text.splitlines()[0].endswith(f"({NOT_COMPLIANT})") and "| paid prefix | 4,388 |" in text
    findings = apply_rules(read_record_folder(tmp_path / "mine"))
    assert "no validation tokens in the artifact" in [item.rule for item in findings if item.verdict is Verdict.FAILS]


def test_command_says_what_it_made_and_which_rules_fail(
    runs: list[Path], tmp_path: Path, no_proof: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "build",
        *map(str, runs),
        "--out",
        str(tmp_path / "records/mine"),
        "--author",
        "Ada",
        "--github-id",
        "ada",
    ]
    assert main([*arguments, "--single-file"]) == 1
    output = capsys.readouterr().out
    assert "README.md, config.json, requirements.txt, submission.json, train_gpt.py, train_seed314.log" in output
    # the track without limits allows any hardware
    assert "Breaks: validation text." in output and "Cannot be seen" not in output and "Notes" not in output
    assert "compressed" in (tmp_path / "records/mine/README.md").read_text()
    assert main(["check", str(tmp_path / "records/mine")]) == 1
    with pytest.raises(UserError, match="exists: choose another --out"):
        main(arguments)


@pytest.mark.parametrize(("verdicts", "code"), [("PASSES UNKNOWN", 0), ("UNKNOWN FAILS PASSES", 1)])
def test_command_ends_as_the_folder_is_judged(
    runs: list[Path], tmp_path: Path, no_proof: None, monkeypatch: pytest.MonkeyPatch, verdicts: str, code: int
) -> None:
    findings = [Finding("a rule", Verdict[name], "a value") for name in verdicts.split()]
    monkeypatch.setattr("train.submission.check.apply_rules", lambda evidence: findings)
    assert main(["build", str(runs[0]), "--out", str(tmp_path / "mine")]) == code
    assert (tmp_path / "mine/train_gpt.py").exists()


@pytest.mark.parametrize("missing", ["training.json", "model.golf", "evaluation.json", "train_seed314.log"])
def test_an_unfinished_run_is_named_and_leaves_nothing(runs: list[Path], tmp_path: Path, missing: str) -> None:
    broken = copies(runs, tmp_path / "runs")
    (broken[1] / missing).unlink()
    with pytest.raises(UserError, match=rf"seed314/{re.escape(missing)}: (missing|no such file)"):
        build_record(broken, tmp_path / "records/mine", DETAILS)
    assert not list(tmp_path.glob("records/*")) and not list(tmp_path.glob("records/.*"))


def test_a_log_that_was_cut_or_is_of_another_artifact_is_named(runs: list[Path], tmp_path: Path) -> None:
    broken = copies(runs, tmp_path / "runs")
    log = broken[2] / "train_seed999.log"
    text = log.read_text()
    log.write_text(text[: text.index("final_int6_roundtrip ")])
    with pytest.raises(UserError, match=r"train_seed999\.log: no final score"):
        read_runs(broken)
    exact = re.findall(r"_sliding_window_exact val_loss:\S+ val_bpb:(\S+)", text)[-1]
    other = f"{float(exact) + 1e-8:.8f}"
    log.write_text(text.replace(exact, other))
    with pytest.raises(UserError, match=rf"train_seed999\.log: val_bpb is {other}, but evaluation.json has {exact}"):
        read_runs(broken)
    log.write_text(re.sub(r"(Serialized model int6\+brotli: )\d+", r"\g<1>7", text))
    with pytest.raises(UserError, match=r"train_seed999\.log: the model has 7 bytes"):
        read_runs(broken)


def test_runs_that_do_not_belong_together_are_named(runs: list[Path], tmp_path: Path) -> None:
    broken = copies(runs, tmp_path / "runs")
    folder = RunFolder(broken[1])
    folder.write_config(folder.read_config().replace(recipe="baseline", matrix_lr=0.5))
    with pytest.raises(
        UserError, match=r"seed314: settings differ from .*seed42: recipe=baseline, not quickstart, matrix_lr"
    ):
        build_record(broken, tmp_path / "mine", DETAILS)
    with pytest.raises(UserError, match=r"seed 42: used by .*give one run per seed"):
        build_record([runs[0], runs[0]], tmp_path / "mine", DETAILS)
    assert not (tmp_path / "mine").exists()


def test_a_script_that_scores_otherwise_stops_the_build(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "package_score", lambda run: {"val_bpb": 1.0})
    monkeypatch.setattr(build, "script_score", lambda folder, run: {"val_bpb": 1.5})
    with pytest.raises(
        UserError, match=r"train_gpt\.py: scores the artifact of .* as 1\.50000000, the package as 1\.00000000"
    ):
        build_record(runs[:1], tmp_path / "mine", DETAILS)
    assert list(tmp_path.iterdir()) == []


def test_the_proof_sees_a_module_that_the_record_lacks(record: Path, runs: list[Path], tmp_path: Path) -> None:
    # an editable install would serve it
    lacking = Path(shutil.copytree(record, tmp_path / "lacking"))
    (lacking / "golf_kernels/window_nll.py").unlink()
    with pytest.raises(UserError, match=r"train_gpt\.py evaluate: could not score .*golf_kernels\.window_nll"):
        build.script_score(lacking, read_run(runs[0]))


@pytest.mark.parametrize("inside", [True, False])
def test_modules_of_ours_must_lie_in_the_record(tmp_path: Path, inside: bool) -> None:
    package = tmp_path / ("root/alone" if inside else "installed") / "golf_kernels"
    for folder in (package, tmp_path / "root/alone"):
        folder.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (tmp_path / "installed").mkdir(exist_ok=True)
    (tmp_path / "installed/any.pth").write_text("import sys; print('a .pth file was read')\n")
    (tmp_path / "root/alone/train_gpt.py").write_text("import sys, golf_kernels\nprint(sys.argv[1:], __name__)\n")
    command = [sys.executable, *build.alone_program(tmp_path / "root"), "train_gpt.py", "evaluate"]
    environment = {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(command, cwd=tmp_path / "root/alone", env=environment, capture_output=True, text=True)
    assert done.stdout == "['evaluate'] __main__\n" and done.returncode == (0 if inside else 1)
    found = f"golf_kernels was found in {package / '__init__.py'}, not in the record\n"
    assert done.stderr == ("" if inside else found)


def test_bytes_are_counted_twice(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunFolder(runs[0]).read_config()
    finding = re.fullmatch(
        r"(\d+) validation documents: the tokenizer counts ([\d,]+) bytes, the text has ([\d,]+)",
        tokenizer_facts(config)["finding"],
    )
    assert finding and int(finding[1]) >= 1 and finding[2] == finding[3]
    tables = build.tokenizer_facts.__globals__["byte_tables"]

    def double(*arguments: object) -> object:
        found = tables(*arguments)
        found.base_bytes[found.has_leading_space] += 1
        return found

    # the space counted in the table and again in the sum, as in #1545
    monkeypatch.setattr("train.submission.runs.byte_tables", double)
    assert tokenizer_facts(config)["counts_bytes"] is False

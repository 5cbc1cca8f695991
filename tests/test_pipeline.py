"""The pipeline as a whole on a small text: what it leaves, resumption, ranks, fitting."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline_runs import Finished, command_on_two_ranks, flags, record, small

from train.artifact import make
from train.artifact.requantize import main as quantize
from train.artifact.storage import EncodedArtifact, encode_artifact, load_model
from train.checkpoint import load_weights, read_tensors
from train.common.errors import UserError
from train.common.files import write_json
from train.data.dataset import Dataset
from train.data.manifest import read_manifest
from train.evaluate.__main__ import main as evaluate
from train.evaluate.scores import read_evaluation
from train.evaluate.scoring import evaluate_model
from train.generate.samples import PROMPTS, sample_texts
from train.pipeline import run_pipeline
from train.run.folder import RunFolder
from train.run.log_grammar import parse_log
from train.run.logger import read_metrics, series
from train.run.resume import resolve_run
from train.single_file.code_size import counted_code_bytes
from train.submission.record import run_readme, summarize
from train.submission.summary import summary_text

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def short_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit weighs its groups by the loss of a few tokens, which is what it takes its time for."""
    monkeypatch.setattr("train.artifact.fit_to_target.FIT_TOKENS", 1 << 12)


def fitting_code_bytes(folder: RunFolder) -> int:
    """Code of the run with a target of six digits, whose script carries the search for row clips."""
    return counted_code_bytes(folder.read_config().replace(target_bytes=999_999))


def test_a_run_leaves_its_whole_record(finished: Finished) -> None:
    left = {path.name for path in finished.folder.path.iterdir()}
    assert left >= {
        "config.json", "train_seed1337.log", "metrics.jsonl", "weights.pt", "training.json", "model.golf", "evaluation.json",
        "summary.json", "submission.json", "README.md", "loss.png", "bpb.png", "size_budget.png",
        "samples.txt", "source.txt",
    }  # fmt: skip
    assert "checkpoint.pt" not in left
    submission = json.loads((finished.folder.path / "submission.json").read_text())
    assert submission["bytes_total"] == submission["bytes_code"] + finished.folder.artifact.stat().st_size
    log = parse_log(finished.folder.path / "train_seed1337.log")
    text = (finished.folder.path / "train_seed1337.log").read_text()
    assert text.startswith("Running Python ")
    assert (finished.folder.path / "source.txt").read_text().startswith("# csrc/")
    assert re.search(
        r"gptq:calibrated \d+ matrices: computed their Hessians on 4 training batches with the trained model in [\d.]+s\n",
        text,
    )
    assert re.search(r"gptq:inner loop computed by backend (cpp|torch) \(\w", text)
    readme = (finished.folder.path / "README.md").read_text()
    assert f"{submission['val_bpb']:.8f}" in readme
    exact = [
        line
        for line in (finished.folder.path / "train_seed1337.log").read_text().splitlines()
        if "sliding_window_exact" in line
    ]
    assert exact[-1].endswith(f"val_bpb:{submission['val_bpb']:.8f}")
    assert set(log["steps"]) == set(range(1, 11)) | {12}
    assert (
        text.count("recurrence:activated at step 6, layers ") == text.count(" (the loss may rise for some steps: ") == 1
    )
    assert "\nwarmup_step:2/2 (1 without recurrence, 1 with it)\n" in text and log["warmup_steps"] == 2
    assert log["sizes"]["total"] == submission["bytes_total"]
    assert log["finals"]["int6_sliding_window_exact"]["val_bpb"] == pytest.approx(submission["val_bpb"], abs=1e-8)


def test_each_stage_says_what_it_takes_before_it_starts(finished: Finished) -> None:
    lines = (finished.folder.path / "train_seed1337.log").read_text().splitlines()
    tokens = len(Dataset(finished.config).validation.tokens) - 1
    stages = [
        (f"training: 12 steps of 1,024 tokens; validation: {tokens:,} tokens, every 6 steps", "warmup_step:1/"),
        ("warm-up: 2 steps, not counted as training time", "warmup_step:1/"),
        (
            "quantization: gptq, int6 matrices and int8 embeddings, calibrated on 4 training batches",
            "gptq:calibrated",
        ),
        ("artifact: codec brotli, at most 16,000,000 bytes including the code", "Serialized model: "),
        (f"evaluation: {tokens:,} tokens, windows without overlap", "final_int6_roundtrip "),
        (f"evaluation: {tokens:,} tokens, stride 32", "final_int6_sliding_window "),
    ]
    for said, done in stages:
        first = next(number for number, line in enumerate(lines) if line.startswith(done))
        assert said in lines[:first], said
    assert re.fullmatch(r"training: 12 steps in \d+ s, [\d,]+ tokens/s", next(x for x in lines if "tokens/s" in x))
    assert lines[-1] == "record: writing plots, README.md and submission.json" or "  folder     " in lines[-1]


def test_a_run_keeps_samples_of_its_validations_and_its_artifact(finished: Finished) -> None:
    labels = [label for label in ("at step 0", "at step 6", "at step 12", "of the artifact") for _ in PROMPTS]
    lines = finished.folder.samples.read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"sample text {label}" for label in labels]
    config, model = finished.folder.trained_config(), load_model(finished.folder.artifact)
    assert [line.partition(": ")[2] for line in lines[-3:]] == sample_texts(config, model, recurrence=True)
    # programs read the log, and the rules of a record search it
    assert not any(line in (finished.folder.path / "train_seed1337.log").read_text() for line in lines)


def test_profiled_steps_leave_their_pictures(dataset: Path, tmp_path: Path) -> None:
    # few layers, as what a profile costs goes by operations
    shallow = {"num_layers": 2, "recur_layers": (), "ve_layers": (1,), "xsa_last_n": 1, "parallel_start_layer": 1}
    folder = run_pipeline(small(dataset, tmp_path, iterations=2, profile_steps="1:2", **shallow))
    assert {"trace_rank0.json.gz", "breakdown.png"} <= {path.name for path in (folder.path / "profile").iterdir()}


def test_metrics_keep_the_whole_score_with_its_timing(finished: Finished) -> None:
    kept = [record for record in read_metrics(finished.folder.metrics) if record["kind"] == "final"]
    scores = read_evaluation(finished.folder).values()
    assert [{"kind": "final", **score} for score in scores] == kept and len(kept) == 2
    for score in kept:
        assert score["tokens_per_second"] == pytest.approx(score["tokens"] / score["seconds"], rel=1e-3)


def test_a_summary_says_where_recurrence_never_began(finished: Finished, tmp_path: Path) -> None:
    assert "\n  recurrence " not in summary_text(summarize(finished.folder))
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    write_json(folder.training, {**folder.read_training(), "recurrence": False})
    summary = summarize(folder)
    assert "\n  recurrence never started: training ended before step 6\n" in summary_text(summary)
    assert "| recurrence | never started: training ended before step 6 |" in run_readme(
        summary, folder.read_config(), "name"
    )


def test_a_summary_says_where_the_time_limit_stopped_training(finished: Finished, tmp_path: Path) -> None:
    said = "stopped by the time limit after 5 of 12 steps: the score is worse than after all planned steps"
    assert "time limit" not in summary_text(summarize(finished.folder))
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    write_json(folder.training, {**folder.read_training(), "steps": 5})
    summary = summarize(folder)
    assert f"\n             {said}\n" in summary_text(summary)
    assert f"| training steps | {said} |" in run_readme(summary, folder.read_config(), "name")
    # such a recipe trains until the limit
    folder.write_config(folder.read_config().replace(warmdown_by="clock"))
    assert "time limit" not in summary_text(summarize(folder))


def test_training_lowers_the_loss(finished: Finished) -> None:
    losses = series(read_metrics(finished.folder.path / "metrics.jsonl"), "train", "train_loss")
    assert losses[0][2] == pytest.approx(6.24, abs=0.1)
    assert losses[-1][2] < losses[0][2] - 0.5


def test_the_artifact_scores_what_the_quantized_model_in_memory_scores(finished: Finished) -> None:
    config = finished.folder.trained_config()
    model = load_weights(finished.folder)

    class Silent:
        def line(self, text: str) -> None: ...

    from train.common.distributed import Ranks
    from train.quantize.tensors import dequantize_state

    tensors, _ = make.quantize(config, model, Dataset(config), Ranks(), Silent(), code_bytes=0)  # type: ignore[arg-type]
    state = dequantize_state(tensors)
    model.load_state_dict({name: state[name].to(parameter.dtype) for name, parameter in model.named_parameters()})
    validation = Dataset(config).validation
    scores = [
        evaluate_model(candidate, validation.tokens, validation.target_bytes, config)
        for candidate in (model, load_model(finished.folder.artifact))
    ]
    assert scores[0].val_bpb == pytest.approx(scores[1].val_bpb, abs=1e-9)
    recorded = json.loads(finished.folder.summary.read_text())
    assert scores[1].val_bpb == pytest.approx(recorded["val_bpb"], abs=1e-6)
    assert (scores[1].tokens, scores[1].bytes) == (recorded["tokens"], recorded["bytes"])
    manifest = read_manifest(config.data_path)
    said = {f"{name} primed with the training text": bits for name, bits in manifest.yardsticks.items()}
    assert recorded["yardsticks"] == said and len(said) == 2


@pytest.mark.usefixtures("short_fit")
@pytest.mark.parametrize("changes", [[], ["--target-mb", "16"], ["--target-bytes"]])
def test_nothing_is_encoded_twice(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    if changes == ["--target-bytes"]:
        changes = [*changes, str(fitting_code_bytes(folder) + int(0.8 * folder.artifact.stat().st_size))]
    encoded: list[bytes] = []

    def encode(*arguments: object, **named: object) -> EncodedArtifact:
        found = encode_artifact(*arguments, **named)  # type: ignore[arg-type]
        encoded.append(found.data)
        return found

    for module in ("storage", "fit_to_target", "prune_to_target"):
        monkeypatch.setattr(f"train.artifact.{module}.encode_artifact", encode)
    assert quantize([str(folder.path), *changes]) == 0
    rounds = re.findall(r"fit:\d+ of \d+ bytes", capsys.readouterr().out)
    assert len(encoded) == max(len(rounds), 1)
    assert folder.artifact.read_bytes() in encoded


def test_a_setting_that_is_younger_than_a_run_has_its_default(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    values = folder.read_config().to_dict()
    write_json(
        folder.config, {name: value for name, value in values.items() if name not in ("prune_excess", "smear_gate")}
    )
    assert folder.read_config() == finished.folder.read_config()
    assert summarize(folder).val_bpb == summarize(finished.folder).val_bpb
    write_json(folder.config, {name: value for name, value in values.items() if name != "recipe"})
    with pytest.raises(UserError, match="recipe is missing"):
        folder.read_config()


def test_a_run_folder_that_exists_is_refused(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.path.iterdir()}
    with pytest.raises(UserError, match="this run folder exists"):
        run_pipeline(finished.config)
    assert before == {path: path.stat().st_mtime_ns for path in finished.folder.path.iterdir()}


def test_resuming_with_other_settings_is_refused(finished: Finished) -> None:
    with pytest.raises(UserError, match="matrix_lr was"):
        run_pipeline(finished.config.replace(resume="auto", matrix_lr=0.5))


def test_an_artifact_over_the_cap_is_not_written(finished: Finished, tmp_path: Path) -> None:
    cap = json.loads(finished.folder.summary.read_text())["bytes_total"] - 1000
    for limit, said in (
        (cap, f"expected at most {cap:,} .*: [0-9,]+ bytes over"),
        (1000, "code and paid prefix alone take"),
    ):
        with pytest.raises(UserError, match=said):
            quantize([str(finished.folder.path), "--max_artifact_bytes", str(limit), "--out", str(tmp_path / "a.golf")])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_goes_on_bit_for_bit(
    finished: Finished, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(dataset, tmp_path, checkpoint_every=2, samples="validations")
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *flags(config)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step:5/"):
            process.kill()
            break
    process.wait()
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    # without another flag
    folder = run_pipeline(
        *resolve_run(["--run_id", "run", "--resume", "auto", "--runs_dir", str(tmp_path)], os.environ)
    )
    assert "resumed: step:4" in (output := capsys.readouterr().out)
    clock = folder.read_training()["seconds"]
    assert summarize(folder).stage_seconds["train"] == clock
    assert re.search(rf"stages +train {clock:.1f}, .* s \(resumed at step 4, so train is the training time\)", output)
    expected, found = (read_tensors(folder.weights) for folder in (finished.folder, folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert folder.samples.read_text() == finished.folder.samples.read_text()


def test_a_stage_has_the_seconds_of_the_pass_that_counts(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    write_json(folder.stages, dict.fromkeys(("data", "train", "quantize", "artifact", "evaluate"), 1000.0))
    run_pipeline(finished.config.replace(runs_dir=str(tmp_path), resume="auto"))
    seconds = summarize(folder).stage_seconds
    # found: the text, and what was trained
    assert {name for name, taken in seconds.items() if taken == 1000} == {"data", "train"}
    assert all(0 < seconds[name] < 1000 for name in ("quantize", "artifact", "evaluate"))


def test_two_ranks_train_like_one(finished: Finished, dataset: Path, tmp_path: Path) -> None:
    config = small(dataset, tmp_path, samples="end")
    result = command_on_two_ranks("train", *flags(config))
    assert result.returncode == 0, result.stderr
    # one rank prints them
    samples = RunFolder(tmp_path / "run").samples.read_text()
    assert len(samples.splitlines()) == len(PROMPTS) and result.stdout.count(samples) == 1
    curves = [
        series(read_metrics(folder.path / "metrics.jsonl"), "train", "train_loss")
        for folder in (finished.folder, RunFolder(tmp_path / "run"))
    ]
    assert [point[0] for point in curves[0]] == [point[0] for point in curves[1]]
    # float32 sums in another order; the difference grows with the steps
    assert [point[2] for point in curves[0]] == pytest.approx([point[2] for point in curves[1]], abs=2e-4)
    scores = [json.loads(folder.summary.read_text()) for folder in (finished.folder, RunFolder(tmp_path / "run"))]
    assert scores[0]["val_bpb"] == pytest.approx(scores[1]["val_bpb"], abs=2e-3)
    assert scores[0]["tokens"] == scores[1]["tokens"]


@pytest.mark.parametrize("stage", [quantize, evaluate, record])
def test_a_stage_alone_says_which_variables_it_does_not_read(
    finished: Finished,
    tmp_path: Path,
    stage: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    monkeypatch.setenv("GPTQ_CALIB_BATCHES", "3")
    monkeypatch.setenv("CODEC", "brotli")
    assert stage([str(folder.path), *(["--json"] if stage is evaluate else [])]) == 0
    output, errors = capsys.readouterr()
    (line,) = [line for line in (output + errors).splitlines() if line.startswith("warning: ignoring ")]
    hint = " (pass --gptq_calib_batches to change it)" if stage is quantize else ""
    assert line == f"warning: ignoring GPTQ_CALIB_BATCHES=3; this run was made with 4{hint}"
    if stage is evaluate:
        assert json.loads(output)["stride"] == 32


def test_stages_done_again_alone_make_the_same_record(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    before = json.loads((folder.path / "submission.json").read_text())
    assert quantize([str(folder.path)]) == 0
    assert not folder.evaluation.exists()
    with pytest.raises(UserError, match=r"run python -m train\.evaluate"):
        record([str(folder.path)])
    for stride in ("0", "32"):
        assert evaluate([str(folder.path), "--stride", stride]) == 0
    # another text's score must not take the place of the run's
    assert evaluate([str(folder.path), "--max-tokens", "500"]) == 0
    assert record([str(folder.path)]) == 0
    after = json.loads((folder.path / "submission.json").read_text())
    assert (after["val_bpb"], after["bytes_total"], after["date"]) == (
        before["val_bpb"],
        before["bytes_total"],
        before["date"],
    )


@pytest.mark.usefixtures("short_fit")
def test_a_run_is_fitted_to_its_cap_and_scored_again(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    sizes = [record for record in read_metrics(folder.metrics) if record["kind"] == "sizes"][-1]
    code = fitting_code_bytes(folder)
    target = code + int(0.8 * sizes["model_bytes"])
    assert quantize([str(folder.path), "--target-bytes", str(target)]) == 0
    printed = capsys.readouterr().out
    assert 0.99 * target <= code + folder.artifact.stat().st_size <= target
    assert "fit:blocks.*.mlp.up int6 k 5 -> " in printed
    calibrated = re.search(r"gptq:calibrated .* in ([\d.]+)s", printed)
    measured = re.search(r"fit:measured on \d+ training tokens in ([\d.]+)s", printed)
    logged = parse_log(folder.path / "train_seed1337.log")["facts"]["calibration_s"]
    assert logged == pytest.approx(float(calibrated[1]) + float(measured[1]))
    assert folder.read_config().target_bytes == target and not folder.evaluation.exists()
    for stride in ("0", "32"):
        assert evaluate([str(folder.path), "--stride", stride]) == 0
    assert record([str(folder.path)]) == 0
    assert json.loads((folder.path / "submission.json").read_text())["bytes_total"] <= target


@pytest.mark.usefixtures("short_fit")
def test_what_no_clip_fits_is_refused_by_its_costliest_group(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = finished.folder.artifact.read_bytes()
    with pytest.raises(UserError) as refused:
        quantize([str(finished.folder.path), "--target-bytes", str(fitting_code_bytes(finished.folder) + 500)])
    said = str(refused.value)
    assert re.search(r"expected at most [\d,]+ .*: [\d,]+ bytes over\. Nothing was written", said)
    assert "is the largest" in said and "codes ±1, because no row clip fits" in capsys.readouterr().out
    assert finished.folder.artifact.read_bytes() == artifact
    assert finished.folder.read_config().target_bytes == 0

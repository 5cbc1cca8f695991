"""Summary, submission.json and README: every number is the measured one, to the digit."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from submission_example import CONFIG, make_run, make_summary

from train.artifact.budget import BudgetRow
from train.common.errors import UserError
from train.run.folder import RunFolder
from train.submission.__main__ import main
from train.submission.record import RecordDetails, describe_evaluation, write_record
from train.submission.summary import Summary, group_bytes, size_line, summary_text

COMMON_KEYS = (
    "author date github_id name val_bpb blurb val_loss bytes_total track bytes_code seeds seed_results hardware val_bpb_std"
).split()


def test_summary_round_trip(tmp_path: Path) -> None:
    summary = make_summary(yardsticks={}, flat_val_bpb=None)
    summary.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == summary
    values = summary.to_dict()
    for name in ("yardsticks", "flat_val_bpb", "model_groups"):
        del values[name]
    assert Summary.from_dict(values).model_groups == {}


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"steps": "4964"}, "steps: expected a whole number, got '4964'"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"val_bpb": None}, "val_bpb: expected a number"),
        ({"stage_seconds": {"train": "x"}}, "stage_seconds: expected"),
        ({"stage_seconds": {"lunch": 1.0}}, "got lunch"),
        ({"resumed": ["4"]}, "resumed: expected"),
        ({"bytes_total": 15_981_301}, r"expected 15981300, the sum of .*, got 15981301"),
        ({"model_groups": {"all": 1}}, "expected a sum of bytes_model = 15898181, got 1"),
        ({"extra": 1}, "unknown extra"),
    ],
)
def test_summaries_that_do_not_add_up_are_refused(tmp_path: Path, changes: dict[str, object], fragment: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**make_summary().to_dict(), **changes}))
    with pytest.raises(UserError, match=fragment) as caught:
        Summary.read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "fragment"), [("{", "not readable"), ("[]", "expected a JSON object"), ("{}", "missing run_id")]
)
def test_files_that_are_no_summary_are_refused(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(UserError, match="the run is not finished"):
        Summary.read(path)
    path.write_text(text)
    with pytest.raises(UserError, match=fragment):
        Summary.read(path)


@pytest.mark.parametrize(
    ("model", "code", "total"),
    [
        (15_815_847, 47_642, 15_863_489),
        (15_289_740, 63_530, 15_353_270),
        (15_624_965, 64_415, 15_689_380),
        (15_748_095, 76_450, 15_824_545),
        (15_898_181, 83_119, 15_981_300),
        (15_973_467, 15_516, 15_988_983),
    ],
)
def test_published_sizes_add_up(model: int, code: int, total: int) -> None:
    summary = make_summary(bytes_model=model, bytes_code=code, bytes_total=total, model_groups={})
    assert f"code {code:,} + model {model:,} = {total:,} of 16,000,000 bytes" in summary_text(summary)


def test_group_bytes_adds_up_the_rows_of_a_budget_largest_first() -> None:
    sizes = [("blocks.*.mlp.up", 40), ("blocks.*.attention.query", 70), ("blocks.*.mlp.down", 35), ("row scales", 9)]
    sizes += [
        ("embedding.weight", 20),
        ("ve.embedding", 3),
        ("bigram.proj", 2),
        ("blocks.*.attention.value", 1),
        ("header", 8),
    ]
    rows = [BudgetRow(group, "int6", "brotli", 8, 8, size) for group, size in sizes]
    parts = [("MLP", 75), ("attention", 71), ("embeddings", 25), ("row scales", 9), ("header", 8)]
    assert list(group_bytes(rows).items()) == parts


def test_a_curve_of_bpb_says_how_the_score_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("train.submission.record.plot_bpb", lambda *arguments: said.append(arguments[3]))
    write_record(RunFolder(make_run(tmp_path)), make_summary())
    assert said == ["sliding window 2048, stride 64"]
    assert describe_evaluation(CONFIG.replace(eval_stride=0)) == "non-overlapping windows of 2048"


def test_submission_json_holds_the_common_keys_and_the_measured_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    details = RecordDetails("Ada", "ada", track="10min_16mb")
    paths = write_record(RunFolder(run), make_summary(), details)
    assert sorted(path.name for path in paths) == [
        "README.md",
        "bpb.png",
        "loss.png",
        "size_budget.png",
        "submission.json",
    ]
    assert all(path.parent == run and path.stat().st_size > 0 for path in paths)
    record = json.loads((run / "submission.json").read_text())
    assert set(COMMON_KEYS) <= set(record)
    assert {key: record[key] for key in COMMON_KEYS if key not in ("blurb", "seed_results")} == {
        "author": "Ada",
        "github_id": "ada",
        "name": "sp8192_sdclip",
        "date": "2026-04-08",
        "track": "10min_16mb",
        "val_loss": 2.85199103,
        "val_bpb": 1.1040946,
        "val_bpb_std": None,
        "bytes_total": 15_981_300,
        "bytes_code": 83_119,
        "seeds": [1337],
        "hardware": "8 × NVIDIA H100 80GB HBM3",
    }
    assert record["seed_results"] == {
        "1337": {
            "val_loss": 2.85199103,
            "val_bpb": 1.1040946,
            "artifact_bytes": 15_981_300,
            "steps": 4964,
            "step_avg_ms": 118.87,
            "eval_time_s": 81.457,
            "bytes_model": 15_898_181,
            "train_time_s": 590.078,
            "pre_quant_val_bpb": 1.08741234,
        }
    }
    assert "1.1041 bits per byte (sliding window 2048, stride 64)" in record["blurb"]
    assert record["bytes_model"] + record["bytes_code"] == record["bytes_total"]


def test_readme_repeats_summary_and_submission_to_the_last_digit(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_record(RunFolder(run), make_summary())
    text = (run / "README.md").read_text()
    record = json.loads((run / "submission.json").read_text())
    rows = dict(re.findall(r"^\| \**(.+?)\** \| \**(.+?)\** \|$", text, re.MULTILINE))
    assert float(rows["artifact, sliding window 2048, stride 64"]) == record["val_bpb"] == 1.1040946
    assert float(rows["val_loss (nats per token)"]) == record["val_loss"]
    assert float(rows["before training, non-overlapping windows"]) == 3.48761234
    assert float(rows["before quantization, non-overlapping windows"]) == 1.08741234
    assert float(rows["artifact, non-overlapping windows"]) == 1.10412345
    assert float(rows["for comparison: gzip -9 primed with the training text"]) == 1.96123456
    assert rows["size"] == "code 83,119 + model 15,898,181 = 15,981,300 of 16,000,000 bytes (99.9%)"
    assert rows["training steps"] == "4,964" and rows["ms per step"] == "118.87" and rows["bytes of mlp"] == "7,000,000"
    assert rows["seconds per stage"] == "data 3.5, train 610.2, quantize 20.1, evaluate 90.0; total 723.9 s"
    assert "python -m train.evaluate runs/example" in text
    for image in re.findall(r"!\[[^]]+\]\((.+?)\)", text):
        assert (run / image).is_file()


def test_what_was_not_measured_is_not_written(tmp_path: Path) -> None:
    summary = make_summary(step0_val_bpb=None, prequant_val_bpb=None, flat_val_bpb=None, yardsticks={}, model_groups={})
    run = make_run(tmp_path)
    write_record(RunFolder(run), summary)
    text = (run / "README.md").read_text()
    assert "before" not in text and "comparison" not in text and "artifact, non" not in text and "None" not in text
    assert "comparison" not in summary_text(summary) and "None" not in summary_text(summary)


def test_summary_text_is_the_block_a_run_ends_with() -> None:
    assert summary_text(make_summary(), "runs/example").splitlines() == [
        "example (recipe sp8192_sdclip, seed 1337, 37,022,811 parameters)",
        "  val_bpb    1.1041 bits per byte of text, by the model loaded from the artifact",
        "             1.1041 non-overlapping windows, 1.0874 before quantization, 3.4876 before training",
        "  comparison 1.9612 gzip -9 primed with the training text; 1.4012 xz -9 primed with the training text",
        "  size       code 83,119 + model 15,898,181 = 15,981,300 of 16,000,000 bytes (99.9%)",
        "  training   4,964 steps, 118.87 ms per step, 590.1 s",
        "  evaluation 40,540,160 tokens, 151,078,222 bytes of text, 81.5 s",
        "  stages     data 3.5, train 610.2, quantize 20.1, evaluate 90.0; total 723.9 s",
        "  folder     runs/example",
    ]


@pytest.mark.parametrize(
    ("missing", "fragment"),
    [
        ("config.json", "not a run folder"),
        ("metrics.jsonl", "metrics.jsonl: missing"),
    ],
)
def test_an_unfinished_run_gets_an_error_and_no_file(tmp_path: Path, missing: str, fragment: str) -> None:
    run = make_run(tmp_path)
    (run / missing).unlink()
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match=fragment):
        write_record(RunFolder(run), make_summary())
    assert sorted(run.iterdir()) == before


def test_command_writes_again_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    # gathering needs a real artifact and is tested with the pipeline
    monkeypatch.setattr("train.submission.record.summarize", lambda folder: Summary.read(folder.summary))
    arguments = [
        "record",
        str(run),
        "--author",
        "Ada",
        "--github-id",
        "",
        "--name",
        "A title",
        "--blurb",
        "A sentence.",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "note: github_id is empty" in output and "note: author" not in output
    assert "wrote loss.png, bpb.png, size_budget.png, submission.json, README.md" in output
    first = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(arguments) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == first
    record = json.loads(first["submission.json"])
    assert (record["author"], record["name"], record["blurb"]) == ("Ada", "A title", "A sentence.")
    assert first["README.md"].decode().startswith("# A title: 1.1041 bits per byte")


def test_help_is_complete_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["record", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for flag in ("--author", "--github-id", "--name", "--blurb", "--track"):
        assert flag in text
    assert "python -m train.submission record runs/" in text


def test_a_missed_target_of_pruning_is_told_beside_the_size() -> None:
    aimed = make_summary(target_bytes=15_981_300)
    assert "over the pruning target" not in size_line(aimed) and "over the pruning target" not in size_line(
        make_summary()
    )
    missed = make_summary(target_bytes=15_981_000)
    assert size_line(missed).endswith(", 300 over the pruning target of 15,981,000")
    assert "300 over the pruning target" in summary_text(missed)


@pytest.mark.parametrize(("missed", "said"), [(2000, "before step 2,000"), (0.35, "before 0.35 of it was done")])
def test_a_recurrence_that_never_started_is_told_with_its_step_or_fraction(missed: float, said: str) -> None:
    summary = dataclasses.replace(make_summary(), recurrence_missed=missed)
    assert f"\n  recurrence never started: training ended {said}\n" in summary_text(summary)

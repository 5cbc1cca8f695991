"""Records of other programs: each fault of a real record folder, on a small record in the same layout."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from foreign_records import CODE, MODEL, RAW_CODE, SEEDS, log_lines, make_foreign, rewrite
from record_example import edit_json, failures, notes, verdicts

from train.submission.__main__ import main
from train.submission.record_folder import read_record_folder
from train.submission.record_scores import TEXTS
from train.submission.rules.finding import Verdict

TTT = [ttt for _, _, ttt in SEEDS.values()]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_foreign(tmp_path / "record")


def write_logs(record: Path, **changes: Any) -> None:
    for seed in SEEDS:
        (record / f"train_seed{seed}.log").write_text("\n".join(log_lines(seed, **changes)) + "\n")


def test_a_record_of_another_program_is_read_whole(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(record)]) == 0 and not failures(record)
    text = " ".join(capsys.readouterr().out.split())
    assert "read from quantized_ttt_phased in train_seed42.log, line 38, and 2 other logs" in text
    assert "also logged diagnostic pre-quantization post-ema 1.06500011, diagnostic quantized 1.07400022 size" in text
    assert (record / "train_seed42.log").read_text().splitlines()[37].split()[1] == "quantized_ttt_phased"


# 1: the claimed score decides which line is looked for
def test_the_claim_decides_which_score_is_read(record: Path) -> None:
    for seed in SEEDS:
        with (record / f"train_seed{seed}.log").open("a") as log:
            log.write("final_side_trial_exact val_loss:3.10000000 val_bpb:1.33600000\n")
    found = read_record_folder(record).results
    assert [one.numbers["val_bpb"] for one in found] == TTT
    assert {one.evaluation.name for one in found if one.evaluation} == {"quantized_ttt_phased"}
    # without seeds in the json, the mean over the logs is the headline
    edit_json(record, seed_results=None, seeds=None)
    assert [one.numbers["val_bpb"] for one in read_record_folder(record).results] == TTT
    # without any claim, the last score is taken
    (record / "submission.json").unlink()
    assert {one.numbers["val_bpb"] for one in read_record_folder(record).results} == {1.336}


def test_a_claim_that_stands_in_no_log_breaks_a_rule(record: Path) -> None:
    edit_json(record, val_bpb=1.0503, seeds=None, seed_results=None)
    assert "1.0503 is in no log; the nearest score is 1.06110033" in failures(record)["the score is in a log"]


# 2: the evaluation that made the score, test-time training included
def test_the_time_is_that_of_the_evaluation_that_made_the_score(record: Path) -> None:
    rule = "evaluation time"
    assert verdicts(record, Verdict.PASSES)[rule] == "455.5 s (quantized_ttt_phased, seed 42)"
    rewrite(record / "train_seed314.log", "total_eval_time:455.5s", "total_eval_time:601.5s")
    assert failures(record) == {rule: "601.5 s (quantized_ttt_phased, seed 314)"}
    for seed in SEEDS:
        (record / f"train_seed{seed}.log").unlink()
    results = {
        seed: {"val_bpb": bpb, "eval_time_s": 80.0, "ttt_eval_time_s": 610.0}
        for seed, bpb in zip(SEEDS, TTT, strict=True)
    }
    edit_json(record, seed_results=results)
    assert failures(record)[rule] == "610.0 s (submission.json, seed 42)"
    edit_json(record, seed_results=None, eval_time_seconds=[500.0, 602.5, 400.0])
    assert failures(record)[rule] == "602.5 s (submission.json, seed 314)"


# 3: what the total counts
def test_sizes_are_told_by_what_they_count(record: Path) -> None:
    found = notes(record)
    assert f"seed 42: {MODEL + RAW_CODE:,} with code uncompressed of the log" in found["total size"]
    helpers = "the folder has 103; files that the script uses: ngram.py 9"
    assert found["bytes_code is the size of the code"] == f"31,500 is the compressed code of the log; {helpers}"
    results = {seed: {"val_bpb": bpb, "artifact_bytes": MODEL} for seed, bpb in zip(SEEDS, TTT, strict=True)}
    edit_json(record, seed_results=results, bytes_code=None, bytes_total=None, code_bytes=94)
    found = notes(record)
    assert "seed 42: artifact_bytes 15,890,000 is the model alone" in found["total = model + code"]
    # the log's total is the evidence, and code_bytes is bytes_code
    assert (
        "31,500" not in found["total size"].split(";")[0]
        and "94 is train_gpt.py alone" in found["bytes_code is the size of the code"]
    )
    for seed in SEEDS:
        rewrite(record / f"train_seed{seed}.log", f" {MODEL} bytes", " 16100000 bytes")
        rewrite(record / f"train_seed{seed}.log", f" {MODEL + CODE} bytes", " 16131500 bytes")
    edit_json(record, seed_results=None)
    assert failures(record) == {"total size": "16,100,094 (seed 42, bytes_code of submission.json), 100,094 too many"}


# 4: one step more is within the rule, and calibration is told
def test_the_clock_allows_for_a_step_that_the_loop_began_too_early(record: Path) -> None:
    # two steps of about 119.96 ms
    write_logs(record, clock_ms=600_200)
    assert not failures(record)
    write_logs(record, clock_ms=600_300)
    assert failures(record)["training time"].startswith("600.300 s (seed 42), 120.1 ms per step")
    for seconds, verdict in ((0.3, Verdict.PASSES), (4.4, Verdict.NOTE), (9.0, Verdict.FAILS)):
        write_logs(record, hessians_s=seconds)
        value = verdicts(record, verdict)["training and calibration time"]
        assert value.startswith(f"599.700 + {seconds} = {599.7 + seconds:.1f} s (seed 42)")


def test_minutes_are_read_as_roughly_as_they_are_written(record: Path) -> None:
    for seed in SEEDS:
        path = record / f"train_seed{seed}.log"
        lines = [line for line in path.read_text().splitlines() if "stopping_early" not in line]
        path.write_text("\n".join([*lines, "5000/20000 train_loss: 2.3 train_time: 10.0m tok/s: 6553600", ""]))
    assert "± 3.0 s, as the clock is rounded" in verdicts(record, Verdict.PASSES)["training time"]


# 5: the log's table, then the json, then README
def test_hardware_is_what_the_log_says_not_the_first_words_of_the_readme(record: Path) -> None:
    rewrite(record / "README.md", "# Phases\n", "# Phases\n\nRuns in 10 minutes on 8×H100.\n")
    write_logs(record, gpu="NVIDIA H200")
    assert failures(record)["hardware"] == "8 × NVIDIA H200 (nvidia-smi in train_seed42.log)"
    write_logs(record, gpu="NVIDIA H100 80GB HBM3")
    assert "hardware" in verdicts(record, Verdict.PASSES)
    for seed in SEEDS:
        rewrite(record / f"train_seed{seed}.log", "  world_size: 8", "  world_size: 2")
    assert failures(record)["hardware"].startswith("2 × NVIDIA H100 80GB HBM3")
    for seed in SEEDS:
        (record / f"train_seed{seed}.log").unlink()
    for key in ("hardware", "gpu", "platform"):
        edit_json(record, **{"hardware": None, "gpu": None, "platform": None, key: "1x RTX 5090"})
        assert failures(record)["hardware"] == "1x RTX 5090 (submission.json)"
    edit_json(record, platform=None)
    assert verdicts(record, Verdict.PASSES)["hardware"] == "8 × H100 (README.md)"
    rewrite(record / "README.md", "on 8×H100.", "on 8×H100. We trained on 1×RTX 5090.")
    assert verdicts(record, Verdict.UNKNOWN)["hardware"] == "README.md names 1 × RTX 5090, 8 × H100"


# 6: only variables in front of the training script, and another script that it executes
def test_variables_of_a_download_are_no_settings(record: Path) -> None:
    rule = "script reads the variables of README's command"
    rewrite(record / "README.md", "train_gpt.py\n", "train_gpt.py && LATER=1 upload\n")
    assert verdicts(record, Verdict.PASSES)[rule] == "2 variables"
    rewrite(record / "README.md", "NOISE=1 ", "NOISE=1 OTHER=2 ")
    assert notes(record)[rule] == "ignored: OTHER"
    (record / "decode.py").write_text("OTHER = 1\n" + (record / "train_gpt.py").read_text())
    (record / "train_gpt.py").write_text("exec(open('decode.py').read())\n")
    assert verdicts(record, Verdict.PASSES)[rule] == "3 variables"


# 7: the non-record track has its own rules
def test_the_non_record_track_has_no_limits_of_time_and_hardware(record: Path, tmp_path: Path) -> None:
    write_logs(record, gpu="NVIDIA GeForce RTX 5090", clock_ms=7_200_000, hessians_s=60.0)
    assert set(failures(record)) == {"hardware", "training time", "training and calibration time"}
    edit_json(record, track="non-record-unlimited-16mb")
    assert not failures(record)
    edit_json(record, track=None)
    moved = shutil.copytree(record, tmp_path / "track_non_record_16mb/2026-04-20_Phases")
    assert not failures(moved) and "hardware" in failures(record)


# 8: trains on tokens it has scored
def test_score_first_training_is_a_note_and_other_training_breaks_a_rule(record: Path) -> None:
    rule = "no training on validation tokens"
    assert notes(record)[rule].startswith("trains on tokens it has scored (README.md: ")
    rewrite(record / "README.md", "Score-first test-time training: each chunk is scored before ", "At the end ")
    assert failures(record)[rule].startswith("README.md: ")
    (record / "README.md").write_text("# Phases\n\nval_bpb: 1.06123\n")
    assert verdicts(record, Verdict.UNKNOWN)[rule].startswith("quantized_ttt_phased: nothing says whether")


# 9 and 13: the right pairs of CaseOps, and a tail that is scored again
@pytest.mark.parametrize(("tokens", "size"), [(47_851_520, 151_074_499), (47_853_343, 151_080_644)])
def test_both_caseops_pairs_are_known(tmp_path: Path, tokens: int, size: int) -> None:
    rule = "each token scored once"
    values = {"val_bpb": 1.05759252, "val_loss": round(1.05759252 * 0.6931471805599453 * size / tokens, 8)}
    (tmp_path / "submission.json").write_text(json.dumps(values))
    held = verdicts(tmp_path, Verdict.PASSES)
    assert "CaseOps sp8192" in held["validation text"] and "as CaseOps sp8192" in held[rule]
    # the last 64 tokens, of 230 bytes, 31 more times
    more = 1.05759252 * 0.6931471805599453 * (size + 31 * 230) / (tokens + 31 * 64)
    (tmp_path / "submission.json").write_text(json.dumps({**values, "val_loss": round(more, 8)}))
    assert notes(tmp_path)[rule].endswith("the last tokens are scored again")


def test_the_bytes_of_the_caseops_text_give_the_published_scores() -> None:
    tokens, size = TEXTS["CaseOps sp8192, untrimmed"]
    assert round(size / tokens, 7) == 3.1571597
    tokens, size = TEXTS["CaseOps sp8192"]
    for loss, bpb in ((2.31115900, 1.05610947), (2.31265572, 1.05679341)):
        assert loss / math.log(2) * tokens / size == pytest.approx(bpb, abs=1e-8)


# 10: README against json
def test_another_headline_in_the_readme_breaks_a_rule(record: Path) -> None:
    rule = "README states the score of submission.json"
    assert rule in verdicts(record, Verdict.PASSES)
    rewrite(record / "README.md", "val_bpb: **1.06123**", "val_bpb: **1.1154**")
    assert failures(record)[rule] == "README.md says 1.1154, submission.json 1.06123"
    # a baseline that is beaten is no headline
    rewrite(record / "README.md", "val_bpb: **1.1154**", "Improves the old score 1.1154 to 1.06123 bpb")
    assert rule in verdicts(record, Verdict.PASSES)


# 11: weights
def test_a_key_that_is_missing_is_a_note_and_bytes_above_the_cap_break_a_rule(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "keys of submission.json" in notes(record) and main(["check", str(record)]) == 0
    assert main(["check", str(record), "--strict"]) == 1
    edit_json(record, bytes_total=16_000_001)
    capsys.readouterr()
    assert main(["check", str(record)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "BREAKS total size: 16,000,001 (submission.json), 1 too many (rule: code and model have at most 16,000,000"
        in text
    )


# logs of any name, copies, and unknown forms
def test_logs_of_any_name_count_once(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record / "logs").mkdir()
    (record / "train_seed42.log").rename(record / "logs/mine_log_42.txt")
    (record / "train_seed314.log").rename(record / "train_v2.txt")
    shutil.copy(record / "train_seed999.log", record / "train.log")
    rerun = "\n".join(log_lines("314")).replace("1.06120033", "1.06190033")
    (record / "train_seed314_rerun.log").write_text(rerun)
    (record / "train_seed7.log").write_text("epoch one done, loss of two\n")
    found = read_record_folder(record)
    logs = {one.seed: one.log.name for one in found.results if one.log}
    assert logs == {"42": "logs/mine_log_42.txt", "314": "train_v2.txt", "999": "train.log"} and not failures(record)
    told = notes(record)["each log counts once"].split("; ")
    assert told == [
        "train_seed314_rerun.log does not count",
        "train_seed999.log is a copy of train.log",
        "train_seed7.log: a log in an unknown form",
    ]
    for log in (*record.glob("*.log"), *record.glob("*.txt"), record / "logs/mine_log_42.txt"):
        log.write_text("epoch one done, loss of two\n")
    assert "a log in an unknown form: " in verdicts(record, Verdict.UNKNOWN)["required files"]


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": ["seed42", "seed314"], "val_bpb_seeds": [1.1, 1.2], "artifact_size_bytes": [5, 6]},
        {"seed_results": [{"seed": 42, "val_bpb": 1.1, "total_bytes": 5}, {"seed": 314, "val_bpb": 1.2, "total_bytes": 6}]},
        {"results": {"per_seed": {"42": {"ttt": {"bpb": 1.1}, "sliding_bpb": 1.3, "bytes_total": 5}, "314": {"ttt": {"bpb": 1.2}, "sliding_bpb": 1.4, "bytes_total": 6}}}},
        {"seeds": {"seed_42": {"bpb": 1.1, "artifact_bytes": 5, "pre_quant_bpb": 0.9}, "seed_314": {"bpb": 1.2, "artifact_bytes": 6, "pre_quant_bpb": 0.9}}},
    ],
    ids=["columns", "list", "nested", "dict"],
)  # fmt: skip
def test_seeds_are_read_from_lists_and_objects(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "submission.json").write_text(json.dumps({"val_bpb": 1.15, "betas": [0.9, 0.95], **values}))
    found = {
        one.seed: (one.numbers["val_bpb"], one.numbers["artifact_bytes"])
        for one in read_record_folder(tmp_path).results
    }
    assert found == {"42": (1.1, 5), "314": (1.2, 6)}


def test_sixty_records_are_checked_in_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # `python tests/helpers/many_records.py FOLDER` writes all sixty
    for index in range(3):
        make_foreign(tmp_path / f"records/2026-04-2{index}_Phases", name=f"Phases {index}")
    edit_json(tmp_path / "records/2026-04-21_Phases", bytes_total=16_000_001)
    for seed in SEEDS:
        log = tmp_path / f"records/2026-04-20_Phases/train_seed{seed}.log"
        source = "".join(f"    value_{number} = compute({number}, 'text: {number}')\n" for number in range(3500))
        log.write_text(f"{source}{'=' * 100}\n{log.read_text()}")
        assert log.stat().st_size > 150_000
    before = time.process_time()
    assert main(["check", str(tmp_path / "records")]) == 1
    # 10 s for 60 records
    assert time.process_time() - before < 3 * 10 / 60 + 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 records: 1 break a rule, 2 break none, 3 have notes."
    assert lines[-4].split() == ["2026-04-20_Phases", "1.06123000", "3", "15,921,500", "599.7", "455.5", "4", "-"]
    assert lines[-3].endswith("total size")


def test_one_log_of_several_with_the_headline_counts(record: Path) -> None:
    # versions of one seed, of which the first has the claimed score
    for index, seed in enumerate(SEEDS):
        log = record / f"train_seed{seed}.log"
        (record / f"train_v{index}.txt").write_text(log.read_text().replace(f"seed: {seed}", "seed: 1337"))
        log.unlink()
    edit_json(record, val_bpb=TTT[0], seeds=None, seed_results=None)
    (found,) = read_record_folder(record).results
    assert found.log and (found.seed, found.log.name, found.numbers["val_bpb"]) == ("1337", "train_v0.txt", TTT[0])
    assert notes(record)["each log counts once"] == "train_v1.txt does not count; train_v2.txt does not count"


def test_the_name_of_a_file_tells_the_seed_where_its_log_has_a_default(record: Path) -> None:
    for seed in SEEDS:
        rewrite(record / f"train_seed{seed}.log", f"  seed: {seed}", "  seed: 1337")
    found = read_record_folder(record).results
    assert [(one.seed, one.numbers["val_bpb"]) for one in found] == list(zip(SEEDS, TTT, strict=True))


def test_calibration_on_generated_text_is_no_training(record: Path) -> None:
    write_logs(record, hessians_s=210.0)
    assert "training and calibration time" in failures(record)
    for seed in SEEDS:
        rewrite(
            record / f"train_seed{seed}.log", "GPTQ:collected", "gptq:generated 64 sequences in 190.0s\nGPTQ:collected"
        )
    assert "calibrated on generated text" in verdicts(record, Verdict.PASSES)["training and calibration time"]


def test_a_mean_of_seeds_is_not_asked_of_a_single_log(record: Path) -> None:
    # two logs are missing, and the claim is the mean of three
    edit_json(record, seeds=None, seed_results=None)
    for seed in ("314", "999"):
        (record / f"train_seed{seed}.log").unlink()
    assert not failures(record)
    assert "which may be another seed's" in notes(record)["the score is in a log"]


def test_a_baseline_above_the_score_is_no_other_headline(record: Path) -> None:
    rewrite(record / "README.md", "# Phases\n", "# Phases\n\n| bpb | 1.1154 (before) | 1.06123 |\n")
    assert "README states the score of submission.json" in verdicts(record, Verdict.PASSES)
    rewrite(record / "README.md", "| bpb | 1.1154 (before) | 1.06123 |", "Score before: 1.1154")
    assert "README states the score of submission.json" in notes(record)

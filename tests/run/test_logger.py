"""The log's grammar, what a kill leaves of it, and the metrics beside it."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.run.log_grammar import GRAMMAR, parse_log
from train.run.logger import RunLogger, append_metric, read_metrics, resumed_steps, series

# kinds of lines that this program does not write
FOREIGN = {"size_code_compressed", "size_code_uncompressed", "total_eval", "limit", "setting"}


def write_run(folder: Path) -> Path:
    with RunLogger(folder, 42, echo=False) as log:
        log.header(gpu_report="no GPU")
        log.facts(
            dataset="data/fineweb10B_sp1024",
            train_shards=80,
            model_params=17059912,
            world_size=2,
            grad_accum_steps=4,
            seed=42,
        )
        log.warmup_step(1, 2)
        log.warmup_step(2, 2, " (1 without recurrence, 1 with it)")
        log.val_step(0, 20, 6.93251234, 4.10581234, 0.0)
        log.train_step(1, 20, 6.91, 43.4, lr=0.04)
        log.train_step(10, 20, 5.12345, 435.4)
        log.val_step(12, 20, 2.85199103, 1.1040946, 522.4)
        log.stopping_early(12, 20, 522.4)
        log.peak_memory(10184 * 2**20 + 5, 10200 * 2**20)
        log.line("gptq:calibrated 66 matrices on 64 training batches in 9.5s")
        log.line("fit:measured on 32768 training tokens in 2.5s")
        log.sizes(raw_bytes=67224983, code_bytes=47642, model_bytes=15815847)
        log.final("int6_roundtrip", 2.0727, 1.2244, 1.401)
        log.final("int6_sliding_window", 1.94077647, 1.14943715, 85.5214, stride=64)
    return log.path


def test_lines_are_the_published_ones_to_the_character(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    assert path.name == "train_seed42.log"
    text = path.read_text()
    versions, lines = text.split("=" * 100 + "\n")
    assert re.fullmatch(r"Running Python 3\.[^\n]*\nRunning PyTorch \d[^\n]*\nno GPU\n", versions)
    assert lines.splitlines() == [
        "train_loader:dataset:data/fineweb10B_sp1024 train_shards:80",
        "model_params:17059912",
        "world_size:2 grad_accum_steps:4",
        "seed:42",
        "warmup_step:1/2",
        "warmup_step:2/2 (1 without recurrence, 1 with it)",
        "step:0/20 val_loss:6.9325 val_bpb:4.1058 train_time:0ms step_avg:0.00ms",
        "step:1/20 train_loss:6.9100 train_time:43ms step_avg:43.40ms lr:0.04",
        "step:10/20 train_loss:5.1235 train_time:435ms step_avg:43.54ms",
        "step:12/20 val_loss:2.8520 val_bpb:1.1041 train_time:522ms step_avg:43.53ms",
        "stopping_early: wallclock_cap train_time:522ms step:12/20",
        "peak memory allocated: 10184 MiB reserved: 10200 MiB",
        "gptq:calibrated 66 matrices on 64 training batches in 9.5s",
        "fit:measured on 32768 training tokens in 2.5s",
        "Serialized model: 67224983 bytes",
        "Code size: 47642 bytes",
        "Serialized model int6+brotli: 15815847 bytes",
        "Total submission size int6+brotli: 15863489 bytes",
        "final_int6_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms",
        "final_int6_roundtrip_exact val_loss:2.07270000 val_bpb:1.22440000",
        "final_int6_sliding_window val_loss:1.9408 val_bpb:1.1494 stride:64 eval_time:85521ms",
        "final_int6_sliding_window_exact val_loss:1.94077647 val_bpb:1.14943715",
    ]


def test_every_line_after_the_header_matches_exactly_one_pattern(tmp_path: Path) -> None:
    lines = write_run(tmp_path).read_text().split("=" * 100 + "\n")[1].splitlines()
    kinds = [[kind for kind, pattern in GRAMMAR.items() if pattern.match(line)] for line in lines]
    assert all(len(found) == 1 for found in kinds)
    # the other kinds are lines of other programs, see test_log_grammar.py
    assert set(GRAMMAR) - {found[0] for found in kinds} == FOREIGN
    # the figure script of modded-nanogpt finds validations with this expression
    assert re.findall(r"step:(\d+)/(\d+)\s+val_loss:([0-9.]+)", "\n".join(lines)) == [
        ("0", "20", "6.9325"),
        ("12", "20", "2.8520"),
    ]


def test_lines_of_other_programs_are_read_too_and_of_several_runs_the_last(tmp_path: Path) -> None:
    head = f"step:9/9 train_loss:9.0000 train_time:9ms step_avg:9.00ms\n{'=' * 100}\nRunning Python 3.12\nRunning PyTorch 2.10\n{'=' * 100}\n"
    lines = [
        "seed:41",
        "gptq:calibrated 66 matrices on 64 training batches in 9.9s",
        "GPTQ:collected 67 Hessians in 10.6s",
        "fit:measured on 32768 training tokens in 2.5s",
        "Serialized model w6e16+zstd22: 15283986 bytes (payload:16384256)",
        "Total submission size w6e16+zstd22: 15347515 bytes",
        "final_sliding_window stride:64 val_loss:2.3850 val_bpb:1.1619 eval_time:200721ms",
        "final_sliding_window_exact stride:64 val_loss:2.38498992 val_bpb:1.16192049",
    ]
    path = tmp_path / "train.log"
    path.write_text(head + "seed:40\nwarmup_step:1/20\n" + head + "\n".join(lines) + "\n")
    log = parse_log(path)
    assert log["facts"] == {"seed": 41, "calibration_s": 13.1} and log["warmup_steps"] == 0
    assert log["sizes"] == {"model": 15283986, "total": 15347515} and log["form"] == "w6e16+zstd22"
    assert log["finals"]["sliding_window_exact"] == {"val_loss": 2.38498992, "val_bpb": 1.16192049}
    assert log["finals"]["sliding_window"]["eval_time_ms"] == 200721.0
    assert log["lines"][:-1] == lines and not log["steps"]


def test_parse_log_returns_what_was_written_and_no_line_of_the_source(tmp_path: Path) -> None:
    log = parse_log(write_run(tmp_path))
    assert sorted(log["steps"]) == [1, 10]
    assert log["steps"][10] == {
        "step": 10,
        "total": 20,
        "train_loss": 5.1235,
        "train_time_ms": 435.0,
        "step_avg_ms": 43.54,
    }
    assert log["vals"][12]["val_bpb"] == 1.1041
    assert log["finals"]["int6_sliding_window_exact"] == {"val_loss": 1.94077647, "val_bpb": 1.14943715}
    assert log["finals"]["int6_sliding_window"]["stride"] == 64
    assert log["finals"]["int6_roundtrip"] == {"val_loss": 2.0727, "val_bpb": 1.2244, "eval_time_ms": 1401.0}
    assert log["sizes"] == {"raw": 67224983, "code": 47642, "model": 15815847, "total": 15863489}
    assert log["form"] == "int6+brotli"
    assert log["stopping_early"] == {"train_time_ms": 522.0, "step": 12, "total": 20}
    assert log["peak_memory"] == {"allocated_mib": 10184, "reserved_mib": 10200}
    assert log["warmup_steps"] == 2
    assert log["facts"]["model_params"] == 17059912 and log["facts"]["grad_accum_steps"] == 4
    with pytest.raises(UserError, match="no such log"):
        parse_log(tmp_path / "other.log")


def test_losses_that_are_no_numbers_stay_in_the_grammar_and_out_of_the_curves(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 1, echo=False) as log:
        log.train_step(1, 5, float("nan"), 10.0)
        log.train_step(2, 5, float("inf"), 20.0)
        log.train_step(3, 5, 4.0, 30.0)
    assert [str(step["train_loss"]) for step in parse_log(log.path)["steps"].values()] == ["nan", "inf", "4.0"]
    records = read_metrics(log.metrics_path)
    assert records[0] == {"kind": "train", "step": 1, "train_loss": None, "seconds": 0.01}
    assert series(records, "train", "train_loss") == [(3, 0.03, 4.0)]


def test_console_repeats_the_lines_but_not_the_header_and_only_on_rank_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path, 1) as log:
        log.header(gpu_report="GPU")
        log.line("model_params:5")
    assert capsys.readouterr().out == "model_params:5\n"
    other = tmp_path / "other"
    other.mkdir()
    with RunLogger(other, 1, rank=1) as log:
        log.header()
        log.train_step(1, 2, 3.0, 4.0)
        log.final("int6_sliding_window", 1.0, 1.0, 1.0, stride=64)
    assert capsys.readouterr().out == "" and list(other.iterdir()) == []


def test_resume_cuts_the_torn_line_and_appends_without_a_second_header(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    whole_log, whole_metrics = path.read_text(), metrics.read_text()
    path.write_text(whole_log + "step:13/20 train_lo")
    metrics.write_text(whole_metrics + '{"kind": "tr')
    assert len(read_metrics(metrics)) == len(whole_metrics.splitlines())
    with RunLogger(tmp_path, 42, echo=False) as log:
        assert log.resumed
        log.header(gpu_report="again")
        log.resume(10, 435.4)
        log.train_step(12, 20, 5.0, 500.0)
    added = "resumed: step:10 train_time:435ms\nstep:12/20 train_loss:5.0000 train_time:500ms step_avg:41.67ms\n"
    assert path.read_text() == whole_log + added
    records = read_metrics(metrics)
    assert resumed_steps(records) == [10]
    assert series(records, "val", "val_bpb") == [(0, 0.0, 4.10581234)]
    assert series(records, "train", "train_loss") == [(1, 0.0434, 6.91), (10, 435.4 / 1000, 5.12345), (12, 0.5, 5.0)]


@pytest.mark.parametrize(
    ("resumes", "counted"),
    [
        ([], []),
        ([0], []),
        ([50, 100], [50, 100]),
        ([100, 100], [100]),
        ([50, 100, 70], [50, 70]),
        ([50, 0], []),
        ([0, 50], [50]),
    ],
)
def test_a_run_is_made_of_the_parts_that_were_not_done_again(resumes: list[int], counted: list[int]) -> None:
    records = [{"kind": "resume", "step": step, "seconds": 1.0} for step in resumes]
    assert resumed_steps([{"kind": "train", "step": 7}, *records]) == counted


def test_curves_rise_in_steps_and_take_the_last_word_on_each() -> None:
    records = [
        {"kind": "val", "step": step, "seconds": step / 10, "val_bpb": bpb} for step, bpb in ((0, 4.0), (30, 3.0))
    ]
    records += [
        {"kind": "val", "step": step, "seconds": step / 5, "val_bpb": bpb} for step, bpb in ((20, 2.5), (30, 2.0))
    ]
    assert series(records, "val", "val_bpb") == [(0, 0.0, 4.0), (20, 4.0, 2.5), (30, 6.0, 2.0)]


def test_a_full_disk_is_named_by_the_file(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys\n"
        "from train.common.errors import main_guard\n"
        "from train.run.logger import RunLogger\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "main_guard(lambda: getattr(RunLogger(sys.argv[1], 7, echo=False), sys.argv[2])(*sys.argv[3:]))\n"
    )
    for call, name in ((("line", "x" * 2000), "train_seed7.log"), (("metric", "y" * 2000), "metrics.jsonl")):
        command = [sys.executable, "-c", program, str(tmp_path), *call]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2, ended.stderr
        assert f"error: {tmp_path / name}: File too large: free some space" in ended.stderr


def test_a_kill_loses_no_whole_line(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from train.run.logger import RunLogger\n"
        "log = RunLogger(sys.argv[1], 1, echo=False)\n"
        "for step in range(1, 4): log.train_step(step, 9, 1.0, 5.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == -signal.SIGKILL
    assert sorted(parse_log(tmp_path / "train_seed1.log")["steps"]) == [1, 2, 3]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_metrics_that_are_not_torn_but_foreign_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metric(path, "train", {"step": 1})
    assert json.loads(path.read_text()) == {"kind": "train", "step": 1}
    path.write_text('{"kind": "train"}\nnonsense\n{"kind": "val"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    for line in ("[1]", '{"step": 1}'):
        path.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"line 1.*with a kind"):
            read_metrics(path)
    with pytest.raises(UserError, match="missing"):
        read_metrics(tmp_path / "none.jsonl")

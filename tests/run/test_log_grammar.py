"""Logs of other programs: each published form of a line is read, behind blanks, time stamps and block layouts."""

from pathlib import Path

import pytest

from train.run.log_grammar import GRAMMAR, Log, parse_log_bytes

BAR = "=" * 100
CARD = "|   {}  NVIDIA H100 80GB HBM3          On  |   00000000:1{}:00.0 Off |                    0 |"


def parse(*lines: str) -> Log:
    return parse_log_bytes("\n".join([*lines, ""]).encode())


# line → kind, and some of the numbers in it
LINES = [
    ("500/20000 val_loss: 2.4312 val_bpb: 1.1134", "val_step", {"step": 500, "total": 20000, "val_bpb": 1.1134}),
    ("500/20000 train_loss: 2.4501 train_time: 0.8m tok/s: 7654321", "train_step", {"train_loss": 2.4501}),
    ("step:7/9 train_loss:2.5000 lr:0.02 train_time:750ms step_avg:107.14ms", "train_step", {"step_avg_ms": 107.14}),
    ("stopping_early: wallclock_cap train_time: 599123ms step: 4801/20000", "stopping_early", {"step": 4801}),
    ("final_sliding val_loss:2.1 val_bpb:1.2 eval_time:900ms", "final", {"val_bpb": 1.2}),
    ("quantized val_loss:2.10000000 val_bpb:1.20000000 eval_time:900ms", "final", {"val_loss": 2.1}),
    ("quantized_ttt_phased val_loss: 2.1, val_bpb: 1.2, eval_time: 512.5s", "final", {"val_bpb": 1.2}),
    ("a_new_name+more val_bpb=1.25", "final", {"val_bpb": 1.25}),
    ("diagnostic pre-quantization post-ema val_loss:2.1 val_bpb:1.2 eval_time:9ms", "final", {"val_bpb": 1.2}),
    ("total_eval_time:512.5s", "total_eval", {}),
    ("Code size (uncompressed): 151234 bytes", "size_code_uncompressed", {"bytes": 151234}),
    ("Code size (compressed): 31234 bytes", "size_code_compressed", {"bytes": 31234}),
    ("Serialized model quantized+brotli: 15912345 bytes", "size_model", {"bytes": 15912345}),
    ("Total submission size mixed_int5_int6+zstd (roundtrip): 15943579 bytes", "size_total", {"bytes": 15943579}),
    ("artifact_wallclock: 1021.067s (must be < 600.0)", "limit", {"value": 1021.067, "limit": 600.0}),
    ("world_size: 8", "world_size", {"world_size": 8}),
    ("  seed: 42", "seed", {"seed": 42}),
    ("  matrix_lr: 0.02", "setting", {}),
    ("GPTQ:collected 67 Hessians in 12.5s", "calibration", {"calibration_s": 12.5}),
]


@pytest.mark.parametrize(("line", "kind", "numbers"), LINES, ids=lambda value: str(value)[:30])
def test_each_form_is_read_by_its_row(line: str, kind: str, numbers: dict[str, float]) -> None:
    first, found = next((kind, match) for kind, row in GRAMMAR.items() if (match := row.match(line)))
    assert first == kind
    assert {name: float(found[name]) for name in numbers} == numbers


@pytest.mark.parametrize(
    "line",
    [
        "ttt_progress batch:5/782 val_loss:2.1 val_bpb:1.2",
        'log(f"final_{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f}")',
        f"step:{'9' * 5000}/20000 train_loss:1.0",
        f"quantized val_loss:{'9' * 5000} val_bpb:{'9' * 5000}",
        f"seed:{'9' * 5000}",
    ],
    ids=lambda line: line[:20],
)
def test_what_is_no_result_is_not_read(line: str) -> None:
    log = parse(line)
    assert not (log["steps"] or log["vals"] or log["finals"] or log["facts"])


def test_a_log_behind_time_stamps_with_a_block_of_settings_before_the_versions() -> None:
    lines = [
        "import torch", BAR, "Hyperparameters:", "  iterations: 20000", "  run_name: a b", "  seed: 42", BAR,
        "Running Python 3.12", CARD.format(0, 9), CARD.format(1, 8), BAR, "model_params:35944602",
        "1/20000 train_loss: 9.0100 train_time: 0.0m tok/s: 7000000",
        "500/20000 train_loss: 3.0100 train_time: 0.9m tok/s: 7000000",
        "pre-quantization post-ema val_loss:2.2 val_bpb:1.07 eval_time:6000ms",
        "quantized_ttt val_loss:2.3 val_bpb:1.08 eval_time:8.5m",
    ]  # fmt: skip
    plain = parse(*lines)
    assert plain["settings"] == {"iterations": "20000", "run_name": "a b"}
    assert plain["facts"] == {"seed": 42, "model_params": 35944602}
    assert plain["gpus"] == ["NVIDIA H100 80GB HBM3"] * 2
    # 0.9 min is 54 s, three seconds more or less
    assert plain["steps"][500] == {
        "step": 500, "total": 20000, "train_loss": 3.01, "train_time_ms": 54_000.0, "train_time_error_ms": 3000.0,
    }  # fmt: skip
    assert plain["finals"]["quantized_ttt"]["eval_time_ms"] == 510_000.0
    assert plain["final_lines"]["quantized_ttt"] == 16 and lines[15].startswith("quantized_ttt ")
    for prefix in ("1776000000.125 ", "[1776000000] ", "2026-04-20 12:00:00,125 ", "[rank0]: "):
        assert parse(*(prefix + line for line in lines)) == plain
    windows = "\r\n".join([*lines, ""])
    assert parse_log_bytes(windows.encode("utf-16")) == parse_log_bytes(windows.encode()) == plain


def test_source_that_is_printed_behind_the_header_is_left_out() -> None:
    source = ["def main():", "    x: int = 1", 'if __name__ == "__main__":', "    main()"]
    log = parse("Running Python 3.12", BAR, *source, "seed:7", "final_flat val_loss:2.3 val_bpb:1.08")
    assert log["lines"][0] == "seed:7" and log["settings"] == {} and log["final_lines"] == {"flat": 8}


def test_any_bytes_are_a_log(tmp_path: Path) -> None:
    for data in (b"", b"\xff\xfe\xff", b"\x00" * 100, bytes(range(256)) * 20, b"1/2 train_loss: nan train_time: infm"):
        log = parse_log_bytes(data)
        assert not log["finals"] and set(log["steps"]) <= {1}

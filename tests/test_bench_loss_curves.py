"""Loss curves with and without a kernel: what lies within the spread of seeds, and what does not."""

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_loss_curves as bench

COMMAND = ["--tiny", "--device", "cpu", "--recipe", "quickstart", "--seeds", "2", "--steps", "4"]


def test_a_way_is_trained_beside_seeds_on_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the same way by another name has the same curve, to the last bit
    assert bench.main([*COMMAND, "--ways", "torch,xsa=torch", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "distance 0.00000 nats, within the spread of seeds" in printed and "not kept" in printed
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    first, other = (np.array([float(row[f"torch, seed {seed}"]) for row in rows]) for seed in (1337, 1338))
    assert abs(first[0] - np.log(512)) < 0.3 and not np.array_equal(first, other)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_way_that_trains_otherwise_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = {("torch", 1337): [6.0, 5.0], ("torch", 1338): [6.1, 5.1], ("golf", 1337): [6.0, 5.4]}
    monkeypatch.setattr(bench, "train", lambda config, way, *_: np.array(curves[way, config.seed]))
    assert bench.main([*COMMAND[:-1], "2", "--ways", "torch,golf"]) == 1
    assert (
        "golf: 6.0000 to 5.4000 (torch: 6.0000 to 5.0000), distance 0.20000 nats, NOT within" in capsys.readouterr().out
    )
    monkeypatch.setitem(curves, ("golf", 1337), [6.0, 5.1])
    assert bench.main([*COMMAND[:-1], "2", "--ways", "torch,golf"]) == 0
    monkeypatch.setitem(curves, ("golf", 1337), [6.0, float("nan")])
    assert bench.main([*COMMAND[:-1], "2", "--ways", "torch,golf"]) == 1


def test_distances_by_hand() -> None:
    ramp = np.arange(40.0)
    # averages over 20 steps of curves that are a constant apart
    found, spread = bench.compare([ramp, ramp + 0.5, ramp - 1.0], {"other": ramp + 0.25})
    assert found == {"other": pytest.approx(0.25)} and spread == pytest.approx((0.5 + 1.0 + 1.5) / 3)


def test_rows_of_a_gpu_are_kept_under_their_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.common, "ROOT", tmp_path)
    monkeypatch.setattr(bench.common, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.common, "environment", lambda device: {"gpu": "NVIDIA H100", "commit": "c"})
    monkeypatch.setattr(bench, "train", lambda config, way, *_: np.array([6.0, config.seed % 7]))
    command = ["--device", "cpu", "--steps", "2", "--ways", "torch,golf"]
    for _ in range(2):
        assert bench.main(command) == 0
    assert "-> curves/NVIDIA_H100.csv" in capsys.readouterr().out
    header, *rows = csv.reader((tmp_path / "curves" / "NVIDIA_H100.csv").open())
    assert header == list(bench.COLUMNS) and len(rows) == 2
    assert dict(zip(header, rows[0], strict=True))["way"] == "golf"
    bench.main([*command, "--tiny"])
    assert "not kept" in capsys.readouterr().out


def test_a_way_beside_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([*COMMAND, "--ways", "torch"])
    assert ended.value.code == 2 and "--ways: torch has nothing to be compared with" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--steps", "1"]])
def test_a_single_curve_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--tiny", "--device", "cpu", *arguments])
    assert "expected at least 2 of each" in capsys.readouterr().err

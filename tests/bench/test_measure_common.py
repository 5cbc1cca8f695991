"""The measuring itself, on a CPU: checks come first, variants take turns, nothing a CPU gave is kept."""

import dataclasses
import math
import subprocess

import pytest
import torch

from benchmarks import bench_int6, bench_loss_curves, bench_step
from benchmarks.measure import common, devices
from benchmarks.report.results import ResultsError, read_results
from train.common.hardware import datasheet_tflops

CPU = torch.device("cpu")


def make(seed):
    return [torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]


def case(**changed):
    fields = {"op": "matmul", "shape": "32x32", "dtype": "float32", "make": make, "max_rel_err": 1e-5}
    fields |= {"truth": lambda given: [given[0].double() @ given[1].double()], "flops": 65536.0, "bytes": 12288.0}
    return common.Case(**(fields | changed))


def clock(rounds=6):
    return common.Clock(CPU, warmup_ms=1.0, rounds=rounds)


def product(given):
    return [given[0] @ given[1]]


def test_every_variant_is_timed_in_turns_and_the_first_twice():
    seen = []

    def spy(name):
        return lambda given: (seen.append((name, float(given[0][0, 0]))), product(given))[1]

    limits = common.Ceilings(tflops=2.0, gbps=3.0)
    rows = common.measure(case(), [common.Variant("a", spy("a")), common.Variant("b", spy("b"))], clock(), limits)
    assert [row["impl"] for row in rows] == ["a", "b", "a again"]
    for row in rows:
        assert row["p20"] <= row["p50"] <= row["p80"] and row["n"] == 6 and row["mode"] == "eager"
        assert 0 < row["rel_err"] < 1e-6
        # 65,536 FLOPs at 2 TF/s are 33 ns, 12,288 bytes at 3 GB/s are 4.1 µs
        assert row["floor"] == pytest.approx(0.004096)
        assert row["tflops"] == pytest.approx(65536 / row["p50"] / 1e9)
        assert row["gbps"] == pytest.approx(12288 / row["p50"] / 1e6)
    turns = [name for name, _ in seen[-18:]]
    assert turns.count("a") == 12 and turns.count("b") == 6
    # in each round b has its turn once, and not always in the same place
    assert {turns[start : start + 3].index("b") for start in range(0, 18, 3)} == {0, 1, 2}
    assert len({value for name, value in seen[-18:] if name == "b"}) == 2


def test_a_peer_that_does_not_run_is_named_and_left_out(capsys):
    def broken(given):
        raise ImportError("no such kernel\nand more")

    assert common.runs(common.Variant("good", product), make(0))
    assert not common.runs(common.Variant("broken", broken), make(0))
    assert capsys.readouterr().out == "broken: left out: ImportError: no such kernel\n"


def test_a_wrong_result_is_not_timed():
    for wrong in (lambda given: [1.001 * (given[0] @ given[1])], lambda given: [math.nan * given[0]]):
        variants = [common.Variant("right", product), common.Variant("wrong", wrong)]
        with pytest.raises(common.CheckFailed, match="matmul, wrong: relative error"):
            common.measure(case(), variants, clock(), common.Ceilings(1.0, 1.0))


def test_inputs_rotate_over_three_caches():
    seeds = []
    counted = case(make=lambda seed: (seeds.append(seed), make(seed))[1])
    timer = clock(1)
    timer.cache_bytes = 20_000
    common.measure(counted, [common.Variant("a", product)], timer, common.Ceilings(1.0, 1.0))
    # 60,000 bytes are eight times two matrices of 4,096 bytes; the check has inputs of its own
    assert sorted(set(seeds)) == list(range(8))
    assert common.input_bytes({"x": make(0), "y": (torch.zeros(3, dtype=torch.bfloat16), None)}) == 8198


def test_inputs_on_the_host_do_not_rotate():
    seeds = []
    text = case(make=lambda seed: (seeds.append(seed), [t.numpy() for t in make(seed)])[1])
    timer = clock(1)
    timer.cache_bytes = 20_000
    product_of_arrays = common.Variant("a", lambda given: [torch.from_numpy(given[0] @ given[1])])
    truth = {"truth": lambda given: [torch.from_numpy(given[0].astype(float) @ given[1].astype(float))]}
    common.measure(dataclasses.replace(text, **truth), [product_of_arrays], timer, common.Ceilings(1.0, 1.0))
    assert sorted(set(seeds)) == [0, 1]


@pytest.mark.parametrize(
    "given",
    [
        ["--rounds", "0"],
        ["--rounds", "-3"],
        ["--device", "nope"],
        ["--device", "meta"],
        ["--device", "cuda:99"],
        ["--warmup-ms", "inf"],
        ["--warmup-ms", "-1"],
        ["--warmup-ms", "x"],
    ],
)
def test_options_that_measure_nothing_are_refused(given, capsys):
    with pytest.raises(SystemExit) as ended:
        common.parser("bench_x", "x").parse_args(given)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {given[0]}: expected" in said or "argument --device: cuda:99: PyTorch finds" in said


def test_what_is_not_given_is_less_with_tiny_and_a_flag_that_would_do_nothing_is_refused(capsys):
    def parsed(*given, **defaults):
        found = common.parser("bench_x", "x", **defaults).parse_args(["--device", "cpu", *given])
        return found.rounds, found.warmup_ms

    assert parsed() == (50, 300.0) and parsed(rounds=3, warmup_ms=0.0) == (3, 0.0)
    assert parsed("--tiny") == (2, 1.0) == parsed("--tiny", rounds=7)
    assert parsed("--rounds", "9", "--tiny", "--warmup-ms", "0") == (9, 0.0)
    for given in (["--rounds", "3"], ["--warmup-ms", "3"]):
        with pytest.raises(SystemExit):
            bench_loss_curves.main(["--device", "cpu", *given])
        assert f"unrecognized arguments: {given[0]}" in capsys.readouterr().err


def test_ceilings_and_quantiles():
    found = common.ceilings(clock(2))
    assert found.tflops > 0 and found.gbps > 0
    assert common.Ceilings(100.0, 2000.0).floor_ms(1e12, 1e9) == pytest.approx(10.0)
    assert common.Ceilings(100.0, 2000.0).floor_ms(1e9, 1e9) == pytest.approx(0.5)
    assert common.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))


def test_a_gpu_has_the_data_sheet_s_rate_of_its_own_kind():
    # names as CUDA gives them, and half of the sheets' figures with sparsity
    names = {"NVIDIA H100 80GB HBM3": 1978.9, "NVIDIA H100 PCIe": 1513.0, "NVIDIA H100 NVL": 1671.0}
    names |= {"NVIDIA H200": 1978.9, "NVIDIA H200 NVL": 1671.0}
    for gpu, sparse in names.items():
        assert datasheet_tflops(gpu) == pytest.approx(sparse / 2, rel=1e-3)
    assert datasheet_tflops("NVIDIA A100-SXM4-80GB") is None
    # a slice of a GPU has some of its multiprocessors
    assert datasheet_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    # what is computed and what is measured are held against the same number
    assert devices.DEVICES[0].tflops == datasheet_tflops("NVIDIA H100 80GB HBM3")


def test_a_cpu_s_rows_are_not_kept(tmp_path):
    rows = common.measure(case(), [common.Variant("a", product)], clock(2), common.Ceilings(1.0, 1.0))
    here = common.environment(CPU)
    assert here["gpu"] == "cpu" and here["torch"] == torch.__version__
    assert common.append_rows(rows, here, tmp_path) is None and list(tmp_path.iterdir()) == []
    # what is measured is what can be read again
    common.append_rows(rows, here | {"gpu": "Made GPU"}, tmp_path)
    assert [row.subject.impl for row in read_results(tmp_path)] == ["a", "a again"]
    assert "a again" in common.render(rows, "cpu") and "on cpu" in common.render(rows, "cpu")


@pytest.mark.parametrize("bench", [bench_int6, bench_step, bench_loss_curves])
def test_a_file_of_other_columns_is_refused_before_anything_is_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made GPU")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common.check_results_file, "__defaults__", (tmp_path, common.COLUMNS))
    folder = tmp_path / "curves" if bench is bench_loss_curves else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "Made_GPU.csv").write_text("p50,p20\n1,2\n")
    with pytest.raises(ResultsError, match=r"Made_GPU\.csv, line 1: expected the columns date,commit"):
        bench.main(["--device", "cuda"])


@pytest.mark.parametrize("failing", ["bench_xsa", "report", ""])
def test_every_benchmark_runs_though_one_fails_and_the_failed_ones_are_named(failing, tmp_path):
    ran, python = tmp_path / "ran", tmp_path / "python"
    python.write_text(f"""#!/bin/sh
[ "$1" = -c ] && exec echo --tiny
echo "$*" >> {ran}
case "$* " in *"{failing or "nothing"} "*) exit 3;; esac
""")
    python.chmod(0o755)
    # the environment counts as made
    command = ["make", "-o", ".venv/.ready", "bench", f"BIN={tmp_path}", "READY=.venv/.ready"]
    result = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    benches = {path.stem for path in (common.ROOT / "benchmarks").glob("bench_*.py")} - {"bench_artifact"}
    wanted = {f"-m benchmarks.{name} --tiny" for name in benches} | {"-m benchmarks report"}
    assert set(ran.read_text().splitlines()) == wanted and (result.returncode == 0) == (not failing)
    assert (f"error: failed: {failing}\n" in result.stdout) == bool(failing)

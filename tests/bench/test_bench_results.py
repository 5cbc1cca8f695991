"""The rows of `benchmarks/results/`: appended whole, and read whole or refused by file, line, field and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_rows import row, write

from benchmarks.__main__ import main
from benchmarks.report import tables as report
from benchmarks.report.results import COLUMNS, ResultsError, append_rows, file_stem, gpus, read_results

ROOT = Path(__file__).resolve().parents[2]
SURROUNDINGS = {"date": "2026-01-01T00:00:00Z", "commit": "aaaaaaa", "dirty": 0, "gpu": "Made GPU"}
MEASURED = {
    "op": "op",
    "impl": "torch",
    "mode": "eager",
    "shape": "8x8",
    "dtype": "bf16",
    "p50": 2.0,
    "p20": 1.9,
    "p80": 2.1,
}

# how a file of a header and two rows (p50 7.5, then 8.25) is damaged, and what is said of it
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "torn": (lambda b: b[:-40], r"line 3: \w+: expected 21 cells, found \d+: a row was cut off, or two"),
    "torn_in_the_last_cell": (lambda b: b[:-3], r"line 3: n: expected a line break"),
    "glued": (lambda b: b[:-40] + b.split(b"\r\n")[1] + b"\r\n", r"line 3: n: expected 21 cells, found \d+: a row was cut off, or two"),
    "glued_within_the_date": (
        lambda b: (lambda head, one, two, _: b"\r\n".join((head, one, two[:7] + one, b"")))(*b.split(b"\r\n")),
        r"line 3: date: expected one such as 2026-01-31T23:59:59Z, found '2026-012026-",
    ),
    "nul_line": (lambda b: b + b"\0\0\0\r\n", r"line 4: date: expected 21 cells, found 1"),
    "nul_in_a_cell": (lambda b: b.replace(b",triton,eager", b",tri\0ton,eager"), r"line 3: impl: expected text, found 'tri\\x00ton'"),
    "no_utf8": (lambda b: b.replace(b",triton,eager", b",tri\xffton,eager"), r"line 3: impl: expected text, found 'tri\\udcffton'"),
    "open_quote": (lambda b: b.replace(b",torch,eager", b',"torch,eager'), r"line 2: impl: expected 21 cells, found 10"),
    "merge": (lambda b: b.replace(b"\r\n", b"\r\n<<<<<<< HEAD\r\n", 1), r"line 2: expected a row, found the merge mark '<<<<<<<': keep the rows of both"),
    "merge_end": (lambda b: b + b">>>>>>> other\r\n", r"line 4: expected a row, found the merge mark '>>>>>>>'"),
    "no_number": (lambda b: b.replace(b",8.25,", b",fast,"), r"line 3: p50: expected a number from 0, found 'fast'"),
    "no_p50": (lambda b: b.replace(b",8.25,", b",,"), r"line 3: p50: expected a number from 0, found ''"),
    "nan": (lambda b: b.replace(b",8.25,", b",nan,"), r"line 3: p50: expected a number from 0, found 'nan'"),
    "infinite": (lambda b: b.replace(b",8.25,", b",inf,"), r"line 3: p50: expected a number from 0, found 'inf'"),
    "negative": (lambda b: b.replace(b",8.25,", b",-8.25,"), r"line 3: p50: expected a number from 0, found '-8.25'"),
    "zero": (lambda b: b.replace(b",8.25,8,", b",0,0,"), r"line 3: p20: expected 0 < p20 ≤ p50 ≤ p80"),
    "out_of_order": (lambda b: b.replace(b",8.25,", b",9.25,"), r"line 3: p80: expected 0 < p20 ≤ p50 ≤ p80"),
    "nan_floor": (lambda b: b.replace(b",3.5,", b",nan,"), r"line 3: floor: expected a number from 0, found 'nan'"),
    "dirt": (lambda b: b.replace(b"aaaaaaa,0", b"aaaaaaa,7"), r"line 2: dirty: expected 0 or 1, found '7'"),
    "no_commit": (lambda b: b.replace(b",aaaaaaa,", b",,"), r"line 2: commit: expected a text, found none"),
    "no_gpu": (lambda b: b.replace(b"Made GPU", b"", 1), r"line 2: gpu: expected a text, found none"),
    "header_again": (lambda b: b + b.split(b"\r\n")[0] + b"\r\n", r"line 4: date: expected one such as"),
    "other_columns": (lambda b: b.replace(b"p50", b"p51", 1), r"line 1: expected the columns date,.*move the file away"),
    "empty": (lambda b: b"", r"line 1: expected the columns date,.*found ''"),
}  # fmt: skip


def made(path: Path) -> Path:
    return write(path, [row(p50=7.5, p20=7, p80=8), row(impl="triton", p50=8.25, p20=8, p80=9, floor=3.5)])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = DAMAGE[name]
    # the whole one comes first
    made(tmp_path / "results" / "a.csv")
    path = made(tmp_path / "results" / "b.csv")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResultsError, match=rf"b\.csv, {said}") as refused:
        read_results(tmp_path / "results")
    assert any(
        remedy in str(refused.value) for remedy in ("mend this line, or delete", "keep the rows", "move the file")
    )
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\nas it was\n{report.END}\n")
    monkeypatch.chdir(ROOT)
    places = ["--page", str(page), "--plots", str(tmp_path / "plots")]
    monkeypatch.setattr("sys.argv", ["benchmarks", "--results", str(tmp_path / "results"), "report", *places])
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line ")
    assert "as it was" in page.read_text() and not (tmp_path / "plots").exists()


def test_a_page_without_marks_leaves_the_plots_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "results" / "a.csv")
    (tmp_path / "page.md").write_text("no marks")
    places = ["--page", str(tmp_path / "page.md"), "--plots", str(tmp_path / "plots")]
    monkeypatch.setattr("sys.argv", ["benchmarks", "--results", str(tmp_path / "results"), "report", *places])
    assert main() == 2 and not (tmp_path / "plots").exists()


def test_what_cannot_be_drawn_leaves_the_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "results" / "a.csv")
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\nas it was\n{report.END}\n")
    monkeypatch.setattr("benchmarks.report.plots._speedup", lambda *_: 1 / 0)
    places = ["--page", str(page), "--plots", str(tmp_path / "plots")]
    monkeypatch.setattr("sys.argv", ["benchmarks", "--results", str(tmp_path / "results"), "report", *places])
    with pytest.raises(ZeroDivisionError):
        main()
    assert "as it was" in page.read_text()


def test_rows_are_appended_to_the_gpu_s_own_file(tmp_path: Path) -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    for gpu in names * 2:
        assert append_rows([MEASURED], SURROUNDINGS | {"gpu": gpu}, tmp_path) == tmp_path / f"{file_stem(gpu)}.csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "NVIDIA_H100_80GB_HBM3.csv", "NVIDIA_H100_80GB_HBM3_MIG_1g_10gb.csv", "NVIDIA_H100_PCIe.csv", "NVIDIA_H200.csv",
    ]  # fmt: skip
    assert len(read_results(tmp_path)) == 8 and gpus(read_results(tmp_path)) == sorted(names)
    assert (tmp_path / "NVIDIA_H200.csv").read_bytes().split(b"\r\n")[:2] == [
        ",".join(COLUMNS).encode(),
        b"2026-01-01T00:00:00Z,aaaaaaa,0,NVIDIA H200,,,,,op,torch,eager,8x8,bf16,2,1.9,2.1,,,,,",
    ]


@pytest.mark.parametrize("kept", [-1, -3, -40])
def test_a_torn_last_line_keeps_its_damage_to_itself(kept: int, tmp_path: Path) -> None:
    path = made(tmp_path / "Made_GPU.csv")
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    append_rows([MEASURED], SURROUNDINGS, tmp_path)
    lines = path.read_bytes().split(b"\n")
    assert lines[:2] == whole.split(b"\n")[:2] and lines[2].rstrip() == whole[:kept].split(b"\n")[2].rstrip()
    assert lines[3].startswith(b"2026-01-01T00:00:00Z,aaaaaaa,0,Made GPU,") and lines[4:] == [b""]


@pytest.mark.parametrize("p50", [0.0, float("nan"), float("inf"), -1.0])
def test_a_row_that_could_not_be_read_again_is_not_written(p50: float, tmp_path: Path) -> None:
    path = made(tmp_path / "Made_GPU.csv")
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"p[25]0: expected"):
        append_rows([MEASURED, MEASURED | {"p50": p50}], SURROUNDINGS, tmp_path)
    assert path.read_bytes() == before
    path.write_text("p50,p20\n1,2\n")
    with pytest.raises(ResultsError, match="expected the columns date,commit"):
        append_rows([MEASURED], SURROUNDINGS, tmp_path)

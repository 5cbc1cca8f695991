"""Results to tables and plots: nothing mixed, nothing typed, nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import MADE, row, write, write_results

from benchmarks.report import tables as report
from benchmarks.report.results import RESULTS, ResultsError, newest, read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results")


def test_the_newest_row_of_each_gpu_makes_its_own_table(results: Path) -> None:
    text = report.tables(read_results(results))
    assert "| op | torch, eager | 8x8 bf16 | 1.000 | 0.900–1.100 | 1.000 | bbbbbbb |" in text
    assert "| op | torch, eager | 8x8 bf16 | 2.000" not in text
    assert "bbbbbbb + changes" in text
    made, other = text.split("**Other GPU**")
    assert f"**{MADE}**" in made and "9.000" not in made
    assert "9.000" in other and "1.000 | 0.900" not in other


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold 1.234 ms\n{report.END}\nafter\n")
    assert report.write([], page, tmp_path / "plots") == [page]
    assert page.read_text() == f"before\n{report.BEGIN}\n{report.NOTHING}\n{report.END}\nafter\n"
    assert report.write([], page, tmp_path / "plots") == []


@pytest.mark.parametrize("text", ["no marks", f"{report.END}\n{report.BEGIN}", report.BEGIN])
def test_a_page_without_its_marks_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ResultsError, match="once each"):
        report.write([], tmp_path / "page.md", tmp_path)
    assert (tmp_path / "page.md").read_text() == text


def test_the_projects_page_holds_what_the_results_say() -> None:
    assert f"{report.BEGIN}\n{report.tables(read_results(RESULTS))}\n{report.END}" in report.PAGE.read_text()


def test_newest_is_by_date_and_not_by_place(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [row(date="2026-03-01T00:00:00Z"), row(p50=2.05)])
    assert [m.p50 for m in newest(read_results(tmp_path)).values()] == [2.0]


def test_the_command_reports(results: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", "--results", results, *arguments]
        return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60)

    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    reported = run("report", "--page", page, "--plots", tmp_path / "plots")
    assert reported.returncode == 0, reported.stderr
    assert "1.000" in page.read_text()

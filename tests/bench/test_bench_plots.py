"""Plots of results: GPUs apart, one kind of work in a panel, labels that can be read, ceilings that were measured."""

import itertools
import math
from pathlib import Path

import pytest
from bench_rows import row, write, write_results
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from benchmarks.report import plots as figures
from benchmarks.report.results import Measurement, Subject, measurement, read_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results")


def measured(**changes: object) -> Measurement:
    """A made row with the spread in place."""
    ms = float(changes.get("p50", 2.0))
    cells = row(**{"p20": 0.99 * ms, "p80": 1.01 * ms, **changes})
    return measurement({name: str(value) for name, value in cells.items()})


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[Measurement]) -> dict[str, Figure]:
    """The figures that `plots` makes of rows, by file name."""
    found = []

    def canvas(figure: Figure) -> FigureCanvasAgg:
        found.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr(figures, "FigureCanvasAgg", canvas)
    return dict(zip(figures.plots(rows), found, strict=True))


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of labels that lie over each other."""
    figure.draw_without_rendering()
    found = []
    for axis in figure.axes:
        labels = [text for text in axis.texts if isinstance(text, Annotation)]
        for one, other in itertools.combinations(labels, 2):
            a, b = Text.get_window_extent(one), Text.get_window_extent(other)
            if a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1:
                found.append((one.get_text(), other.get_text()))
    return found


def test_plots_are_drawn_per_gpu_from_what_is_there(results: Path) -> None:
    drawn = figures.plots(read_results(results))
    assert set(drawn) == {
        "Made_GPU_steps.png", "Made_GPU_speedup.png", "Made_GPU_roofline.png", "Other_GPU_roofline.png",
    }  # fmt: skip
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_a_speed_up_is_over_the_best_of_pytorch_and_of_the_same_work() -> None:
    made = [
        row(op="mlp", p50=4.0), row(op="mlp", impl="compiled", mode="graph", p50=3.0), row(op="mlp", impl="quack", p50=0.5),
        row(op="mlp", impl="triton", p50=1.5), row(op="mlp", impl="triton", shape="9x9", p50=1.0),
        row(op="mlp", p50=4.5, dtype="fp8"), row(op="mlp", impl="triton", p50=1.5, dtype="fp8"),
        *(
            row(op="step x", mode=f"{phase} recurrence", impl=impl, p50=ms)
            for phase, times in (("before", (3.0, 2.5, 2.0)), ("after", (9.0, 8.0, 6.0)))
            for impl, ms in zip(("published", "torch", "golf"), times, strict=True)
        ),
        row(op="evaluation", impl="published", p50=8.0), row(op="evaluation", impl="golf", p50=2.0),
    ]  # fmt: skip
    latest = {}
    for one in made:
        numbers = [float(one[name]) for name in ("p50", "p20", "p80", "tflops", "gbps", "floor")]
        subject = Subject(*(str(one[name]) for name in Subject._fields))
        latest[subject] = Measurement(subject, str(one["date"]), str(one["commit"]), False, *numbers)
    assert figures.speedups(latest) == {
        "step x, before recurrence, 8x8 bf16": 1.5, "step x, after recurrence, 8x8 bf16": 1.5,
        "mlp, triton, 8x8 bf16": 2.0, "mlp, triton, 8x8 fp8": 3.0, "evaluation, golf, 8x8 bf16": 4.0,
    }  # fmt: skip


def test_evaluation_is_drawn_in_tokens_per_second(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = row(
        op="evaluation", shape="recipe 4000 targets window 8 stride 2", impl="golf", p50=20.0, p20=19.0, p80=21.0
    )
    write(results / "b.csv", [row(gpu="Other GPU", p50=9.0, p20=8.0, p80=9.5), made | {"gpu": "Other GPU"}])
    drawn = []
    monkeypatch.setattr(
        figures, "_over_commits", lambda _, panels, value: drawn.extend(map(value, itertools.chain(*panels.values())))
    )
    assert "Other_GPU_evaluation.png" in figures.plots(read_results(results))
    # 4,000 tokens in 20 ms; before it the steps of the other GPU, in ms
    assert drawn == [2.0, 1.25, 200.0]


def test_labels_of_lines_that_end_close_together_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"published": 108.0, "torch": 81.0, "golf": 79.2, "newton_schulz=triton": 79.1, "xsa=triton": 79.0}
    rows = [measured(op="step x", impl=impl, p50=ms, gbps="") for impl, ms in ends.items()]
    figure = drawn(monkeypatch, rows)["Made_GPU_steps.png"]
    assert overlaps(figure) == []
    labels = {text.get_text(): text for text in figure.axes[0].texts}
    boxes = [Text.get_window_extent(labels[f"{impl} {ms:.1f}"]) for impl, ms in ends.items()]
    places = [box.y0 + box.y1 for box in boxes]
    # in the order of the lines; one that stands alone stays where its line ends
    assert places == sorted(places, reverse=True)
    assert labels["published 108.0"].get_position() == (6, 0)


def test_labels_of_a_roofline_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        measured(op=f"op{number}", p50=2.0 + 0.001 * number, tflops=300.0, gbps=400.0 + number) for number in range(4)
    ]
    assert overlaps(drawn(monkeypatch, rows)["Made_GPU_roofline.png"]) == []


def test_each_title_names_its_gpu_and_no_plot_holds_another_s(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    rows = []
    for number, gpu in enumerate(gpus, 1):
        rows += [
            measured(gpu=gpu, op="step x", impl=impl, p50=100.0 * number, gbps="") for impl in ("published", "golf")
        ]
        rows += [measured(gpu=gpu, impl=impl) for impl in ("torch", "triton")]
        rows += [
            measured(gpu=gpu, op="evaluation", shape="x 4000 targets", impl=impl) for impl in ("published", "golf")
        ]
    made = drawn(monkeypatch, rows)
    assert len(made) == 4 * len(gpus)
    for number, gpu in enumerate(gpus, 1):
        own = [name for name in made if made[name].get_suptitle().split("\n")[1] == gpu]
        assert sorted(own) == [
            f"{figures.file_stem(gpu)}_{kind}.png" for kind in ("evaluation", "roofline", "speedup", "steps")
        ]
        steps = made[f"{figures.file_stem(gpu)}_steps.png"].axes[0]
        assert [text.get_text() for text in steps.texts] == [f"published {number}00.0", f"golf {number}00.0"]


def test_other_work_has_a_panel_of_its_own_and_changes_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        measured(op="step x", p50=9.0),
        measured(op="step x", shape="4x4", p50=5.0),
        measured(op="step x", p50=8.0, dirty=1),
    ]
    first, second = drawn(monkeypatch, rows)["Made_GPU_steps.png"].axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["x, eager, 8x8 bf16", "x, eager, 4x4 bf16"]
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["aaaaaaa", "aaaaaaa\n+ changes"]
    assert [text.get_text() for text in first.texts] == ["torch 8.0"] and [
        text.get_text() for text in second.texts
    ] == ["torch 5.0"]


def at_its_floor(tflop: float, gb: float) -> Measurement:
    """A row at half of its floor on a device of 800 TFLOP/s and 4,000 GB/s."""
    floor = max(1e3 * tflop / 800, 1e3 * gb / 4000)
    return measured(
        op=f"{tflop} {gb}", p50=2 * floor, tflops=1e3 * tflop / (2 * floor), gbps=1e3 * gb / (2 * floor), floor=floor
    )


def test_a_ceiling_is_drawn_where_a_floor_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # much arithmetic, less; much traffic, less
    product, small, copy, norm = at_its_floor(8, 1), at_its_floor(4, 1), at_its_floor(0.001, 1), at_its_floor(0.01, 2)
    for rows, expected in (
        ([product, copy], (800.0, 4000.0)),
        ([product, small, norm], (800.0, 4000.0)),
        ([product, small], (800.0, math.inf)),
        ([copy, norm], (math.inf, 4000.0)),
        ([copy], (math.inf, math.inf)),
    ):
        assert figures.ceilings_of(rows) == pytest.approx(expected)
        title = drawn(monkeypatch, rows)["Made_GPU_roofline.png"].get_suptitle()
        assert ("800 TFLOP/s" in title, "4,000 GB/s" in title) == (expected[0] == 800, expected[1] == 4000)

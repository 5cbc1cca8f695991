"""The pictures: readable PNGs whose curves are the measured points and nothing else."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from submission_example import make_run, make_summary

from train.common.errors import UserError
from train.run.logger import read_metrics
from train.submission import plots
from train.submission.plots import plot_bpb, plot_loss, plot_size_budget


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, so that a test can ask what is on them."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Any) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    return read_metrics(make_run(tmp_path) / "metrics.jsonl")


def curves(figure: Figure) -> list[dict[str, list[tuple[float, float]]]]:
    """Label → points, for each panel."""
    return [
        {str(line.get_label()): [tuple(point) for point in line.get_xydata().tolist()] for line in axis.get_lines()}
        for axis in figure.axes
    ]


def check_picture(path: Path) -> None:
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] >= 1200 and pixels.shape[0] >= 500
    ink = float(np.mean(np.any(pixels < 0.95, axis=-1)))
    assert 0.005 < ink < 0.6


def test_loss_shows_each_measured_point_over_steps_and_over_seconds(
    tmp_path: Path, records: list[dict[str, Any]], drawn: list[Figure]
) -> None:
    plot_loss(tmp_path / "loss.png", records, make_summary())
    check_picture(tmp_path / "loss.png")
    train = [record for record in records if record["kind"] == "train"]
    over_steps, over_seconds = curves(drawn[0])
    assert over_steps["training (batch)"] == [(record["step"], record["train_loss"]) for record in train]
    assert over_seconds["training (batch)"] == [(record["seconds"], record["train_loss"]) for record in train]
    assert over_steps["validation"] == [(0, 9.0), (100, 2.95)]
    assert over_seconds["validation"] == [(0.0, 9.0), (12.0, 2.95)]
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["step", "training time (seconds)"]
    assert drawn[0].axes[0].get_ylabel() == "loss (nats per token)"


def test_bpb_shows_validations_the_artifact_and_the_yardsticks_that_were_measured(
    tmp_path: Path, records: list[dict[str, Any]], drawn: list[Figure]
) -> None:
    plot_bpb(tmp_path / "bpb.png", records, make_summary(), "sliding")
    check_picture(tmp_path / "bpb.png")
    over_steps, over_seconds = curves(drawn[0])
    assert over_steps.pop("during training, non-overlapping windows") == [(0, 3.4876), (100, 1.142)]
    assert over_seconds.pop("during training, non-overlapping windows") == [(0, 3.4876), (12.0, 1.142)]
    levels = {label: {y for _, y in points} for label, points in over_steps.items()}
    assert levels == {
        "artifact, sliding: 1.1041": {1.1040946}, "artifact, non-overlapping windows: 1.1041": {1.10412345},
        "gzip -9 primed with the training text: 1.9612": {1.96123456}, "xz -9 primed with the training text: 1.4012": {1.40123456},
    }  # fmt: skip
    assert over_seconds.keys() == over_steps.keys()
    # a flat score is drawn once
    for number, flat in enumerate((None, 1.1040946), start=1):
        bare = make_summary(yardsticks={}, flat_val_bpb=flat)
        plot_bpb(tmp_path / "bare.png", records, bare, "windows of 64")
        assert list(curves(drawn[number])[0]) == [
            "during training, non-overlapping windows",
            "artifact, windows of 64: 1.1041",
        ]


def test_bpb_panels_hold_curve_and_levels(tmp_path: Path, records: list[dict[str, Any]], drawn: list[Figure]) -> None:
    plot_bpb(tmp_path / "bpb.png", records, make_summary(yardsticks={"gzip -9": 5.0, "xz -9": 0.5}), "sliding")
    low, high = drawn[0].axes[0].get_ylim()
    assert 0 < low < 0.5 and 5.0 < high < 6.0


def test_one_validation_is_enough_and_none_is_an_error(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    plot_bpb(tmp_path / "bpb.png", records[:1], make_summary(), "sliding")
    plot_loss(tmp_path / "loss.png", records[:1], make_summary())
    check_picture(tmp_path / "bpb.png")
    for draw in (plot_loss, functools.partial(plot_bpb, evaluation="sliding")):
        with pytest.raises(UserError, match="nothing to draw"):
            draw(tmp_path / "none.png", [], make_summary())
    assert not (tmp_path / "none.png").exists()


def bars(figure: Figure, axis: int) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_width()) for bar in figure.axes[axis].patches]


def test_size_budget_stacks_code_groups_and_what_remains_to_the_cap(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_size_budget(tmp_path / "size_budget.png", make_summary())
    check_picture(tmp_path / "size_budget.png")
    parts = [(0, 4_000_000), (4_000_000, 4_898_181), (8_898_181, 7_000_000), (15_898_181, 83_119)]
    assert bars(drawn[0], 1) == parts
    assert bars(drawn[0], 0) == [*parts, (15_981_300, 18_700)]
    assert "15,981,300 of 16,000,000 bytes, 18,700 left" in drawn[0].get_suptitle()
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["embeddings 4,000,000 B", "attention 4,898,181 B", "mlp 7,000,000 B", "code 83,119 B"]


def test_size_budget_beyond_the_cap_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    # the published total that must fail the cap
    summary = make_summary(bytes_model=16_442_162, bytes_code=83_592, bytes_total=16_525_754, model_groups={})
    plot_size_budget(tmp_path / "size_budget.png", summary)
    assert bars(drawn[0], 0) == [(0, 16_442_162), (16_442_162, 83_592)]
    assert "525,754 TOO MANY" in drawn[0].get_suptitle()

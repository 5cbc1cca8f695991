"""Runs and record folders on one page: what is shown of each, what is marked, and that nothing is cut off or written."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_example import make_runs_folder
from foreign_records import CODE, MODEL, SEEDS, make_foreign
from playwright.sync_api import Page, sync_playwright
from record_example import edit_json

from train.common.errors import UserError
from train.submission.__main__ import main
from train.submission.dashboard import collect, default_out, find_shown

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")
LONG = "2026-04-20_SP8192_CaseOps_SparseGate_QuantGate_Loop45_PhasedTTT_PolarNS_MinLR_FusedCE"
FEWER = {"rule": "once", "tokens": 10_000_000, "validation_tokens": 47_851_520, "window": 2048}
OTHER = {"rule": "once", "tokens": 12_288, "validation_tokens": 12_288, "window": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs and nine records. The two records with the best scores were scored on fewer tokens and on another text."""
    made = tmp_path_factory.mktemp("both")
    make_runs_folder(made / "runs")
    records = made / "other/records/track_10min_16mb"
    make_foreign(records / LONG)
    for name, facts in (("fewer", FEWER), ("strange", OTHER)):
        results = {seed: {"val_bpb": 0.9} for seed in SEEDS}
        make_foreign(records / name, evaluation=facts, val_bpb=0.9, seed_results=results)
        for log in (records / name).glob("*.log"):
            log.unlink()
    for index in range(5):
        make_foreign(records / f"copy_{index}")
        edit_json(records / f"copy_{index}", val_bpb=1.06123 + index)
    unread = make_foreign(records / "unread")
    for log in unread.glob("*.log"):
        log.write_text("epoch one done\n")
    (unread / "submission.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    before = {path: path.stat().st_mtime_ns for path in (folder / "other").rglob("*")}
    out = folder / "page.html"
    assert main(["dashboard", str(folder / "runs"), str(folder / "other"), "--out", str(out)]) == 0
    # record folders are only read
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "other").rglob("*")}
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', out.read_text(), re.S)
    assert found
    data = json.loads(found[1])
    assert "a log in an unknown form: train_seed314.log" in " ".join(data["notes"])
    return data["runs"]


def test_a_record_has_a_row_per_seed_with_its_scores_sizes_and_curves(rows: list[dict[str, Any]]) -> None:
    seeds = {str(row["seed"]): row for row in rows if row["id"] == LONG}
    assert set(seeds) == set(SEEDS) and len({row["group"] for row in seeds.values()}) == 1
    for seed, (before, after, ttt) in SEEDS.items():
        row = seeds[seed]
        assert (row["before_bpb"], row["after_bpb"], row["ttt_bpb"], row["val_bpb"]) == (before, after, ttt, ttt)
        assert (row["bytes_model"], row["bytes_code"], row["bytes_total"]) == (MODEL, CODE, MODEL + CODE)
        assert (row["kind"], row["rank"], row["badge"], row["steps"], row["eval_s"]) == ("record", 0, "", 5000, 455.5)
        # steps of 500 take a minute, and the clock is rounded to a tenth
        assert [point[:2] for point in row["series"]["loss"]] == [
            [step, pytest.approx(step * 0.12)] for step in range(500, 5000, 500)
        ]
        assert [round(point[2]) for point in row["series"]["speed"]] == [120] * 8
        # a validation has no time of its own
        assert row["series"]["bpb"] == [[0, 0.0, 4.115], [5000, pytest.approx(599.7, abs=0.4), 1.0652]]


def test_another_text_and_fewer_tokens_are_marked_and_ranked_below(rows: list[dict[str, Any]]) -> None:
    ranks = {row["id"]: (row["rank"], row["badge"]) for row in rows}
    assert ranks["fewer"] == (2, "fewer tokens: 10,000,000") and ranks["strange"] == (1, "another text: 12,288 tokens")
    # the example's runs score the challenge's text
    assert ranks["base_42"] == (0, "") and {row["kind"] for row in rows} == {"run", "record"}


def test_rows_of_a_sweep_show_everything_that_differs(folder: Path) -> None:
    changes = {
        "muon_wd": 0.5,
        "matrix_lr": 0.5,
        "embed_lr": 0.5,
        "head_lr": 0.5,
        "scalar_lr": 0.5,
        "warmdown_frac": 0.5,
    }
    run = shutil.copytree(folder / "runs/base_42", folder / "sweep/one")
    shutil.copytree(folder / "runs/base_42", folder / "sweep/two")
    config = json.loads((run / "config.json").read_text())
    config.pop("crc32", None)
    known = {name: value for name, value in changes.items() if name in config}
    (run / "config.json").write_text(json.dumps({**config, **known}))
    names = {row["id"]: row["group_name"] for row in collect(find_shown([folder / "sweep"]))[0]}
    assert len(known) > 3 and all(f"{name}={value}" in names["one"] for name, value in known.items())
    assert not any(name in names["two"] for name in known if config[name] == 0.02)


def test_the_page_is_never_written_into_a_record_folder(folder: Path, tmp_path: Path) -> None:
    assert default_out([folder / "other", folder / "runs"]) == folder / "runs/dashboard.html"
    assert (
        default_out([folder / "other"])
        == default_out([folder / "other/records/track_10min_16mb" / LONG])
        == Path("dashboard.html")
    )
    with pytest.raises(UserError, match="no run and no record in it"):
        find_shown([tmp_path])


@pytest.fixture(scope="module", params=[1280, 390])
def opened(folder: Path, rows: list[dict[str, Any]], request: pytest.FixtureRequest) -> Iterator[Page]:
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page(viewport={"width": request.param, "height": 900}, color_scheme="light")
        found.on("pageerror", lambda error: errors.append(str(error)))
        found.goto((folder / "page.html").as_uri())
        found.wait_for_selector("#chart-size .barlayer path")
        yield found
        assert errors == []
        browser.close()


@needs_chromium
def test_nothing_is_cut_off(opened: Page) -> None:
    width = opened.viewport_size["width"]
    cut = opened.evaluate(
        """(width) => [...document.querySelectorAll('main *')].filter((node) => {
            const box = node.getBoundingClientRect();
            const shown = box.width > 0 && box.height > 0 && !node.closest('.modebar, .hoverlayer, clipPath, .plot');
            return shown && (box.left < -0.5 || box.right > width + 0.5);
        }).map((node) => `${node.nodeName} ${node.className.baseVal ?? node.className} ${node.textContent.slice(0, 30)}`)""",
        width,
    )
    assert cut == [] and opened.evaluate("document.documentElement.scrollWidth") == width
    # no text is wider than its box, and none lies above the picture's edge
    assert opened.evaluate(
        "[...document.querySelectorAll('td, th, label, .card')].every((box) => box.scrollWidth <= box.clientWidth + 1)"
    )
    heads = opened.evaluate(
        "[...document.querySelectorAll('#runs thead th')].filter((head) => head.getBoundingClientRect().width > 0).length"
    )
    assert heads == (14 if width == 1280 else 0)


@needs_chromium
def test_the_legend_tells_each_drawn_curve_apart(opened: Page) -> None:
    entries = opened.evaluate(
        """[...document.querySelectorAll('#legend label')].map((label) => [label.querySelector('input').checked, label.textContent,
            [...label.querySelectorAll('span line')].map((line) => [line.getAttribute('stroke'), line.getAttribute('stroke-dasharray')].join())])"""
    )
    # eight records with a score, four settings; at most seven are drawn
    assert len(entries) == 12 and sum(checked for checked, *_ in entries) == 7
    swatches = [swatch for checked, _, found in entries if checked for swatch in found]
    assert len(swatches) == len(set(swatches)) >= 15
    curves = opened.evaluate(
        """[...document.querySelectorAll('#chart-loss .scatterlayer .trace .js-line')].map((line) => {
            const style = getComputedStyle(line);
            return style.stroke + style.strokeDasharray;
        })"""
    )
    assert len(curves) == len(set(curves)) >= 15
    # ranked below all others
    assert re.search("strange", entries[-2][1]) or re.search("strange", entries[-3][1])
    order = opened.evaluate(
        "[...document.querySelectorAll('#runs tbody tr td:first-child')].map((cell) => cell.innerText.split('\\\\n')[0])"
    )
    scored = [name for name in order if "still_going" not in name]
    assert all("another text" in name for name in scored[-6:-3]) and all("fewer tokens" in name for name in scored[-3:])


@needs_chromium
def test_a_group_that_is_ticked_is_drawn(opened: Page) -> None:
    def ticked() -> list[str]:
        return opened.evaluate(
            "[...document.querySelectorAll('#legend label:has(:checked)')].map((label) => label.textContent.split(':')[0])"
        )

    before = ticked()
    opened.locator("#legend input:not(:checked)").first.click()
    after = ticked()
    assert len(before) == len(after) == 7 and set(after) - set(before) and set(before) - set(after) == {"A"}

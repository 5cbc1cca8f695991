"""The page over all runs: its data without a browser, and what Chromium draws from it, read from the screen."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_example import STEP_MS, STEPS, loss_at, make_runs_folder
from playwright.sync_api import Page, Route, sync_playwright

from train.common.errors import UserError
from train.common.files import write_json
from train.submission.__main__ import main
from train.submission.dashboard import collect, find_shown, page
from train.submission.dashboard_rows import MAX_POINTS, speed, thinned
from train.submission.summary import Summary

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs_folder(tmp_path_factory.mktemp("page") / "runs")


@pytest.fixture(scope="module")
def html(runs: Path) -> Path:
    out = runs.parent / "page.html"
    assert main(["dashboard", str(runs), "--out", str(out)]) == 0
    return out


def embedded(html: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html.read_text(), re.S)
    assert found
    return json.loads(found[1])


def test_the_data_in_the_page_is_that_of_the_runs(html: Path) -> None:
    data = embedded(html)
    by_name = {run["id"]: run for run in data["runs"]}
    assert list(by_name) == [
        "base_314",
        "base_42",
        "base_999",
        "large",
        "still_going",
        "wide_314",
        "wide_42",
        "wide_999",
    ]
    run = by_name["base_314"]
    assert run["series"]["bpb"] == [
        [step, pytest.approx(STEP_MS * step * 1.01 / 1000), pytest.approx(loss_at(step, 0.01) / 2.58)]
        for step in range(0, STEPS + 1, 100)
    ]
    assert [point[0] for point in run["series"]["loss"]] == list(range(10, STEPS + 1, 10))
    assert {round(point[2], 6) for point in run["series"]["speed"]} == {round(STEP_MS * 1.01, 6)}
    assert run["val_bpb"] == pytest.approx(loss_at(STEPS, 0.01) / 2.58) and run["seed"] == 314
    assert sum(by_name["large"]["parts"].values()) == by_name["large"]["bytes_total"] == 16_281_300
    unfinished = by_name["still_going"]
    assert (unfinished["status"], unfinished["val_bpb"], unfinished["parts"]) == ("not finished", None, {})
    groups = {name: run["group_name"] for name, run in by_name.items()}
    assert groups["wide_42"] == groups["wide_314"] == "sp8192_sdclip, mlp_mult=3.0, muon_wd=0.0"
    # four times the width is the recipe's
    assert groups["large"] == "sp8192_sdclip, muon_wd=0.0" and len(set(groups.values())) == 4
    assert by_name["wide_42"]["varied"] == {"mlp_mult": 3.0, "muon_wd": 0.0}
    assert by_name["still_going"]["varied"] == {"mlp_mult": 2.0, "muon_wd": 0.5}


def test_the_page_asks_for_nothing_and_holds_its_library(html: Path) -> None:
    text = html.read_text()
    assert text.count("<script") == 3 and "src=" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "plotly.js v" in text and "/*DATA*/" not in text and "/*PLOTLY*/" not in text


def test_names_cannot_break_out_of_the_data(runs: Path) -> None:
    found, _ = collect(find_shown([runs / "base_42"]))
    found[0]["id"] = "</script><b><!--<script"
    assert not {"</script><b>", "<!--<script"} & set(re.findall(r"</script><b>|<!--<script", page(found, "x")))


def test_speed_is_the_slope_of_the_clock_and_curves_are_thinned_to_their_end() -> None:
    assert speed([(10, 1.0, 9.0), (20, 1.5, 8.0), (21, 1.75, 7.0)]) == [(20, 1.5, 50.0), (21, 1.75, 250.0)]
    points = [(step, 0.1 * step, 1.0) for step in range(4 * MAX_POINTS + 2)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 1 and kept[0] == points[0] and kept[-1] == points[-1]
    assert thinned(points[:7]) == points[:7] and thinned([]) == []


def test_runs_of_a_sweep_are_found_in_its_folder_and_above_it(runs: Path, tmp_path: Path) -> None:
    for name in ("base_42", "wide_42"):
        shutil.copytree(runs / name, tmp_path / "runs/sweep" / name)
    shutil.copytree(runs / "large", tmp_path / "runs/large")
    assert [path.name for path in find_shown([tmp_path / "runs"])] == ["large", "base_42", "wide_42"]
    assert [path.name for path in find_shown([tmp_path / "runs/sweep"])] == ["base_42", "wide_42"]


def test_a_run_that_diverged_leaves_the_others_their_page(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("base_42", "base_314"):
        shutil.copytree(runs / name, tmp_path / name)
    summary = tmp_path / "base_42/summary.json"
    # as versions before 0.2 wrote it; now no summary has such a score
    write_json(summary, Summary.read(summary).to_dict() | {"val_bpb": math.nan, "val_loss": math.inf})
    assert main(["dashboard", str(tmp_path)]) == 0
    scores = {run["id"]: (run["val_bpb"], run["steps"]) for run in embedded(tmp_path / "dashboard.html")["runs"]}
    assert scores == {"base_314": (pytest.approx(loss_at(STEPS, 0.01) / 2.58), STEPS)}
    said = capsys.readouterr()
    assert "base_42" in said.out + said.err and "expected a number, got inf" in said.out + said.err


def test_what_cannot_be_shown_is_said(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"none: no such folder"):
        find_shown([tmp_path / "none"])
    with pytest.raises(UserError, match="no run and no record in it"):
        find_shown([tmp_path])
    for name in ("base_42", "large"):
        shutil.copytree(runs / name, tmp_path / "some" / name)
    (tmp_path / "some/large/summary.json").write_text("{")
    shutil.copytree(runs / "wide_42", tmp_path / "some/bad")
    (tmp_path / "some/bad/metrics.jsonl").write_text('{"kind": "train", "train_loss": 1.0}\n')
    with pytest.raises(UserError, match=r"--out: the folder .* does not exist"):
        main(["dashboard", str(tmp_path / "some"), "--out", str(tmp_path / "no/page.html")])
    assert main(["dashboard", str(tmp_path / "some")]) == 0
    output = capsys.readouterr().out
    assert "1 run: base_42" in output and re.search(r"not shown: \S+large/summary\.json: not readable as JSON", output)
    assert any("Not shown: " in note for note in embedded(tmp_path / "some/dashboard.html")["notes"])
    assert "bad: damaged (KeyError: 'step')" in output
    (tmp_path / "some/base_42/config.json").write_text("{")
    with pytest.raises(UserError, match=r"base_42/config\.json"):
        main(["dashboard", str(tmp_path / "some")])


@pytest.fixture(scope="module")
def browser_page(html: Path) -> Iterator[Page]:
    requests: list[str] = []
    errors: list[str] = []

    def allow(route: Route) -> None:
        requests.append(route.request.url)
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1400, "height": 1000}, color_scheme="light")
        opened.route("**/*", allow)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        opened.goto(html.as_uri())
        opened.wait_for_selector("#chart-size .barlayer path")
        yield opened
        assert errors == [] and requests == [html.as_uri()]
        browser.close()


def rows(opened: Page) -> list[list[str]]:
    return opened.evaluate(
        """[...document.querySelectorAll('#runs tbody tr')].map(row => [...row.cells].map(cell =>
            [...cell.childNodes].filter(node => node.nodeName !== 'SMALL').map(node => node.textContent).join('')))"""
    )


def ticks(opened: Page, chart: str, axis: str) -> tuple[float, float]:
    """Scale and offset from a value to pixels, read from the labels that stand at an axis."""
    found = opened.evaluate(
        f"""[...document.querySelectorAll('#{chart} .{axis}tick text')].map(label => {{
            const box = label.getBoundingClientRect();
            return [label.textContent, box.x + box.width / 2, box.y + box.height / 2];
        }})"""
    )
    place = 1 if axis == "x" else 2
    number = lambda text: float(text.replace("−", "-").replace("M", "e6").replace("k", "e3"))  # noqa: E731
    (first, last) = found[0], found[-1]
    scale = (last[place] - first[place]) / (number(last[0]) - number(first[0]))
    return scale, first[place] - scale * number(first[0])


@needs_chromium
def test_the_table_shows_the_numbers_sorted_by_score(browser_page: Page) -> None:
    table = rows(browser_page)
    assert [row[0] for row in table] == [
        "large NOT COMPLIANT", "wide_42", "wide_314", "wide_999", "base_42", "base_314", "base_999", "still_going (not finished)",
    ]  # fmt: skip
    assert table[1][1] == f"{loss_at(STEPS, -0.06) / 2.58:.5f}" and table[0][6] == "16,281,300" and table[-1][1] == "–"
    groups = browser_page.evaluate("[...document.querySelectorAll('#groups tbody tr')].map(row => row.innerText)")
    scores = [loss_at(STEPS, -0.06 + 0.005 * index) / 2.58 for index in range(3)]
    mean = sum(scores) / 3
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    line = next(text for text in groups if "mlp_mult=3.0" in text)
    assert f"{mean:.6f}" in line and f"{deviation:.6f}" in line and f"314: {scores[1]:.6f}" in line


@needs_chromium
@pytest.mark.parametrize(
    ("seeds", "counted", "deviates"),
    [([42, 314, 999], "3", True), ([42, 42, 42], "3 runs, 1 seed", False), ([42, 42, 999], "3 runs, 2 seeds", False)],
)
def test_runs_of_one_seed_are_no_seeds(browser_page: Page, seeds: list[int], counted: str, deviates: bool) -> None:
    cells = browser_page.evaluate(
        """(seeds) => {
            const wide = data.runs.filter((run) => run.id.startsWith("wide_"));
            fillGroups(wide.map((run, index) => ({ ...run, seed: seeds[index] })));
            const cells = [...document.querySelector("#groups tbody tr").cells].map((cell) => cell.textContent);
            render();
            return cells;
        }""",
        seeds,
    )
    assert cells[1] == counted and (cells[3] != "–") == deviates and cells[2] != "–"


@needs_chromium
def test_points_are_drawn_where_the_axes_say(browser_page: Page) -> None:
    for number, offset in ((0, -0.1), (4, 0.0)):
        scale_x, origin_x = ticks(browser_page, "chart-bpb", "x")
        scale_y, origin_y = ticks(browser_page, "chart-bpb", "y")
        points = browser_page.evaluate(
            f"""[...document.querySelectorAll('#chart-bpb .scatterlayer .trace')[{number}].querySelectorAll('.points path')]
            .map(mark => {{ const box = mark.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})"""
        )
        expected = [(step, loss_at(step, offset) / 2.58) for step in range(0, STEPS + 1, 100)]
        # the first validation lies above the picture
        for (x, y), (step, value) in zip(points[-4:], expected[-4:], strict=True):
            assert x == pytest.approx(origin_x + scale_x * step, abs=1.5)
            assert y == pytest.approx(origin_y + scale_y * value, abs=1.5)


@needs_chromium
def test_bars_are_as_long_as_bytes_and_the_limit_stands_at_16_million(browser_page: Page) -> None:
    scale, origin = ticks(browser_page, "chart-size", "x")
    bars = browser_page.evaluate(
        """[...document.querySelectorAll('#chart-size .barlayer .trace')].map(trace => [...trace.querySelectorAll('.point path')]
        .map(bar => { const box = bar.getBoundingClientRect(); return [box.left, box.right]; }))"""
    )
    assert [len(trace) for trace in bars] == [7] * 4
    # runs are drawn from below: the last bar of each part is the first run of the table, the one that is too large
    assert bars[-1][-1][1] == pytest.approx(origin + scale * 16_281_300, abs=1.5)
    assert bars[-1][0][1] == pytest.approx(origin + scale * 15_981_300, abs=1.5)
    assert bars[0][0][1] - bars[0][0][0] == pytest.approx(scale * 4_000_000, abs=1.5)
    limit = browser_page.evaluate(
        "(() => { const box = document.querySelector('#chart-size .shapelayer path').getBoundingClientRect(); return box.x + box.width / 2; })()"
    )
    assert limit == pytest.approx(origin + scale * 16_000_000, abs=1.5)
    assert "over" in browser_page.evaluate("document.querySelector('#runs tbody tr').cells[6].className")


@needs_chromium
def test_curves_have_a_color_for_each_setting_and_a_dash_for_each_seed(browser_page: Page) -> None:
    drawn = browser_page.evaluate(
        """[...document.querySelectorAll('#chart-loss .scatterlayer .trace .js-line')].map(line => {
            const style = getComputedStyle(line);
            return [style.stroke, style.strokeDasharray, line.getBoundingClientRect().width, line.getAttribute('d').length];
        })"""
    )
    assert len(drawn) == 8 and all(width > 100 and length > 100 for _, _, width, length in drawn)
    wide, base = drawn[1:4], drawn[4:7]
    assert len({color for color, *_ in wide}) == len({color for color, *_ in base}) == 1 and wide[0][0] != base[0][0]
    assert len({dash for _, dash, *_ in wide}) == 3
    # half a run is half a line
    assert drawn[7][2] == pytest.approx(drawn[6][2] * (STEPS / 2 - 10) / (STEPS - 10), abs=3)


@needs_chromium
def test_filter_sort_and_axis_change_what_is_drawn(browser_page: Page) -> None:
    browser_page.fill("#filter", "WIDE seed")
    assert [row[0] for row in rows(browser_page)] == ["wide_42", "wide_314", "wide_999"]
    assert browser_page.locator("#chart-bpb .scatterlayer .trace").count() == 3
    assert browser_page.inner_text("#summary").startswith("3 of 8 runs")
    browser_page.click("#runs th button:has-text('seed')")
    browser_page.click("#runs th button:has-text('seed')")
    assert [row[5] for row in rows(browser_page)] == ["999", "314", "42"]
    assert browser_page.get_attribute("#runs th[data-key=seed]", "aria-sort") == "descending"
    browser_page.fill("#filter", "")
    browser_page.select_option("#order", "id")
    assert [row[0] for row in rows(browser_page)][:2] == ["base_42", "base_314"]
    browser_page.select_option("#axis", "1")
    assert browser_page.text_content("#chart-loss .xtitle") == "training time (s)"
    scale, origin = ticks(browser_page, "chart-bpb", "x")
    last = browser_page.evaluate(
        "(() => { const marks = document.querySelectorAll('#chart-bpb .scatterlayer .trace')[1].querySelectorAll('.points path');"
        " const box = marks[marks.length - 1].getBoundingClientRect(); return box.x + box.width / 2; })()"
    )
    assert last == pytest.approx(origin + scale * STEP_MS * STEPS * 1.01 / 1000, abs=1.5)
    browser_page.select_option("#axis", "0")
    browser_page.select_option("#order", "val_bpb")


@needs_chromium
def test_grouping_by_one_setting_joins_the_others(browser_page: Page) -> None:
    def groups() -> list[list[str]]:
        return browser_page.evaluate(
            "[...document.querySelectorAll('#groups tbody tr')].map(row => [...row.cells].slice(0, 2).map(cell => cell.textContent))"
        )

    assert len(groups()) == 3
    browser_page.select_option("#by", "muon_wd")
    assert groups() == [["A: muon_wd=0", "7 runs, 4 seeds"]]
    browser_page.select_option("#by", "")


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_curves_stand_out_in_both_themes(browser_page: Page, theme: str) -> None:
    if browser_page.get_attribute("html", "data-theme") != theme:
        browser_page.click("#theme")
    colors = browser_page.evaluate(
        """(() => { const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
        return { card: of('.card', 'backgroundColor'), ink: of('td', 'color'), soft: of('th', 'color'),
                 paper: of('#chart-loss .main-svg', 'backgroundColor'), tick: of('#chart-loss .xtick text', 'fill'),
                 lines: [...document.querySelectorAll('#chart-loss .js-line')].map(line => getComputedStyle(line).stroke) }; })()"""
    )
    assert (luminance(colors["card"]) > 0.5) == (theme == "light") and colors["paper"] == colors["card"]
    assert contrast(colors["ink"], colors["card"]) > 7 and contrast(colors["tick"], colors["card"]) > 7
    # WCAG: 4.5 for text, and lines apart from the ground
    assert contrast(colors["soft"], colors["card"]) > 4.5
    assert all(contrast(line, colors["card"]) > 2.3 for line in colors["lines"])


@needs_chromium
def test_a_phone_shows_everything_without_sideways_scrolling(browser_page: Page) -> None:
    browser_page.set_viewport_size({"width": 390, "height": 844})
    browser_page.wait_for_function(
        "document.querySelector('#chart-loss .main-svg').getBoundingClientRect().width < 390"
    )
    assert browser_page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = browser_page.evaluate(
        "[...document.querySelectorAll('.card')].map(card => { const box = card.getBoundingClientRect(); return [box.left, box.right]; })"
    )
    assert len(boxes) == 8 and all(0 <= left < right <= 390 for left, right in boxes)
    # name and score are seen first
    score = browser_page.evaluate("document.querySelector('#runs tbody tr').cells[1].getBoundingClientRect().right")
    assert score < 390
    sizes = browser_page.evaluate(
        "[...document.querySelectorAll('.tools > *')].map(tool => tool.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 36
    browser_page.set_viewport_size({"width": 1400, "height": 1000})

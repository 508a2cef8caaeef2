"""The page in a real browser: no complaint, the JSON's figures, light and dark, phone width, keyboard, filter, print.

Skipped where no Chromium is installed: `playwright install chromium`, or the system's package of that name.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.reporting.compare import compare
from slmdeploy.reporting.report import report, write_comparison
from slmdeploy.reporting.wording import figure
from tests.reporting.browsing import chromium, opened
from tests.reporting.fixtures import held_rows, make_run

pytestmark = pytest.mark.slow
pytest.importorskip("playwright.sync_api")

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
HOSTILE = "<img src=x onerror=alert(1)>"
CLOSING = "</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests of this file."""
    with chromium() as found:
        if found is None:
            pytest.skip("no Chromium is installed: playwright install chromium, or apt-get install chromium")
        yield found


@pytest.fixture(scope="module")
def file(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the synthetic run."""
    return report(run_folder, out=tmp_path_factory.mktemp("pages") / "report.html")


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page at desktop width in light; at its end nothing may have been complained about or fetched."""
    with opened(browser, file, viewport=WIDE, color_scheme="light") as (found, wrong):
        yield found
        assert wrong == []


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_figures_on_the_page_are_those_of_the_measurement(page: Any, run_folder: Path) -> None:
    rows = held_rows(run_folder)
    read = "all => all.map(e => ({...e.dataset, value: Number(e.value), text: e.textContent}))"
    cells = page.eval_on_selector_all("data", read)
    seen = set()
    for cell in cells:
        row = rows[int(cell["build"])]
        held = row["workloads"][cell["workload"]]["metrics"] if "workload" in cell else row["metrics"]
        assert cell["value"] == held[cell["metric"]]
        assert cell["text"].startswith(figure(cell["metric"], cell["value"]))
        seen.add((int(cell["build"]), cell.get("workload"), cell["metric"]))
    held_flat = {
        (at, None, name) for at, row in enumerate(rows) for name in row["metrics"] if not name.endswith("_ratio")
    }
    held_each = {
        (at, workload, name)
        for at, row in enumerate(rows)
        for workload, measured in row["workloads"].items()
        for name in measured["metrics"]
    }
    assert seen == {key for key in held_flat | held_each if not key[2].endswith("_ratio")}


def test_the_answer_is_at_the_top(page: Any) -> None:
    assert page.inner_text("#answer").startswith("cpu-int8-split on x86-64-avx512-vnni")
    assert page.locator("#answer").bounding_box()["y"] < 200


@pytest.mark.parametrize("size", [WIDE, PHONE, {"width": 320, "height": 568}], ids=lambda size: str(size["width"]))
def test_nothing_sticks_out_sideways(browser: Any, file: Path, size: dict[str, int]) -> None:
    with opened(browser, file, viewport=size) as (page, wrong):
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert wrong == []


def test_text_in_charts_is_legible_on_a_phone(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport=PHONE) as (page, _):
        size = "e => parseFloat(getComputedStyle(e).fontSize) * e.closest('svg').getBoundingClientRect().width / 480"
        assert min(page.eval_on_selector_all("svg.chart text", f"all => all.map({size})")) >= 10


def test_dark_is_what_the_system_asks_for_and_the_button_turns_it(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport=WIDE, color_scheme="dark") as (page, wrong):
        dark = background(page)
        assert page.inner_text("#theme") == "Light"
        page.click("#theme")
        light = background(page)
        assert (dark, light) == ("rgb(19, 21, 23)", "rgb(253, 253, 251)")
        page.click("#theme")
        assert background(page) == dark
        assert wrong == []


def test_tab_reaches_each_chart_and_arrows_its_marks(page: Any) -> None:
    focused = "document.activeElement.getAttribute('aria-label')"
    charts = page.locator("svg.chart").count()
    page.evaluate("document.querySelector('[data-filter]').focus()")
    which = "[...document.querySelectorAll('svg.chart')].indexOf(document.activeElement.closest('svg.chart'))"
    reached = []
    while page.evaluate("document.activeElement !== document.body"):
        page.keyboard.press("Tab")
        reached += [at] if (at := page.evaluate(which)) >= 0 else []
    assert reached == list(range(charts))
    page.locator("svg.chart").first.locator(".mark[tabindex='0']").focus()
    first = page.evaluate(focused)
    assert page.inner_text("#tip") == first
    page.keyboard.press("ArrowRight")
    second = page.evaluate(focused)
    assert second != first
    assert page.inner_text("#tip") == second
    assert page.evaluate("getComputedStyle(document.activeElement.querySelector('path')).strokeWidth") == "2.6px"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == first
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Enter")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == first


def test_pointing_at_a_mark_says_its_figures(page: Any) -> None:
    mark = page.locator("svg.chart").nth(1).locator(".mark").last
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    assert page.inner_text("#tip") == mark.get_attribute("aria-label")
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= WIDE["width"]
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()


def test_the_filter_takes_a_build_out_of_everything(page: Any) -> None:
    parts = "all => all.filter(e => getComputedStyle(e).display !== 'none').length"
    assert page.eval_on_selector_all("[data-series='1']", parts) > 10
    others = page.eval_on_selector_all("[data-series='2']", parts)
    box = page.locator("[data-filter='1']")
    box.focus()
    page.keyboard.press("Space")
    assert page.eval_on_selector_all("[data-series='1']", parts) == 0
    assert page.eval_on_selector_all("[data-series='2']", parts) == others
    stops = "all => all.map(c => c.querySelectorAll(\".mark[tabindex='0']:not(.off)\").length)"
    assert set(page.eval_on_selector_all("svg.chart:has(.mark:not(.off))", stops)) == {1}
    box.check()
    assert page.eval_on_selector_all("[data-series='1']", parts) > 10


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run", names={"cpu-int4": HOSTILE, "cpu-int8-split": "</script><script>alert(2)</script>"}
    )
    with opened(browser, report(folder), viewport=WIDE) as (page, wrong):
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 2
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=alert(3)>')")
        page.wait_for_timeout(100)
        blocked = [message for message in wrong if "Content Security Policy" in message]
        assert blocked, "the policy refuses a handler that got past the escaping"
        assert not [message for message in wrong if message.startswith("dialog")]


def test_marks_and_fields_have_names(page: Any) -> None:
    unnamed = (
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
    )
    assert page.eval_on_selector_all("[role], button, input, a, summary", unnamed) == 0
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_paper_has_the_data_and_no_controls(page: Any) -> None:
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#theme").is_hidden()
    assert page.locator(".builds").is_hidden()
    assert page.eval_on_selector_all("details", "all => all.every(part => part.open)")


def test_without_script_everything_is_there(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport=WIDE, java_script_enabled=False) as (page, _):
        assert page.locator("#theme").is_hidden()
        assert page.locator("svg.chart").count() == page.locator("figure details table").count()


def test_a_comparison_opens_without_complaint(browser: Any, run_folder: Path, tmp_path: Path) -> None:
    slower = make_run(tmp_path / "b", slower={"cpu-int8": 1.2}, seed=50)
    write_comparison(compare(run_folder, slower), out=tmp_path / "c.html")
    with opened(browser, tmp_path / "c.html", viewport=PHONE, color_scheme="dark") as (page, wrong):
        assert page.inner_text("#answer").startswith("9 regressions, no improvements")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.locator("section").first.locator("tbody tr").count() == 9
        assert wrong == []

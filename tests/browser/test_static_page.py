"""The static page in a browser, opened from a file: sorting, filters, charts, no network."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from invented_searches import IMPORTANCE, PRIOR, SEARCHES
from pages_by_hand import HOSTILE, failure, hostile, many, page_of, trial
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from lunar_tune.report.results import SearchResults, write_static_page

pytestmark = pytest.mark.browser
ROWS = many(30)


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """Return what the browser complains of: scripts, policy, what could not be loaded."""
    said: list[str] = []
    page.on("console", lambda one: said.extend([one.text] if one.type == "error" else []))
    return said


def opened(page: Page, folder: Path, *searches: SearchResults) -> None:
    write_static_page(searches, folder / "page.html")
    page.goto((folder / "page.html").as_uri())
    page.wait_for_selector("html[data-ready]", timeout=120_000)


def numbers(page: Page) -> list[int]:
    """Return the trials that the table shows, in its order."""
    rows = page.locator("table.trials tbody tr:visible")
    return [int(text) for text in rows.evaluate_all("rows => rows.map(r => r.dataset.number)")]


def test_it_opens_from_a_file_and_asks_for_nothing_else(
    page: Page, tmp_path: Path, complaints: list[str]
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    opened(page, tmp_path, page_of(tmp_path, *ROWS), page_of(tmp_path, *ROWS[:5], name="second"))
    others = [url for url in asked if not url.startswith("data:")]
    assert others == [(tmp_path / "page.html").as_uri()], "the file itself comes first"
    assert complaints == []
    assert page.locator(".chart svg").count() == 10


def test_titles_sort_by_number_and_put_what_failed_last(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, page_of(tmp_path, *ROWS))
    title = page.locator("table.trials thead th", has_text="forget")
    scored = [row for row in ROWS if row.scores]
    for sign, direction in ((1, "ascending"), (-1, "descending")):
        title.get_by_role("button").click()
        expect(title).to_have_attribute("aria-sort", direction)
        ordered = sorted(scored, key=lambda row: sign * row.scores["forget_rouge1"])
        assert numbers(page)[: len(scored)] == [row.number for row in ordered]
        assert len(numbers(page)) == len(ROWS)
    title.get_by_role("button").focus()
    page.keyboard.press("Enter")
    expect(title).to_have_attribute("aria-sort", "ascending")


def test_filters_leave_the_trials_that_they_name(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, page_of(tmp_path, *ROWS))
    feasible = [row.number for row in ROWS if row.feasible]
    failed = [row.number for row in ROWS if row.failure]
    page.get_by_role("radio", name="feasible only").check()
    assert numbers(page) == feasible
    assert page.locator("output.count").inner_text() == f"{len(feasible)} of {len(ROWS)} trials"
    page.get_by_role("radio", name="failed").check()
    assert numbers(page) == failed
    page.get_by_role("radio", name="all (").check()
    page.get_by_role("searchbox").fill("NaN")
    assert numbers(page) == failed


def test_charts_have_something_on_them_and_their_texts_can_be_read(
    page: Page, tmp_path: Path
) -> None:
    """Also where the page is dark and narrow: what is black on paper is light there."""
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 900})
    opened(page, tmp_path, page_of(tmp_path, *ROWS, importance=IMPORTANCE, layer_prior=PRIOR))
    charts = page.locator(".chart")
    assert charts.count() == 7
    for place in range(charts.count()):
        chart = charts.nth(place)
        picture = Image.open(io.BytesIO(chart.screenshot())).convert("RGB")
        pixels = np.asarray(picture)
        assert pixels.std() > 0.03 * 255
        assert len(np.unique(pixels[::2, ::2].reshape(-1, 3), axis=0)) > 20
        colours = chart.locator("svg text").evaluate_all(
            "texts => texts.map(text => getComputedStyle(text).fill)"
        )
        assert set(colours) == {"rgb(232, 232, 232)"}


# Vega hides labels for which there is no room.
BOXES = """texts => texts.filter(text => getComputedStyle(text).opacity > 0).map(text => {
  const {left, top, right, bottom} = text.getBoundingClientRect();
  return [text.textContent, left, top, right, bottom];
})"""


def test_no_text_of_a_chart_covers_another_or_leaves_the_picture(
    page: Page, tmp_path: Path
) -> None:
    opened(page, tmp_path, *SEARCHES.values())
    charts = page.locator(".chart svg")
    assert charts.count() > 50
    for place in range(charts.count()):
        chart = charts.nth(place)
        ((_, left, top, right, bottom),) = chart.evaluate_all(BOXES)
        boxes = chart.locator("text").evaluate_all(BOXES)
        assert len(boxes) > 5
        for (one, *a), (other, *b) in itertools.combinations(boxes, 2):
            # Boxes are as high as a font's tallest letters, so those of two lines overlap a little.
            apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 4 or b[3] <= a[1] + 4
            assert apart, (place, one, other)
        for text, x0, y0, x1, y1 in boxes:
            assert left - 1 <= x0 <= x1 <= right + 1, (place, text)
            assert top - 1 <= y0 <= y1 <= bottom + 1, (place, text)


def marks(page: Page, kind: str) -> Locator:
    """Return the points of the trade-off of one entry of its legend."""
    return page.locator(f".trade_off svg .mark-symbol.role-mark path[aria-label*='{kind}']")


def test_a_click_on_a_point_shows_its_answers_and_marks_its_row(page: Page, tmp_path: Path) -> None:
    rows = (trial(0, 0.1, 0.9), trial(1, 0.6, 0.95), failure(2), trial(3, 0.6, 0.3))
    opened(page, tmp_path, page_of(tmp_path, *rows))
    page.get_by_role("radio", name="failed").check()
    assert numbers(page) == [2]
    point = marks(page, "kind: feasible").nth(1)
    point.hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("trial 1")
    point.click()
    chosen = page.locator("tr.chosen")
    expect(chosen).to_have_attribute("data-number", "1")
    expect(page.locator("table.trials tbody tr:visible")).to_have_count(4)  # the form is reset then
    assert numbers(page) == [0, 1, 2, 3]
    shown = page.locator(".answers:visible")
    expect(shown).to_be_in_viewport()
    assert shown.get_attribute("data-number") == "1"
    marks(page, "kind: infeasible").click()
    expect(chosen).to_have_attribute("data-number", "3")
    expect(chosen).to_be_in_viewport()  # it has no answers


def test_the_chosen_trials_answers_are_the_ones_that_are_shown(page: Page, tmp_path: Path) -> None:
    search = page_of(tmp_path, *ROWS)
    opened(page, tmp_path, search)
    chosen = page.get_by_label("Trial", exact=False).and_(page.locator("select"))
    for row in search.ranked[:2]:
        chosen.select_option(str(row.number))
        shown = page.locator(".answers:visible")
        assert shown.count() == 1
        assert f"trial {row.number}" in shown.inner_text()


def test_texts_of_others_do_nothing_and_are_shown_as_they_are(
    page: Page, tmp_path: Path, complaints: list[str]
) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    opened(page, tmp_path, hostile(tmp_path), hostile(tmp_path))
    page.locator("table.trials thead th button").first.click()
    page.get_by_role("searchbox").first.fill("alert")
    alerts = [text for text in HOSTILE if "alert" in text]
    # A failure for each, and the trial that has one as a parameter.
    expect(page.locator("output.count").first).to_have_text(f"{len(alerts) + 1} of 7 trials")
    cells = page.locator("table.trials tbody").first.inner_text()
    for text in alerts:
        assert text in cells
    assert page.locator("article script:not([type])").count() == 0
    marks(page, "kind: best").first.hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text(HOSTILE[0])
    assert (dialogs, complaints) == ([], [])


def test_the_table_of_three_searches_can_be_seen_whole(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    name = "lunar-contracts-20260101-101010"
    opened(page, tmp_path, *(page_of(tmp_path, *ROWS, name=f"{name}{n}") for n in range(3)))
    table = page.locator("table.searches")
    room = "table => table.closest('.scroller').clientWidth - table.offsetWidth"
    assert table.evaluate(room) >= 0


def test_the_page_is_never_wider_than_its_window(page: Page, tmp_path: Path) -> None:
    second = page_of(tmp_path, *ROWS[:3], name="second" * 20)
    opened(page, tmp_path, page_of(tmp_path, *ROWS), second, hostile(tmp_path))
    for width in (1440, 800, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.reload()
        page.wait_for_selector("html[data-ready]", timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_read_and_printed_without_scripts(page: Page, tmp_path: Path) -> None:
    write_static_page([page_of(tmp_path, *ROWS)], tmp_path / "page.html")
    context = page.context.browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto((tmp_path / "page.html").as_uri())
    plain.emulate_media(media="print", color_scheme="dark")
    assert plain.locator("table.trials tbody tr:visible").count() == len(ROWS)
    assert plain.locator(".answers:visible").count() == 2
    context.close()

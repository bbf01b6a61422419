"""The static page in a browser, opened from a file: sorting, filters, pictures, no network."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from invented_searches import CURVE, IMPORTANCE
from pages_by_hand import HOSTILE, failure, hostile, many, page_of, trial
from playwright.sync_api import ConsoleMessage, Page, expect

from lunar_tune.report.page import PageSearch, write_page

pytestmark = pytest.mark.browser
ROWS = many(30)


@pytest.fixture
def requests(page: Page) -> list[str]:
    """Return what the page asks for, which it does not get; the file itself comes first."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    return asked


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """Return what the browser complains of: scripts, policy, what could not be loaded."""
    said: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error":
            said.append(message.text)

    page.on("console", hear)
    return said


def opened(page: Page, folder: Path, *searches: PageSearch) -> None:
    write_page(searches, folder / "page.html")
    page.goto((folder / "page.html").as_uri())
    page.wait_for_selector("html[data-ready]", timeout=120_000)


def numbers(page: Page) -> list[int]:
    """Return the trials that the table shows, in its order."""
    rows = page.locator("table.trials tbody tr[data-number]")
    return [int(text) for text in rows.evaluate_all("rows => rows.map(r => r.dataset.number)")]


def test_it_opens_from_a_file_and_asks_for_nothing_else(
    page: Page, tmp_path: Path, requests: list[str], complaints: list[str]
) -> None:
    opened(page, tmp_path, page_of(*ROWS), page_of(*ROWS[:5], name="second"))
    others = [url for url in requests if not url.startswith(("blob:", "data:"))]
    assert others == [(tmp_path / "page.html").as_uri()]
    assert complaints == []
    assert page.locator(".js-plotly-plot").count() == 10


def test_a_click_on_a_title_sorts_by_number_and_puts_what_failed_last(
    page: Page, tmp_path: Path
) -> None:
    opened(page, tmp_path, page_of(*ROWS))
    title = page.locator("table.trials thead th", has_text="forget")
    scored = [row for row in ROWS if row.scores]
    for sign, direction in ((1, "ascending"), (-1, "descending")):
        title.click()
        # DataTables sorts a moment after the click.
        expect(title).to_have_attribute("aria-sort", direction)
        ordered = sorted(scored, key=lambda row: sign * row.scores["forget_rouge1"])
        assert numbers(page)[: len(scored)] == [row.number for row in ordered]
        assert len(numbers(page)) == len(ROWS)


def test_titles_sort_from_the_keyboard(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, page_of(*ROWS))
    title = page.locator("table.trials thead th", has_text="retain")
    title.locator("[role=button], .dt-column-order").first.focus()
    page.keyboard.press("Enter")
    expect(title).to_have_attribute("aria-sort", "ascending")
    first = min((row for row in ROWS if row.scores), key=lambda row: row.scores["retain_rouge1"])
    assert numbers(page)[0] == first.number


def test_filters_leave_the_trials_that_they_name(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, page_of(*ROWS))
    feasible = [row.number for row in ROWS if row.feasible]
    failed = [row.number for row in ROWS if row.failure]
    page.get_by_label("feasible only").check()
    assert numbers(page) == feasible
    assert page.locator("output.count").inner_text() == f"{len(feasible)} of {len(ROWS)} trials"
    page.get_by_label("failed").check()
    assert numbers(page) == failed
    page.get_by_label("all (").check()
    page.get_by_role("searchbox").fill("NaN")
    assert numbers(page) == failed


def test_pictures_have_something_on_them(page: Page, tmp_path: Path) -> None:
    shown = page_of(*ROWS)
    known = replace(shown.report, importance=lambda: IMPORTANCE, layers=CURVE)
    opened(page, tmp_path, replace(shown, report=known))
    plots = page.locator(".plot")
    assert plots.count() == 7
    for place in range(plots.count()):
        pixels = matplotlib.image.imread(io.BytesIO(plots.nth(place).screenshot()))[..., :3]
        assert pixels.std() > 0.03
        assert len({tuple(pixel) for pixel in (pixels[::2, ::2] * 255).reshape(-1, 3)}) > 20


def test_a_click_on_a_point_shows_its_row_and_its_answers(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, page_of(trial(0, 0.1, 0.9), trial(1, 0.6, 0.95), failure(2)))
    page.get_by_label("failed").check()
    assert numbers(page) == [2]
    point = page.locator(".picture-trade-off .points path").nth(1)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator(".picture-trade-off .hovertext")).to_contain_text("trial 1")
    page.mouse.down()
    page.mouse.up()
    chosen = page.locator("tr.chosen")
    expect(chosen).to_have_attribute("data-number", "1")
    expect(chosen).to_be_in_viewport()
    assert page.locator(".answers:visible").get_attribute("data-number") == "1"


def test_the_chosen_trials_answers_are_the_ones_that_are_shown(page: Page, tmp_path: Path) -> None:
    search = page_of(*ROWS)
    opened(page, tmp_path, search)
    for answers in search.answers:
        page.get_by_label("Trial", exact=False).and_(page.locator("select")).select_option(
            str(answers.number)
        )
        shown = page.locator(".answers:visible")
        assert shown.count() == 1
        assert f"trial {answers.number}" in shown.inner_text()


def test_texts_of_others_do_nothing_and_are_shown_as_they_are(
    page: Page, tmp_path: Path, complaints: list[str]
) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    opened(page, tmp_path, hostile(), hostile())
    page.locator("table.trials thead th").first.click()
    page.get_by_role("searchbox").first.fill("alert")
    alerts = [text for text in HOSTILE if "alert" in text]
    # A failure for each, and the trial that has one as a parameter.
    expect(page.locator("output.count").first).to_have_text(f"{len(alerts) + 1} of 7 trials")
    cells = page.locator("table.trials tbody").first.inner_text()
    for text in alerts:
        assert text in cells
    assert page.locator("article script:not([type])").count() == 0
    point = page.locator(".picture-trade-off .points path").first
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    label = page.locator(".picture-trade-off .hovertext").first
    assert HOSTILE[0] in (label.text_content() or "")
    assert (dialogs, complaints) == ([], [])


def test_the_table_of_three_searches_can_be_seen_whole(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    name = "lunar-contracts-20260101-101010"
    opened(page, tmp_path, *(page_of(*ROWS, name=f"{name}{n}") for n in range(3)))
    table = page.locator("table.searches")
    # DataTables puts a box of its own around the table, which scrolls.
    room = "table => table.closest('.scroller').clientWidth - table.offsetWidth"
    assert table.evaluate(room) >= 0


@pytest.mark.parametrize("width", [1440, 800, 400])
def test_the_page_is_never_wider_than_its_window(page: Page, tmp_path: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    opened(page, tmp_path, page_of(*ROWS), page_of(*ROWS[:3], name="second" * 20), hostile())
    assert page.evaluate("document.documentElement.scrollWidth") <= width

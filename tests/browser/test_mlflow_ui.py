"""MLflow's UI on two searches, opened by the command that compares, as a user sees it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_lines import command, pages_shown, start
from playwright.sync_api import Page, expect
from tracked_searches import SCORES, make_search

pytestmark = pytest.mark.browser
COLUMNS = ["Run Name", "Created", "best", "search", "forget_rouge1", "retain_rouge1", "feasible"]
PARAMETERS = ["layer", "coefficient", "learning_rate"]
SETTING = re.compile(r"^L\d c[\d.]+ lr[\d.e-]+$")


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]
) -> Iterator[dict[str, str]]:
    """Give the printed addresses of a comparison of two searches, by what they show."""
    output = tmp_path_factory.mktemp("ui")
    empty_store(output / "mlflow.db")
    for name in ("one", "two"):
        make_search(output, name)
    expect.set_options(timeout=30_000)
    process = start(command("compare", "one", "two", "--output", str(output)), cwd=output)
    try:
        yield pages_shown(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def opened(page: Page, address: str) -> Page:
    """Open an address, and close the panel that MLflow opens at a first visit."""
    page.goto(address)
    page.get_by_role("button", name="Close").click()
    return page


def columns(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".ag-header-cell-text").all_text_contents()]


def test_the_list_shows_settings_scores_and_the_best_without_a_click(
    page: Page, pages: dict[str, str]
) -> None:
    """The feasible trials come first, in the order of the goal."""
    opened(page, pages["trials of one, two"])
    names = page.locator("[col-id^='attributes.`Run Name`']").get_by_text(SETTING)
    expect(names).to_have_count(2 * len(SCORES))
    for name in (*COLUMNS, *PARAMETERS):
        expect(page.get_by_role("columnheader").get_by_text(name, exact=True)).to_be_visible()
    shown = page.locator("[role=gridcell][col-id='metrics.`forget_rouge1`']").all_text_contents()
    assert [float(text) for text in shown] == [0.125, 0.125, 0.25, 0.25, 0.0, 0.0]
    best = page.locator("[role=gridcell][col-id='tags.`best`']").all_text_contents()
    assert best == ["true", "true", "-", "-", "-", "-"]
    page.get_by_role("button", name="Sort: goal").wait_for()


def test_the_charts_open_with_forgetting_and_keeping_on_axes(
    page: Page, pages: dict[str, str]
) -> None:
    """The parent runs are not among the trials; the learning rate is logarithmic."""
    opened(page, pages["charts of one, two"])
    expect(page.get_by_text(f"{2 * len(SCORES)} matching runs")).to_be_visible()
    plot = page.locator("div.parcoords")
    for name in (*COLUMNS[4:], "log10_learning_rate", "layer", "coefficient"):
        expect(plot.get_by_text(name, exact=True)).to_have_count(1)
    expect(page.get_by_text("forget_rouge1 vs. retain_rouge1")).to_have_count(1)


def test_searches_are_listed_and_the_menu_of_views_has_the_lists(
    page: Page, pages: dict[str, str]
) -> None:
    opened(page, pages["all searches"])
    expect(page.get_by_text("2 matching runs")).to_be_visible()
    for name in ("one", "two"):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    page.get_by_role("button", name="all searches").click()
    for name in ("all trials", "one, two"):
        expect(page.get_by_role("menuitem", name=name)).to_be_visible()

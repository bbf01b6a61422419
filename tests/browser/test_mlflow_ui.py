"""MLflow's UI on a real search, opened by the command that compares, as a user sees it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from command_lines import command, start
from made_once import copy_store
from playwright.sync_api import Locator, Page, expect
from shared_searches import NAME, TRIALS, SharedSearch

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PARAMETERS = {"coefficient", "layer", "learning_rate"}
SCORES = {"forget_rouge1", "retain_rouge1"}


@dataclass(frozen=True)
class Ui:
    """The addresses that the command prints: MLflow opens on agents without their last part."""

    comparison: str
    charts: str
    runs: str


@pytest.fixture(scope="module")
def ui(finished: SharedSearch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """Open a search of the tiny model; the server works on a copy of the store."""
    cwd = tmp_path_factory.mktemp("ui")
    copy_store(finished.output / "mlflow.db", cwd / "mlflow.db")
    options = ["--output", str(finished.output), "--tracking-uri", f"sqlite:///{cwd / 'mlflow.db'}"]
    expect.set_options(timeout=30_000)
    process = start(command("compare", NAME, *options), cwd=cwd)
    assert process.stdout is not None
    found: list[str] = []
    for line in process.stdout:
        found += re.findall(r"http://\S+", line)
        if len(found) == 3:
            break
    try:
        yield Ui(*found)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def close_assistant(page: Page) -> None:
    """Close the panel that MLflow opens at a first visit."""
    page.get_by_role("button", name="Close").click()


def axes(page: Page) -> Locator:
    return page.locator(".parcoords .axis-title")


def expect_axes(page: Page) -> None:
    """The parameters and forget ROUGE-1 are there from the start; retain is one choice away."""
    expect(page.get_by_text(f"Comparing {TRIALS} Runs from 1 Experiment")).to_be_visible()
    expect(axes(page)).to_have_count(len(PARAMETERS) + 1)
    assert set(axes(page).all_text_contents()) == PARAMETERS | {"forget_rouge1"}
    for name in ("retain_rouge1", "feasible"):
        page.get_by_role("combobox").nth(1).click(force=True)
        option = page.locator("[class*=select-item-option-content]")
        option.get_by_text(name, exact=True).click()
        page.keyboard.press("Escape")
    expect(axes(page)).to_have_count(len(PARAMETERS | SCORES) + 1)
    assert set(axes(page).all_text_contents()) == PARAMETERS | SCORES | {"feasible"}


def test_the_printed_address_shows_the_trials_on_all_axes(page: Page, ui: Ui) -> None:
    page.goto(ui.comparison)
    close_assistant(page)
    expect_axes(page)


def test_the_charts_open_with_forgetting_and_keeping_on_axes(page: Page, ui: Ui) -> None:
    """The parent run is not among the trials, and the learning rate is on a logarithmic scale."""
    page.goto(ui.charts)
    close_assistant(page)
    expect(page.get_by_text(f"{TRIALS} matching runs")).to_be_visible()
    plot = page.locator("div.parcoords")
    for name in SCORES | {"feasible", "log10_learning_rate", "layer", "coefficient"}:
        expect(plot.get_by_text(name, exact=True)).to_have_count(1)
    expect(page.get_by_text("forget_rouge1 vs. retain_rouge1")).to_have_count(1)


def test_trials_chosen_in_the_list_of_runs_are_compared(page: Page, ui: Ui) -> None:
    page.goto(ui.runs)
    close_assistant(page)
    parent = page.locator(".ag-cell").filter(has=page.get_by_text(NAME, exact=True))
    parent.get_by_role("button").first.click()
    name = page.get_by_text(re.compile(r"^lunar L\d c[\d.]+ lr[\d.e-]+$"))
    trials = page.get_by_role("row").filter(has=name)
    expect(trials).to_have_count(TRIALS)
    for place in range(TRIALS):
        trials.nth(place).get_by_role("checkbox").click()
    page.get_by_role("button", name="Compare").click()
    expect_axes(page)

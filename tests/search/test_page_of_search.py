"""A page from a search's folder: whose answers it shows, and what may be missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages_by_hand import failure, said, trial
from tracked_searches import TAGS

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.page import write_static_page
from lunar_tune.report.results import SearchResults
from lunar_tune.study.answers import write_answers
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.study import StoredStudy

# By forget ROUGE-1 the feasible ones are 7, 5, 4, 3, 2, 0; confirmed is the second of them.
ROWS = (
    *(trial(n, 0.6 - n / 10, 0.9) for n in range(6) if n != 1),
    trial(1, 0.0, 0.3),
    failure(6),
    trial(7, 0.05, 0.85),
)
GOAL = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])


def search(
    path: Path,
    *,
    confirmed: int | None = 5,
    answers: bool = True,
    rows: tuple[TrialRow, ...] = ROWS,
) -> SearchResults:
    """Return a search in a folder that holds answers and a configuration, if any."""
    rows = tuple(sorted(rows, key=lambda row: row.number))
    notes: dict[str, object] = {
        "baseline": {"forget_rouge1": 1.0, "retain_rouge1": 1.0},
        "tags": TAGS,
        "goal": GOAL.text,
    }
    if confirmed is not None:
        notes["confirmed"] = {"number": confirmed, "scores": dict(rows[confirmed].scores)}
    folder = Folder(path)
    path.mkdir()
    if answers:
        for row in rows:
            if row.scores:
                told = [said("forget", "where?", f"told by {row.number}", 0.1)]
                write_answers(folder.answers(row.number), told, ())
        full = [said("forget", "where?", "told in full", 0.1)]
        write_answers(folder.answers(5, full=True), full, ())
        write_answers(folder.answers(None), [said("forget", "where?", "known", 1.0)], ())
        folder.config.write_text("search:\n  name: <this & that>\n")
    return SearchResults(folder=folder, study=StoredStudy(rows, notes))


def answered(page: str) -> list[int]:
    """Return the trials whose answers a page shows, in its order."""
    return [int(number) for number in re.findall(r'class="answers"[^>]*data-number="(\d+)"', page)]


def test_the_confirmed_best_comes_first_with_its_full_answers_then_the_next_four(
    tmp_path: Path,
) -> None:
    write_static_page([search(tmp_path / "s")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert answered(page) == [5, 7, 4, 3, 2]
    assert "told in full" in page
    assert "told by 5" not in page
    assert "told by 7" in page
    assert ">known<" in page
    assert "&lt;this &amp; that&gt;" in page


def test_a_search_that_is_not_confirmed_shows_its_best_as_searched(tmp_path: Path) -> None:
    write_static_page([search(tmp_path / "s", confirmed=None)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert answered(page) == [7, 5, 4, 3, 2]
    assert "the best as searched is trial 7" in page


def test_a_search_without_a_feasible_trial_shows_the_nearest_misses(tmp_path: Path) -> None:
    rows = (trial(0, 0.1, 0.5), trial(1, 0.2, 0.7), trial(2, 0.1, 0.7), failure(3))
    found = search(tmp_path / "s", confirmed=None, rows=rows)
    write_static_page([found], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert answered(page) == [2, 1, 0]
    assert "No trial is feasible: these are the nearest misses" in page
    assert len(re.findall(r"<h4>Trial \d: [^<]*\(infeasible\)</h4>", page)) == 3
    assert "The nearest miss is trial 2" in page
    assert "trial 2, nearest miss" in page


def test_answers_and_configuration_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    write_static_page([search(tmp_path / "s", answers=False)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert answered(page) == []
    assert "No answers of a completed trial are kept." in page
    assert "config.yaml" not in page


def test_searches_of_one_name_from_two_folders_stand_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    both = [search(tmp_path / "s"), search(tmp_path / "other/s", confirmed=None)]
    write_static_page(both, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r'<article id="([^"]+)"', page) == ["search-1", "search-2"]
    assert answered(page) == [5, 7, 4, 3, 2, 7, 5, 4, 3, 2]


def test_no_search_and_a_place_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no search"):
        write_static_page([], tmp_path / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(InputError, match=r"page\.html: the page cannot be written"):
        write_static_page([search(tmp_path / "s")], tmp_path / "page.html")

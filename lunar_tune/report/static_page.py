"""One HTML page of searches, from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.report.page import PageSearch, write_page
from lunar_tune.report.page_answers import TrialAnswers
from lunar_tune.report.results import SearchResults
from lunar_tune.study.rows import TrialRow

__all__ = ["write_static_page"]

# Trials whose answers a page shows: the best and the next four, or the nearest misses.
_ANSWERED = 5


def write_static_page(results: Sequence[SearchResults], path: Path) -> None:
    """Write one self-contained page of searches, finished or still running, atomically.

    Args:
        results: The searches, in the order in which they are shown.
        path: The file.

    Raises:
        InputError: There is no search to show, or the file cannot be written.
    """
    if not results:
        raise InputError("there is no search to make a page of; name at least one.")
    searches = [_page_search(one) for one in results]
    try:
        write_page(searches, path)
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written ({error}).") from error


def _page_search(results: SearchResults) -> PageSearch:
    found = [(row, *_answers(results, row)) for row in results.report.ranked[:_ANSWERED]]
    config = results.folder.config
    return PageSearch(
        name=results.folder.name,
        report=results.report,
        vanilla=_kept(results),
        vanilla_in_full=_kept(results, full=True),
        answers=[
            TrialAnswers(row.number, row.label, rows, full, feasible=bool(row.feasible))
            for row, rows, full in found
            if rows
        ],
        configuration=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _answers(results: SearchResults, row: TrialRow) -> tuple[list[AnswerRow], bool]:
    """Return a trial's answers, of the full evaluation where it has one, and whether it is that."""
    full = _kept(results, row.number, full=True)
    return (full, True) if full else (_kept(results, row.number), False)


def _kept(
    results: SearchResults, number: int | None = None, *, full: bool = False
) -> list[AnswerRow]:
    """Return answers; none where their file is not there, as in a search of an older version."""
    try:
        return results.answers(number, full=full)
    except InputError:
        return []

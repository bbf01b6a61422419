"""A search's results for a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.report.report import Report
from lunar_tune.study.folder import RUNS

if TYPE_CHECKING:
    from altair import ConcatChart

__all__ = ["SearchResults", "load_search"]


def load_search(search: str | Path, *, runs: str | Path = RUNS) -> SearchResults:
    """Read a search, finished or still running.

    Args:
        search: Its folder, or its name.
        runs: Where names are looked up.

    Raises:
        InputError: There is no such search, or it has not judged the base model yet.

    Example:
        >>> results = load_search("runs/NAME")  # doctest: +SKIP
        >>> results.trials.sort_values("forget_rouge1")
    """
    return SearchResults.read(search, runs=runs)


class SearchResults(Report):
    """A search as it stands on disk, with its charts."""

    def chart(self, name: str, **options: Any) -> ConcatChart:
        """Draw one of the charts (`report.charts.CHARTS`).

        Args:
            name: For example trade_off.
            options: Of that chart: `parameter`, by its name, of sensitivity.

        Raises:
            InputError: There is no chart of that name, or the search has nothing to draw there.
        """
        from lunar_tune.report.charts import CHARTS  # loads Altair

        return CHARTS[name].draw(self, **options)

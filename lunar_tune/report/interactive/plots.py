"""The interactive pictures that a page shows of a search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lunar_tune.report.interactive.history_plot import history
from lunar_tune.report.interactive.importance_plot import importance
from lunar_tune.report.interactive.layers_plot import layers
from lunar_tune.report.interactive.parameters import parameter_map, sensitivity
from lunar_tune.report.interactive.side_by_side import side_by_side
from lunar_tune.report.interactive.style import Interactive
from lunar_tune.report.interactive.trade_off_plot import trade_off
from lunar_tune.report.report import Report
from lunar_tune.study.rows import COMPLETE, TrialRow

__all__ = ["interactive_pictures"]


def interactive_pictures(report: Report) -> list[Interactive]:
    """Return the pictures that make sense for what was searched.

    Without a completed trial that is the curve over the layers, if there is one.
    """
    rows = [row for row in report.rows if row.state == COMPLETE]
    drawn = [*(_of_trials(report, rows) if rows else ()), layers(report)]
    return [picture for picture in drawn if picture is not None]


def _of_trials(report: Report, rows: Sequence[TrialRow]) -> Iterable[Interactive | None]:
    return (
        trade_off(report, rows),
        parameter_map(report, rows),
        sensitivity(report, rows),
        history(report, rows),
        side_by_side(report, rows),
        importance(report),
    )

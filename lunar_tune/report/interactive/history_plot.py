"""The course of a search, for the mouse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lunar_tune.report.axes import time_axis
from lunar_tune.report.interactive.style import (
    GREEN,
    GROUPS,
    Interactive,
    add_trials,
    are_known,
    new_figure,
    range_of,
    score_axis,
    whole_axis,
)
from lunar_tune.report.report import Report
from lunar_tune.study.rows import TrialRow, best_so_far

__all__ = ["history"]


def history(report: Report, rows: Sequence[TrialRow]) -> Interactive:
    """Draw the objective with the best feasible so far; over time where that is known."""
    from plotly.subplots import make_subplots

    score = report.goal.objective.metric
    known = [row for row in rows if are_known(row.scores, score)]
    time = time_axis(known, report.rows)
    by_number = {row.number: row for row in known}
    panels = [({row.number: float(row.number) for row in known}, "trial (from 0)")]
    if time.places:
        panels.append((dict(time.places), f"{time.unit} since the first trial began"))
    figure = new_figure(make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04))
    for column, (places, title) in enumerate(panels, start=1):
        _draw(figure, [by_number[number] for number in places], places, score, column)
        figure.update_xaxes(title_text=title, col=column)
    figure.update_xaxes(**whole_axis([row.number for row in rows]), col=1)
    y_range = range_of(score, [row.scores[score] for row in known])
    figure.update_yaxes(**y_range)
    figure.update_yaxes(title_text=score_axis(score), col=1)
    caption = "Each trial's objective in turn" + (", and over time." if time.places else ".")
    return Interactive("history", "Course of the search", caption, figure)


def _draw(
    figure: Any,
    rows: Sequence[TrialRow],
    places: Mapping[int, float],
    score: str,
    column: int,
) -> None:
    """Draw a panel; the line comes last, so that it lies above the trials."""
    for feasible, label, colour, symbol in GROUPS:
        mine = [row for row in rows if row.feasible is feasible]
        add_trials(
            figure,
            mine,
            [places[row.number] for row in mine],
            [row.scores[score] for row in mine],
            name=label,
            colour=colour,
            symbol=symbol,
            row=1,
            col=column,
        )
    best = best_so_far(rows)
    figure.add_scatter(
        x=[places[row.number] for row, _ in best],
        y=[one.scores[score] for _, one in best],
        mode="lines",
        line={"shape": "hv", "color": GREEN, "width": 2.5},
        hoverinfo="skip",
        name="best feasible so far",
        legendgroup="best",
        showlegend=column == 1,
        row=1,
        col=column,
    )

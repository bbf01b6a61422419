"""The course of a search, for the mouse.

Covers: each trial's objective in turn, and the best feasible so far.
Does not cover: the course over time (`pictures.history`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lunar_tune.evaluation.goal import Goal
from lunar_tune.reporting.interactive.style import (
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
from lunar_tune.reporting.rows import TrialRow, best_so_far

__all__ = ["history"]


def history(goal: Goal, rows: Sequence[TrialRow]) -> Interactive:
    """Draw the objective over the trials, with the best feasible so far."""
    score, figure = goal.objective.metric, new_figure()
    known = [row for row in rows if are_known(row.scores, score)]
    best = best_so_far(known)
    figure.add_scatter(
        x=[row.number for row, _ in best],
        y=[one.scores[score] for _, one in best],
        mode="lines",
        line={"shape": "hv", "color": GREEN, "width": 2.5},
        hoverinfo="skip",
        name="best feasible so far",
    )
    for feasible, label, colour, symbol in GROUPS:
        mine = [row for row in known if row.feasible is feasible]
        add_trials(figure, mine, None, score, name=label, colour=colour, symbol=symbol)
    figure.update_xaxes(title_text="trial", **whole_axis([row.number for row in rows]))
    figure.update_yaxes(
        title_text=score_axis(score), **range_of(score, [row.scores[score] for row in known])
    )
    return Interactive("history", "Course of the search", "Each trial's objective in turn.", figure)

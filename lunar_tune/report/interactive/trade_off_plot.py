"""What is forgotten against what is kept, for the mouse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lunar_tune.metrics.goal import Constraint, in_words, score_label
from lunar_tune.metrics.names import METRICS
from lunar_tune.report.interactive.style import (
    BLACK,
    GREEN,
    GROUPS,
    Interactive,
    add_trials,
    are_known,
    limits_of,
    new_figure,
    range_of,
    score_axis,
)
from lunar_tune.report.pareto import pareto_front
from lunar_tune.report.report import Report
from lunar_tune.study.rows import TrialRow

__all__ = ["trade_off"]


def trade_off(report: Report, rows: Sequence[TrialRow]) -> Interactive:
    """Draw the objective against the first other score that the goal takes."""
    goal = report.goal
    bound = next((c for c in goal.constraints if c.metric != goal.objective.metric), None)
    x = goal.objective.metric
    others = ("retain_rouge1", "forget_rouge1")
    y = bound.metric if bound else next(name for name in others if name != x)
    figure = new_figure()
    known = [row for row in rows if are_known(row.scores, x, y)]
    seen = [*(row.scores for row in known), *report.compared.values()]
    reached = {n: [one[n] for one in seen if are_known(one, n)] for n in (x, y)}
    reached[y] += [bound.bound] if bound is not None else []
    axes = [range_of(name, reached[name]) for name in (x, y)]
    if bound is not None:
        _shade(figure, bound, axes)
    for feasible, label, colour, symbol in GROUPS:
        mine = [row for row in known if row.feasible is feasible]
        at = [[row.scores[name] for row in mine] for name in (x, y)]
        entry = f"{label} ({len(mine)})"
        add_trials(figure, mine, *at, name=entry, colour=colour, symbol=symbol)
    _front(figure, known, x, y, higher_is_better=_wants_more(y, bound))
    _marks(figure, report, x, y)
    figure.update_xaxes(title_text=score_axis(x), **axes[0])
    figure.update_yaxes(title_text=score_axis(y), **axes[1])
    kept = f" Shaded: {in_words([bound])}." if bound else ""
    rest = in_words(one for one in goal.constraints if one is not bound)
    hidden = f" A feasible trial also keeps {rest}, which is not drawn." if rest else ""
    caption = f"A dot is a trial; a click shows its row in the table.{kept}{hidden}"
    return Interactive("trade-off", "Trade-off", caption, figure)


def _wants_more(name: str, bound: Constraint | None) -> bool:
    return bound.sense == ">=" if bound else not METRICS[name].lower_is_better


def _shade(figure: Any, bound: Constraint, axes: Sequence[Mapping[str, Any]]) -> None:
    """Shade where the bound is kept, as a trace: it has an entry in the legend."""
    (left, right), (low, high) = (limits_of(axis) for axis in axes)
    near, far = bound.bound, high if bound.sense == ">=" else low
    figure.add_scatter(
        x=[left, right, right, left],
        y=[near, near, far, far],
        mode="none",
        fill="toself",
        fillcolor="rgba(0, 114, 178, 0.10)",
        hoverinfo="skip",
        name="bound kept",
    )
    line = {"color": "#555", "width": 1.5, "dash": "dash"}
    figure.add_scatter(
        x=[left, right],
        y=[near, near],
        mode="lines",
        line=line,
        hoverinfo="skip",
        name=f"bound {bound.bound:g}",
    )


def _front(
    figure: Any, rows: Sequence[TrialRow], x: str, y: str, *, higher_is_better: bool
) -> None:
    """Ring the trials that no other beats in both scores, and draw the steps between them.

    The best in x comes first: each step gives up some of x before it gains in y.
    """
    front = pareto_front(
        [(r.scores[x], r.scores[y]) for r in rows],
        lower_is_better=(METRICS[x].lower_is_better, not higher_is_better),
    )
    figure.add_scatter(
        x=[rows[place].scores[x] for place in front],
        y=[rows[place].scores[y] for place in front],
        mode="lines+markers",
        line={"shape": "hv", "color": "#444", "width": 1.5, "dash": "dot"},
        marker={"symbol": "circle-open", "size": 15, "color": "#444", "line": {"width": 1.2}},
        hoverinfo="skip",
        name=f"Pareto front ({len(front)})",
    )


def _marks(figure: Any, report: Report, x: str, y: str) -> None:
    """Mark the base model and the confirmed best."""
    marks = [(report.vanilla, "base model", "square-open", BLACK, 11)]
    if report.best is not None and report.confirmed is not None:
        if report.held_out:
            name = "base model, held out"
            marks.append((report.vanilla_in_full, name, "square-open-dot", BLACK, 11))
        asked = "held out" if report.held_out else "in full"
        name = f"best, {asked}: trial {report.best.number}"
        marks.append((report.confirmed, name, "star", GREEN, 17))
    outline = {"color": BLACK, "width": 1.5}
    for scores, name, symbol, colour, size in marks:
        if are_known(scores, x, y):
            said = [f"{score_label(score)} {scores[score]:.3f}" for score in (x, y)]
            figure.add_scatter(
                x=[scores[x]],
                y=[scores[y]],
                mode="markers",
                marker={"symbol": symbol, "color": colour, "size": size, "line": outline},
                hovertext=["<br>".join([name, *said])],
                hoverinfo="text",
                name=name,
            )

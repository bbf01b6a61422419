"""What is made good against what is kept: every trial, the bounds, the best, the Pareto front."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lunar_tune.metrics.goal import in_words
from lunar_tune.metrics.names import Metric
from lunar_tune.report.pareto import pareto_front
from lunar_tune.report.pictures.annotations import (
    best_label,
    draw_best,
    draw_bounds,
    draw_trials,
    metrics_of,
    show_scores,
    shown_rows,
)
from lunar_tune.report.pictures.figure import REGION, Canvas, make_figure, show_legend
from lunar_tune.report.report import Report

__all__ = ["trade_off"]


def trade_off(report: Report) -> Canvas:
    """Draw the trials' two scores.

    A trial that was stopped early stands at the mean of the retained questions that it was asked.
    """
    figure, (axes,) = make_figure(report.title, height=5.4)
    x, y = metrics_of(report)
    rows = shown_rows(report, x.name, y.name)
    points = [(row.scores[x.name], row.scores[y.name]) for row in rows]
    marked = _marked(report)
    known = [
        *points,
        *((s[x.name], s[y.name]) for s in marked.values() if {x.name, y.name} <= {*s}),
    ]
    bounds = report.goal.constraints
    for metric, along, place in ((x, "x", 0), (y, "y", 1)):
        values = [point[place] for point in known]
        values += [one.bound for one in bounds if one.metric == metric.name]
        show_scores(axes, metric, values, along="x" if along == "x" else "y")
    _shade_feasible(axes, report, x, y)
    draw_bounds(axes, report, x.name, along="x")
    draw_bounds(axes, report, y.name, along="y")
    draw_trials(axes, rows, lambda row: row.scores[x.name], lambda row: row.scores[y.name])
    _draw_front(axes, points, x, y)
    _mark(axes, report, x, y)
    show_legend(figure)
    return figure


def _marked(report: Report) -> dict[str, Mapping[str, float]]:
    """Return the scores that are marked by themselves."""
    scores = {"base model": report.vanilla}
    if report.best is not None and report.confirmed is not None:
        if report.held_out:
            scores["base model, held out"] = report.vanilla_in_full
        asked = "held out" if report.held_out else "in full"
        scores[best_label(report.best, asked)] = report.confirmed
    return scores


def _shade_feasible(axes: Axes, report: Report, x: Metric, y: Metric) -> None:
    """Shade where the bounds on both scores are kept."""
    sides = {x.name: list(axes.get_xlim()), y.name: list(axes.get_ylim())}
    bounded = [one for one in report.goal.constraints if one.metric in sides]
    for one in bounded:
        low, high = sides[one.metric]
        if one.sense == ">=":
            sides[one.metric] = [max(low, one.bound), high]
        else:
            sides[one.metric] = [low, min(high, one.bound)]
    (left, right), (bottom, top) = sides[x.name], sides[y.name]
    if bounded and left < right and bottom < top:
        region = Rectangle(
            (left, bottom),
            right - left,
            top - bottom,
            label=f"feasible region{_rest(report, sides)}",
        )
        region.set(facecolor=REGION, linewidth=0, zorder=0)
        axes.add_patch(region)


def _rest(report: Report, drawn: Collection[str]) -> str:
    """Say which bounds a feasible trial keeps besides, as they are not on these axes."""
    rest = in_words(one for one in report.goal.constraints if one.metric not in drawn)
    return f" (also {rest}, not drawn)" if rest else ""


def _draw_front(axes: Axes, points: list[tuple[float, float]], x: Metric, y: Metric) -> None:
    """Draw the steps between the trials that no other beats."""
    lower_is_better = (x.lower_is_better, y.lower_is_better)
    front = [points[index] for index in pareto_front(points, lower_is_better=lower_is_better)]
    if front:
        axes.step(
            [point[0] for point in front],
            [point[1] for point in front],
            where="post",
            color="0.25",
            lw=1,
            ls=":",
            marker="o",
            ms=9,
            mfc="none",
            mew=0.8,
            label=f"Pareto front ({len(front)})",
            zorder=3,
        )


def _mark(axes: Axes, report: Report, x: Metric, y: Metric) -> None:
    """Mark the base model and the confirmed best."""
    for label, scores in _marked(report).items():
        if not {x.name, y.name} <= scores.keys():
            continue
        if scores is report.confirmed:
            draw_best(axes, scores[x.name], scores[y.name], label)
            continue
        axes.scatter(
            [scores[x.name]],
            [scores[y.name]],
            s=90,
            marker="s",
            facecolors="none",
            edgecolors="black",
            linestyles="-" if scores is report.vanilla else ":",
            label=label,
            zorder=3,
        )

"""How much a parameter matters by itself: both scores against its values."""

from __future__ import annotations

import math

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import score_label
from lunar_tune.metrics.names import Metric
from lunar_tune.report.pictures.annotations import (
    best_label,
    draw_best,
    draw_bounds,
    draw_trials,
    metric_of,
    metrics_of,
    parameter_place,
    show_parameter,
    show_scores,
    shown_rows,
)
from lunar_tune.report.pictures.figure import REGION, Canvas, make_figure, show_legend
from lunar_tune.report.report import Report
from lunar_tune.study.rows import TrialRow

__all__ = ["near_best", "no_sensitivity", "sensitivity", "swept_parameter"]

_FIRST = ("learning_rate", "ridge")
_LAST = ("coefficient", "layer")  # they have a map of their own
_NEAR = 0.05  # of a score's range


def swept_parameter(report: Report) -> str | None:
    """Return the parameter that is shown unless another is asked for; None if none varies."""
    names = _varied(report)
    rest = [name for name in names if name not in (*_FIRST, *_LAST)]
    return next((name for name in (*_FIRST, *rest, *_LAST) if name in names), None)


def no_sensitivity(report: Report) -> str | None:
    """Say why there is no such picture; None if there is."""
    if swept_parameter(report) is None:
        return "no two completed trials differ in a number"
    return None


def sensitivity(report: Report, parameter: str | None = None) -> Canvas:
    """Draw both scores against a parameter, on the scale that it was searched on.

    Args:
        report: The search.
        parameter: Its name; None for the learning rate, or what the method has in its place.

    Raises:
        InputError: No completed trials differ in it.
    """
    name = swept_parameter(report) if parameter is None else parameter
    if name is None or name not in _varied(report):
        shown = "a number" if name is None else name
        there = ", ".join(_varied(report)) or "none"
        raise InputError(f"no two completed trials differ in {shown}; those that vary: {there}.")
    figure, panels = make_figure(report.title, rows=2, height=6.0)
    metrics = metrics_of(report)
    place = parameter_place(report, name)
    near = [place(row.parameters[name]) for row in near_best(report)]
    for axes, metric in zip(panels, metrics, strict=True):
        rows = shown_rows(report, metric.name)
        scores = [row.scores[metric.name] for row in rows]
        bounds = [one.bound for one in report.goal.constraints if one.metric == metric.name]
        show_scores(axes, metric, [*scores, *bounds], along="y")
        if len(set(near)) > 1:
            label = (
                f"range of trials that are feasible and within {_margin(report, metrics[0]):.2g}"
            )
            label += f" of the best {score_label(metrics[0].name)}"
            axes.axvspan(min(near), max(near), fc=REGION, ec="0.6", lw=1, label=label, zorder=0)
        draw_bounds(axes, report, metric.name, along="y")
        draw_trials(axes, rows, lambda row: place(row.parameters[name]), metric_of(metric.name))
        if report.best is not None:
            value = place(report.best.parameters[name])
            label = best_label(report.best, "as searched")
            draw_best(axes, value, report.best.scores[metric.name], label)
    show_parameter(panels[1], report, name, _values(report, name), along="x")
    show_legend(figure)
    return figure


def near_best(report: Report) -> list[TrialRow]:
    """Return the feasible trials whose objective is within .05 of its range of the best one's."""
    metric, _ = metrics_of(report)
    feasible = [row for row in shown_rows(report, metric.name) if row.feasible]
    if not feasible:
        return []
    sign = 1.0 if metric.lower_is_better else -1.0
    least = min(sign * row.scores[metric.name] for row in feasible)
    margin = _margin(report, metric) * (1 + 1e-9)  # a score that lies at the margin is within
    return [row for row in feasible if sign * row.scores[metric.name] <= least + margin]


def _margin(report: Report, metric: Metric) -> float:
    """Return .05 of the score's range, or of what the trials reached where it has no end."""
    span = metric.high - metric.low
    if math.isinf(span):
        scores = [row.scores[metric.name] for row in shown_rows(report, metric.name)]
        span = max(scores) - min(scores)
    return _NEAR * span


def _values(report: Report, name: str) -> list[float]:
    return [row.parameters[name] for row in shown_rows(report)]


def _varied(report: Report) -> list[str]:
    """Return the numeric parameters in which completed trials differ."""
    rows = shown_rows(report)
    names = list(rows[0].parameters) if rows else []
    found = []
    for name in names:
        values = [row.parameters.get(name) for row in rows]
        numeric = all(isinstance(value, (int, float)) for value in values)
        if numeric and len(set(values)) > 1:
            found.append(name)
    return found

"""Trials, scores and parameters as pictures show them: marks, labels with units, axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lunar_tune.metrics.goal import score_label
from lunar_tune.metrics.names import METRICS, Metric
from lunar_tune.report.pictures.figure import BEST, FEASIBLE, INFEASIBLE, SMALL
from lunar_tune.report.report import Report
from lunar_tune.study.rows import COMPLETE, TrialRow

__all__ = [
    "axis_label",
    "best_label",
    "draw_best",
    "draw_bounds",
    "draw_trials",
    "is_log",
    "metric_of",
    "metrics_of",
    "parameter_label",
    "parameter_place",
    "score_limits",
    "show_parameter",
    "show_scores",
    "shown_rows",
]

_UNITS = {
    "rouge1": "recall",
    "rougeL": "recall",
    "log_prob": "[nats]",
    "answer_log_prob": "[nats a token]",
    "deviation_score": "[%]",
    "refusal_quality": "[cosine]",
}
_PAD = 0.03  # of the axis, beyond its outermost value
_LEAST_SPAN = 3.0  # of a logarithmic axis: from its end to its beginning


def shown_rows(report: Report, *metrics: str) -> list[TrialRow]:
    """Return the completed trials of which the scores are known, by number."""
    return [
        row
        for row in report.rows
        if row.state == COMPLETE
        if all(math.isfinite(row.scores.get(name, math.nan)) for name in metrics)
    ]


def draw_trials(
    axes: Axes,
    rows: Sequence[TrialRow],
    x: Callable[[TrialRow], float],
    y: Callable[[TrialRow], float],
    *,
    size: float = 30,
) -> None:
    """Draw trials: feasible ones as discs, infeasible ones as crosses."""
    for feasible, colour, marker in ((True, FEASIBLE, "o"), (False, INFEASIBLE, "x")):
        mine = [row for row in rows if row.feasible is feasible]
        if mine:
            axes.scatter(
                [x(row) for row in mine],
                [y(row) for row in mine],
                s=size,
                c=colour,
                marker=marker,
                linewidths=0.5 if feasible else 1.2,
                edgecolors="white" if feasible else None,
                label=f"{'feasible' if feasible else 'infeasible'} ({len(mine)})",
                zorder=2,
            )


def draw_best(axes: Axes, x: float, y: float, label: str) -> None:
    """Draw the star of the best trial."""
    axes.scatter([x], [y], s=170, marker="*", c=BEST, edgecolors="black", label=label, zorder=4)


def best_label(row: TrialRow, how: str) -> str:
    """Return the legend's entry for the best trial.

    Args:
        row: The trial.
        how: Of which evaluation its scores are.
    """
    return f"best, {how}: trial {row.number}, {row.label}"


def draw_bounds(axes: Axes, report: Report, metric: str, *, along: Literal["x", "y"]) -> None:
    """Draw a line at each bound of a score."""
    for one in report.goal.constraints:
        if one.metric == metric:
            line = axes.axvline if along == "x" else axes.axhline
            side = "at least" if one.sense == ">=" else "at most"
            label = f"bound: {score_label(metric)} {side} {one.bound:g}"
            line(one.bound, color="0.35", lw=1, ls="--", label=label, zorder=1)


def axis_label(metric: Metric) -> str:
    """Return a score's name with its unit: forget ROUGE-1 recall."""
    return f"{score_label(metric.name)} {_UNITS.get(metric.quantity, '')}".strip()


def score_limits(metric: Metric, values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis: the whole range of a score from 0 to 1, else what there is."""
    if (metric.low, metric.high) == (0.0, 1.0):
        return -_PAD, 1 + _PAD
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if is_log(metric):
        low, high = max(low, metric.low), max(high, metric.low)
        return _log_limits(low, high)
    pad = _PAD * (high - low) or max(abs(low), 1.0) * _PAD
    return low - pad, high + pad


def show_scores(
    axes: Axes, metric: Metric, values: Sequence[float], *, along: Literal["x", "y"]
) -> None:
    """Give an axis the label, scale and limits of a score."""
    better = "lower is better" if metric.lower_is_better else "higher is better"
    label = f"{axis_label(metric)}\n({better})"
    limits = score_limits(metric, values)
    scale: Literal["log", "linear"] = "log" if is_log(metric) else "linear"
    if along == "x":
        axes.set(xscale=scale, xlim=limits)
        axes.set_xlabel(label, fontsize=9)
    else:
        axes.set(yscale=scale, ylim=limits)
        axes.set_ylabel(label, fontsize=9)
    if scale == "log":
        _label_logs(axes.xaxis if along == "x" else axes.yaxis, limits)


def parameter_label(name: str) -> str:
    """Return a parameter's name as an axis has it."""
    return "layer (decoder block, from 0)" if name == "layer" else name.replace("_", " ")


def parameter_place(report: Report, name: str) -> Callable[[float], float]:
    """Return where a value of a parameter lies on its axis: values of a list, at even distances."""
    listed = report.listed.get(name)
    if listed is None:
        return float
    ascending = sorted(listed)
    return lambda value: float(ascending.index(value))


def show_parameter(
    axes: Axes, report: Report, name: str, values: Sequence[float], *, along: Literal["x", "y"]
) -> None:
    """Give an axis the label and scale of a parameter, as it was searched."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    scale = " (log scale)" if name in report.log_scale else ""
    axis.set_label_text(parameter_label(name) + scale, fontsize=9)
    set_limits = axes.set_xlim if along == "x" else axes.set_ylim
    if name in report.listed:
        ascending = sorted(report.listed[name])
        axis.set_ticks(range(len(ascending)), labels=[f"{value:g}" for value in ascending])
        set_limits(-0.5, len(ascending) - 0.5)
    elif name in report.log_scale:
        (axes.set_xscale if along == "x" else axes.set_yscale)("log")
        limits = _log_limits(min(values), max(values))
        set_limits(limits)
        _label_logs(axis, limits)
    elif all(isinstance(value, int) for value in values):
        axis.set_major_locator(MaxNLocator(integer=True))
        set_limits(min(values) - 0.6, max(values) + 0.6)
    axis.set_tick_params(which="both", labelsize=SMALL)


def _log_limits(low: float, high: float) -> tuple[float, float]:
    """Return limits beyond two values, far enough apart for two of the ticks between decades."""
    factor = max((high / low) ** _PAD, math.sqrt(_LEAST_SPAN * low / high))
    return low / factor, high * factor


def _label_logs(axis: Axis, limits: tuple[float, float]) -> None:
    """Label as many ticks of a logarithmic axis as there is room for, as plain numbers."""
    span = limits[1] / limits[0]
    shown = range(1, 10) if span < 5 else (1, 2, 5) if span < 50 else ()

    def label(value: float, _place: int | None) -> str:
        return f"{value:g}" if round(value / 10 ** math.floor(math.log10(value))) in shown else ""

    axis.set_minor_formatter(FuncFormatter(label) if shown else NullFormatter())
    if shown:
        axis.set_major_formatter(FuncFormatter(label))
    axis.set_tick_params(which="both", labelsize=SMALL)


def is_log(metric: Metric) -> bool:
    """Say whether a score runs over orders of magnitude, as perplexity does."""
    return metric.low > 0 and math.isinf(metric.high)


def metrics_of(report: Report) -> tuple[Metric, Metric]:
    """Return the two scores that pictures set against each other."""
    first, second = report.goal.shown
    return METRICS[first], METRICS[second]


def metric_of(name: str) -> Callable[[TrialRow], float]:
    """Return the function that gives a trial's score."""
    return lambda row: row.scores[name]

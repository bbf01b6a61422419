"""What the interactive pictures of a search share.

Colours are Okabe and Ito's; shapes of markers tell apart in grey. Plotly reads some HTML in its
texts, so what comes from outside is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lunar_tune.metrics.goal import score_label
from lunar_tune.metrics.names import METRICS
from lunar_tune.study.rows import HEADLINE_SCORES, TrialRow

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GROUPS",
    "VERMILION",
    "Interactive",
    "add_best",
    "add_trials",
    "are_known",
    "hover_text",
    "is_wide",
    "limits_of",
    "log_axis",
    "new_figure",
    "range_of",
    "score_axis",
    "whole_axis",
]

BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
GROUPS = ((True, "feasible", BLUE, "circle"), (False, "infeasible", VERMILION, "x"))
# From this ratio of the greatest to the least value on, an axis is logarithmic.
_LOG_FROM = 30.0


@dataclass(frozen=True, slots=True)
class Interactive:
    """A picture with the words that stand over it."""

    name: str
    """One word, for the page's markup."""
    title: str
    caption: str
    figure: Any
    """A figure of `plotly.graph_objects`."""


def score_axis(name: str) -> str:
    """Return a score's name with its unit and its better direction, as an axis needs it."""
    metric = METRICS[name]
    recall = " recall" if metric.quantity.startswith("rouge") else ""
    unit = " (%)" if name == "deviation_score" else ""
    better = "lower" if metric.lower_is_better else "higher"
    return f"{score_label(name)}{recall}{unit}, {better} is better"


def new_figure(figure: Any = None) -> Any:
    """Return a figure of this page's looks."""
    import plotly.graph_objects as go

    figure = figure or go.Figure()
    figure.update_layout(
        template="simple_white",
        height=480,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        font={"size": 13, "color": "#222"},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        hovermode="closest",
    )
    return figure


def add_trials(
    figure: Any,
    rows: Sequence[TrialRow],
    x: Sequence[float],
    y: Sequence[float],
    *,
    name: str,
    colour: str,
    symbol: str,
    row: int | None = None,
    col: int | None = None,
) -> None:
    """Add a point a trial, to one of several panels perhaps; one of them has the legend's entry."""
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"symbol": symbol, "color": colour, "size": 9},
        customdata=[one.number for one in rows],
        hovertext=[hover_text(one) for one in rows],
        hoverinfo="text",
        name=name,
        legendgroup=name,
        showlegend=(row or 1, col or 1) == (1, 1),
        row=row,
        col=col,
    )


def add_best(
    figure: Any,
    x: float,
    y: float,
    *,
    name: str,
    row: int | None = None,
    col: int | None = None,
) -> None:
    """Add the star of the confirmed best trial."""
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        marker={
            "symbol": "star",
            "color": GREEN,
            "size": 17,
            "line": {"color": BLACK, "width": 1.5},
        },
        hoverinfo="skip",
        name=name,
        legendgroup="best",
        showlegend=(row or 1, col or 1) == (1, 1),
        row=row,
        col=col,
    )


def hover_text(row: TrialRow) -> str:
    """Return a trial's setting and scores in lines."""
    setting = [
        f"{name.replace('_', ' ')} {_brief(value)}" for name, value in row.parameters.items()
    ]
    scores = [
        f"{score_label(name)} {row.scores[name]:.3f}"
        for name in HEADLINE_SCORES
        if name in row.scores
    ]
    return "<br>".join(map(html.escape, [f"trial {row.number}", *setting, *scores]))


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def range_of(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the range of a score's axis, in plotly's terms: logarithms where it is logarithmic."""
    metric = METRICS[name]
    if (metric.low, metric.high) == (0.0, 1.0) or not values:
        return {"type": "linear", "range": _padded(0.0, 1.0)}
    if is_wide(values):
        logs = [math.log10(value) for value in values]
        return {"type": "log", "range": _padded(min(logs), max(logs))}
    return {"type": "linear", "range": _padded(min(values), max(values))}


def _padded(low: float, high: float) -> list[float]:
    room = 0.04 * (high - low or 1.0)
    return [low - room, high + room]


def limits_of(axis: Mapping[str, Any]) -> list[float]:
    """Return the ends of an axis as values."""
    return [10**end if axis["type"] == "log" else end for end in axis["range"]]


def is_wide(values: Sequence[float]) -> bool:
    """Say whether values are better seen on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= _LOG_FROM


def whole_axis(values: Sequence[int]) -> dict[str, Any]:
    """Return an axis of whole numbers with at most about ten ticks."""
    low, high = min(values), max(values)
    return {"range": [low - 0.5, high + 0.5], "dtick": max(1, math.ceil((high - low) / 10))}


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis whose ticks are whole numbers: 1e-3, 2e-3, 5e-3."""
    low, high = min(values), max(values)
    room = max(0.04 * math.log10(high / low), 0.05)
    ends = [math.log10(low) - room, math.log10(high) + room]
    decades = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    span = ends[1] - ends[0]
    digits = range(1, 10) if span < 0.7 else (1, 2, 5) if span < 3 else (1,)
    ticks = [(decade, digit) for decade in decades for digit in digits]
    return {
        "type": "log",
        "range": ends,
        "tickvals": [float(f"{digit}e{decade}") for decade, digit in ticks],
        "ticktext": [
            f"{digit}e{decade}" if not -2 <= decade <= 3 else f"{float(f'{digit}e{decade}'):g}"
            for decade, digit in ticks
        ],
    }


def are_known(scores: Mapping[str, float], *names: str) -> bool:
    """Say whether scores were measured and are finite."""
    return all(name in scores and math.isfinite(scores[name]) for name in names)

"""All parameters and scores of a search side by side, for the mouse."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from lunar_tune.metrics.goal import score_label
from lunar_tune.metrics.names import METRICS
from lunar_tune.report.interactive.style import (
    BLUE,
    GREEN,
    Interactive,
    are_known,
    hover_text,
    is_wide,
    new_figure,
)
from lunar_tune.report.report import Report
from lunar_tune.study.rows import HEADLINE_SCORES, TrialRow, is_number

__all__ = ["side_by_side"]

# More lines than this are drawn thinner.
_MANY = 60


def side_by_side(report: Report, rows: Sequence[TrialRow]) -> Interactive:
    """Draw a line a trial across all parameters and scores.

    Plotly has such a picture, on WebGL, whose library makes code out of text: a page that forbids
    that cannot show it, and paper shows it badly.
    """
    names = [name for name in rows[0].parameters if all(name in r.parameters for r in rows)]
    scores = [
        name
        for name in dict.fromkeys((*HEADLINE_SCORES, *report.goal.metrics))
        if any(are_known(row.scores, name) for row in rows)
    ]
    axes = [
        *(_axis(name.replace("_", " "), [row.parameters[name] for row in rows]) for name in names),
        *(_score_axis(name, [_finite(row, name) for row in rows]) for name in scores),
    ]
    figure = new_figure()
    _draw_axes(figure, axes)
    best = report.best.number if report.best is not None else None
    for style, label, members in (
        (("#8a8a8a", 1, "dot", "x"), "infeasible", [r for r in rows if r.feasible is False]),
        ((BLUE, 1.5, "solid", "circle"), "feasible", [r for r in rows if r.feasible]),
        ((GREEN, 4, "solid", "star"), "best", [r for r in rows if r.number == best]),
    ):
        if members:
            _lines(figure, rows, axes, members, style=style, name=f"{label} ({len(members)})")
    figure.update_xaxes(
        tickvals=[*range(len(axes))],
        ticktext=[axis.label.replace(" ", "<br>") for axis in axes],
        range=[-0.4, len(axes) - 0.6],
        showline=False,
        ticks="",
    )
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    caption = "A line is a trial. Least and greatest value stand at the ends of each axis."
    return Interactive("parallel", "Parameters and scores side by side", caption, figure)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One of several axes side by side."""

    label: str
    places: Sequence[float | None]
    """Place of each trial, between 0 and 1; None where nothing was measured."""
    marks: Mapping[float, str]
    """What is written at which place."""


def _axis(label: str, values: Sequence[Any]) -> _Axis:
    """Return an axis for values; names become places in their sorted order."""
    known = [value for value in values if value is not None]
    if not all(is_number(value) for value in known):
        names = sorted({str(value) for value in known})
        at = {name: _share(place, 0, len(names) - 1) for place, name in enumerate(names)}
        marks = {at[n] if len(names) > 1 else 0.0: html.escape(n) for n in names}
        return _Axis(html.escape(label), [at[str(value)] for value in values], marks)
    low, high = min(known), max(known)
    if is_wide(known):
        logs = [None if value is None else math.log10(value) for value in values]
        shares = [_share(value, math.log10(low), math.log10(high)) for value in logs]
        return _Axis(f"{html.escape(label)} (log)", shares, _ends(low, high))
    shares = [_share(value, low, high) for value in values]
    return _Axis(html.escape(label), shares, _ends(low, high))


def _score_axis(name: str, values: Sequence[float | None]) -> _Axis:
    """Return an axis for a score: all that it can be where that is from 0 to 1."""
    metric, label = METRICS[name], score_label(name)
    if (metric.low, metric.high) != (0.0, 1.0):
        return _axis(label, values)
    return _Axis(label, values, {0.0: "0", 1.0: "1"})


def _ends(low: float, high: float) -> dict[float, str]:
    """Return what is written at an axis' ends; a lone value stands below its axis."""
    ends = {0.0: f"{low:.3g}"}
    return ends | ({1.0: f"{high:.3g}"} if low < high else {})


@overload
def _share(value: float, low: float, high: float) -> float: ...
@overload
def _share(value: float | None, low: float, high: float) -> float | None: ...
def _share(value: float | None, low: float, high: float) -> float | None:
    """Return where a value lies between two others; in the middle where they are one."""
    if value is None:
        return None
    return (value - low) / (high - low) if low < high else 0.5


def _finite(row: TrialRow, score: str) -> float | None:
    return row.scores[score] if are_known(row.scores, score) else None


def _lines(
    figure: Any,
    rows: Sequence[TrialRow],
    axes: Sequence[_Axis],
    members: Sequence[TrialRow],
    *,
    style: tuple[str, float, str, str],
    name: str,
) -> None:
    """Add the lines of some trials as one trace: a gap ends a line."""
    colour, width, dash, symbol = style
    thinner = 0.5 if len(members) > _MANY else 1.0
    place_of = {row.number: place for place, row in enumerate(rows)}
    gap = [None]
    ys: list[float | None] = []
    for row in members:
        ys += [*(axis.places[place_of[row.number]] for axis in axes), *gap]
    figure.add_scatter(
        x=[*range(len(axes)), *gap] * len(members),
        y=ys,
        mode="lines+markers",
        line={"color": colour, "width": width * thinner, "dash": dash},
        marker={"symbol": symbol, "size": 7 * thinner},
        customdata=[row.number for row in members for _ in range(len(axes) + 1)],
        hovertext=[text for row in members for text in [hover_text(row)] * (len(axes) + 1)],
        hoverinfo="text",
        name=name,
    )


def _draw_axes(figure: Any, axes: Sequence[_Axis]) -> None:
    """Draw the axes, and write what stands at their ends outside of where lines run."""
    figure.add_scatter(
        x=[x for place in range(len(axes)) for x in (place, place, None)],
        y=[0, 1, None] * len(axes),
        mode="lines",
        line={"color": "#444", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    outside = {0.0: -0.06, 1.0: 1.06}
    marks = [(x, y, text) for x, axis in enumerate(axes) for y, text in axis.marks.items()]
    figure.add_scatter(
        x=[x for x, _, _ in marks],
        y=[outside.get(y, y) for _, y, _ in marks],
        text=[text if y in outside else f"  {text}" for _, y, text in marks],
        textposition=["middle center" if y in outside else "middle right" for _, y, _ in marks],
        mode="text",
        hoverinfo="skip",
        showlegend=False,
    )

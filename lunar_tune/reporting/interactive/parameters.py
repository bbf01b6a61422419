"""Interactive pictures of what parameters do.

Covers: forget and retain ROUGE-1 over layer and coefficient and over the learning rate; all
parameters and scores side by side.
Does not cover: scores against each other or over the trials (`trade_off`, `history`), how much
each parameter decides (`importance`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from lunar_tune.evaluation.goal import score_label
from lunar_tune.evaluation.metrics import METRICS
from lunar_tune.reporting.interactive.style import (
    BLACK,
    BLUE,
    GREEN,
    GROUPS,
    VERMILION,
    Interactive,
    add_best,
    add_trials,
    are_known,
    hover_text,
    is_wide,
    log_axis,
    new_figure,
    whole_axis,
)
from lunar_tune.reporting.places import offsets
from lunar_tune.reporting.report import Report
from lunar_tune.reporting.rows import HEADLINE_SCORES, TrialRow, is_number

__all__ = ["parameter_map", "sensitivity", "side_by_side"]

# More lines than this are drawn thinner.
_MANY = 60


def parameter_map(report: Report, rows: Sequence[TrialRow]) -> Interactive | None:
    """Draw forget and retain ROUGE-1 over layer and coefficient."""
    if not all(is_number(row.parameters.get(n)) for row in rows for n in ("layer", "coefficient")):
        return None
    from plotly.subplots import make_subplots

    scores = ("forget_rouge1", "retain_rouge1")
    titles = [score_label(name) for name in scores]
    figure = new_figure(
        make_subplots(cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.06)
    )
    layers = [row.parameters["layer"] for row in rows]
    heights = [row.parameters["coefficient"] for row in rows]
    is_logarithmic = "coefficient" in report.log_scale
    beside = offsets(layers, [math.log(one) for one in heights] if is_logarithmic else heights)
    places = [layer + offset for layer, offset in zip(layers, beside, strict=True)]
    for column, score in enumerate(scores, start=1):
        figure.add_scatter(
            x=places,
            y=heights,
            mode="markers",
            marker={
                "size": 10,
                "symbol": ["circle" if row.feasible else "x" for row in rows],
                "color": [row.scores.get(score) for row in rows],
                "coloraxis": "coloraxis",
                "line": {"color": BLACK, "width": 1},
            },
            customdata=[row.number for row in rows],
            hovertext=[hover_text(row) for row in rows],
            hoverinfo="text",
            showlegend=False,
            row=1,
            col=column,
        )
        _ring_best(figure, report, rows, list(zip(places, heights, strict=True)), column)
    _draw_bands(figure, layers)
    bar = {"title": {"text": "ROUGE-1<br>recall"}, "thickness": 14}
    figure.update_layout(
        coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    figure.update_xaxes(title_text="layer (from 0)", **whole_axis(layers))
    figure.update_yaxes(**(log_axis(heights) if is_logarithmic else {}))
    figure.update_yaxes(title_text="coefficient", col=1)
    caption = "Circles are feasible, crosses are not. Dark is low, light is high."
    if any(beside):
        caption += " Marks of a layer stand beside each other."
    return Interactive("map", "Layer and coefficient", caption, figure)


def _ring_best(
    figure: Any,
    report: Report,
    rows: Sequence[TrialRow],
    places: Sequence[tuple[float, float]],
    column: int,
) -> None:
    """Draw a ring around the confirmed best trial, in red, which no trial has."""
    best = report.best
    at = [p for row, p in zip(rows, places, strict=True) if best and row.number == best.number]
    if best is None or not at:
        return
    figure.add_scatter(
        x=[at[0][0]],
        y=[at[0][1]],
        mode="markers",
        marker={
            "symbol": "circle-open",
            "color": VERMILION,
            "size": 20,
            "line": {"width": 3},
        },
        hoverinfo="skip",
        name=f"best: trial {best.number}",
        legendgroup="best",
        showlegend=column == 1,
        row=1,
        col=column,
    )


def _draw_bands(figure: Any, layers: Sequence[float]) -> None:
    """Shade every other layer's column, so that it is seen which layer a mark belongs to."""
    for layer in range(math.floor(min(layers)), math.ceil(max(layers)) + 1):
        if layer % 2:
            ends = {"x0": layer - 0.5, "x1": layer + 0.5}
            looks = {"fillcolor": "#d9d9d9", "line_width": 0, "layer": "below"}
            figure.add_vrect(**ends, **looks, row="all", col="all")


def sensitivity(report: Report, rows: Sequence[TrialRow]) -> Interactive | None:
    """Draw forget and retain ROUGE-1 over the learning rate, or the closed form's ridge."""
    found = [
        name
        for name in ("learning_rate", "ridge")
        if all(is_number(row.parameters.get(name)) for row in rows)
    ]
    if not found:
        return None
    from plotly.subplots import make_subplots

    name = found[0]
    figure = new_figure(make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.05))
    values = [row.parameters[name] for row in rows]
    positive = min(values) > 0
    axis = log_axis(values) if positive else {}
    for panel, score in enumerate(("forget_rouge1", "retain_rouge1"), start=1):
        _draw_scores(figure, report, (name, score), rows, panel)
        figure.update_yaxes(title_text=score_label(score), range=[-0.06, 1.06], row=panel)
    label = name.replace("_", " ")
    figure.update_xaxes(**axis)
    figure.update_xaxes(title_text=f"{label} (log)" if positive else label, row=2)
    caption = "ROUGE-1 recall of each trial: above to be forgotten, below to be kept."
    return Interactive("sensitivity", f"Sensitivity to the {label}", caption, figure)


def _draw_scores(
    figure: Any, report: Report, axes: tuple[str, str], rows: Sequence[TrialRow], panel: int
) -> None:
    """Draw one score over a parameter, with its bounds and the best trial as searched."""
    name, score = axes
    known = [row for row in rows if are_known(row.scores, score)]
    for feasible, label, colour, symbol in GROUPS:
        mine = [row for row in known if row.feasible is feasible]
        x = [row.parameters[name] for row in mine]
        y = [row.scores[score] for row in mine]
        looks = {"name": label, "colour": colour, "symbol": symbol}
        add_trials(figure, mine, x, y, **looks, row=panel, col=1)
    values = [row.parameters[name] for row in rows]
    for one in report.goal.constraints:
        if one.metric == score:
            side = "at least" if one.sense == ">=" else "at most"
            figure.add_scatter(
                x=[min(values), max(values)],
                y=[one.bound] * 2,
                mode="lines",
                line={"color": "#555", "width": 1.5, "dash": "dash"},
                hoverinfo="skip",
                name=f"bound: {score_label(score)} {side} {one.bound:g}",
                row=panel,
                col=1,
            )
    best = report.best
    if best is not None and are_known(best.scores, score):
        title = f"best, as searched: trial {best.number}"
        x0, y0 = best.parameters[name], best.scores[score]
        add_best(figure, x0, y0, name=title, row=panel, col=1)


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
    """Of each trial, between 0 and 1; None where nothing was measured."""
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

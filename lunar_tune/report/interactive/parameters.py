"""Interactive pictures of what parameters do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lunar_tune.metrics.goal import score_label
from lunar_tune.report.axes import offsets
from lunar_tune.report.interactive.style import (
    BLACK,
    GROUPS,
    VERMILION,
    Interactive,
    add_best,
    add_trials,
    are_known,
    hover_text,
    log_axis,
    new_figure,
    whole_axis,
)
from lunar_tune.report.report import Report
from lunar_tune.study.rows import TrialRow, is_number

__all__ = ["parameter_map", "sensitivity"]


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

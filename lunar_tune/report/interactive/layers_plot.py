"""The curve that chooses layers, for the mouse."""

from __future__ import annotations

from lunar_tune.report.interactive.style import (
    BLUE,
    GREEN,
    VERMILION,
    Interactive,
    new_figure,
    whole_axis,
)
from lunar_tune.report.report import Report

__all__ = ["layers"]


def layers(report: Report) -> Interactive | None:
    """Draw how alike answers are to refusals and to the truth with each layer steered."""
    curve = report.layers
    if curve is None:
        return None
    figure = new_figure()
    # Line, marker and colour each tell the curves apart.
    for values, colour, dash, symbol, name in (
        (curve.refusal, BLUE, "dash", "circle", "s1: like refusals"),
        (curve.truth, VERMILION, "dashdot", "square", "s2: like the true answers"),
        (curve.scores, GREEN, "solid", "diamond", "s1 − s2"),  # noqa: RUF001 a minus sign
    ):
        figure.add_scatter(
            x=curve.layers,
            y=values,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"symbol": symbol, "size": 8},
            hovertext=[
                f"layer {layer}<br>{name} {value:.3f}"
                for layer, value in zip(curve.layers, values, strict=True)
            ],
            hoverinfo="text",
            name=name,
        )
    figure.add_scatter(
        x=[curve.layers[0] - 0.5, curve.layers[-1] + 0.5],
        y=[curve.unmodified] * 2,
        mode="lines",
        line={"color": "#555", "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
        name="s1 − s2, nothing added",  # noqa: RUF001
    )
    for layer in curve.recommended:
        figure.add_vrect(layer - 0.5, layer + 0.5, fillcolor="#ddd", line_width=0, layer="below")
    figure.update_xaxes(title_text="layer (decoder block, from 0)", **whole_axis(curve.layers))
    figure.update_yaxes(title_text="mean cosine similarity")
    caption = f"Shaded: the recommended layers; the best is {curve.best}."
    return Interactive("layers", "Scored layers", caption, figure)

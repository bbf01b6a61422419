"""Interactive pictures of what parameters do.

Covers: forget and retain ROUGE-1 over layer and coefficient and over the learning rate; all
parameters and scores side by side.
Does not cover: scores against each other or over the trials (`interactive`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from lunar_tune.evaluation.goal import Goal, score_label
from lunar_tune.reporting.interactive_style import (
    BLACK,
    BLUE,
    VERMILION,
    Interactive,
    are_known,
    hover_text,
    is_number,
    is_wide,
    new_figure,
    whole_step,
)
from lunar_tune.reporting.rows import HEADLINE_SCORES, TrialRow

__all__ = ["parameter_map", "sensitivity", "side_by_side"]


def parameter_map(rows: Sequence[TrialRow]) -> Interactive | None:
    """Draw forget and retain ROUGE-1 over layer and coefficient."""
    if not all(is_number(row.parameters.get(n)) for row in rows for n in ("layer", "coefficient")):
        return None
    from plotly.subplots import make_subplots

    scores = ("forget_rouge1", "retain_rouge1")
    titles = [score_label(name) for name in scores]
    figure = new_figure(
        make_subplots(cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.06)
    )
    for column, score in enumerate(scores, start=1):
        figure.add_scatter(
            x=[row.parameters["coefficient"] for row in rows],
            y=[row.parameters["layer"] for row in rows],
            mode="markers",
            marker={
                "size": 13,
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
    bar = {"title": {"text": "ROUGE-1<br>recall"}, "thickness": 14}
    figure.update_layout(
        coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    figure.update_xaxes(title_text="coefficient")
    figure.update_yaxes(dtick=whole_step([row.parameters["layer"] for row in rows]))
    figure.update_yaxes(title_text="layer (decoder block, from 0)", col=1)
    caption = "Circles are feasible, crosses are not. Dark is low, light is high."
    return Interactive("map", "Layer and coefficient", caption, figure)


def sensitivity(rows: Sequence[TrialRow]) -> Interactive | None:
    """Draw forget and retain ROUGE-1 over the learning rate, or the closed form's ridge."""
    found = [
        name
        for name in ("learning_rate", "ridge")
        if all(is_number(row.parameters.get(name)) for row in rows)
    ]
    if not found:
        return None
    name, figure = found[0], new_figure()
    for score, colour, symbol in (
        ("forget_rouge1", BLUE, "circle"),
        ("retain_rouge1", VERMILION, "square"),
    ):
        for feasible, suffix in ((True, ""), (False, "-open")):
            mine = [
                row for row in rows if row.feasible is feasible and are_known(row.scores, score)
            ]
            figure.add_scatter(
                x=[row.parameters[name] for row in mine],
                y=[row.scores[score] for row in mine],
                mode="markers",
                marker={"symbol": symbol + suffix, "color": colour, "size": 9},
                customdata=[row.number for row in mine],
                hovertext=[hover_text(row) for row in mine],
                hoverinfo="text",
                name=f"{score_label(score)}, {'feasible' if feasible else 'infeasible'}",
            )
    positive = all(row.parameters[name] > 0 for row in rows)
    label = name.replace("_", " ")
    figure.update_xaxes(
        title_text=f"{label} (log)" if positive else label,
        type="log" if positive else "linear",
        exponentformat="power",
    )
    figure.update_yaxes(title_text="ROUGE-1 recall", range=[-0.04, 1.04])
    caption = "Circles: questions to forget; squares: questions to keep. Filled is feasible."
    return Interactive("sensitivity", f"Sensitivity to the {label}", caption, figure)


def side_by_side(goal: Goal, rows: Sequence[TrialRow]) -> Interactive:
    """Draw a line a trial across all parameters and scores."""
    names = [name for name in rows[0].parameters if all(name in r.parameters for r in rows)]
    wanted = dict.fromkeys((*HEADLINE_SCORES, *goal.metrics))
    scores = [name for name in wanted if all(are_known(row.scores, name) for row in rows)]
    dimensions = [
        *(_dimension(name.replace("_", " "), [r.parameters[name] for r in rows]) for name in names),
        *(_dimension(score_label(name), [r.scores[name] for r in rows]) for name in scores),
    ]
    colour = goal.objective.metric if goal.objective.metric in scores else scores[0]
    figure = new_figure()
    figure.add_parcoords(
        dimensions=dimensions,
        line={
            "color": [row.scores[colour] for row in rows],
            "colorscale": "Cividis",
            "showscale": True,
            "colorbar": {"title": {"text": score_label(colour).replace(" ", "<br>", 1)}},
        },
        labelangle=-20,
        labelside="top",
    )
    figure.update_layout(margin={"l": 60, "r": 40, "t": 110, "b": 30})
    caption = "A line is a trial. Drag along an axis to keep the trials that pass there."
    return Interactive("parallel", "Parameters and scores side by side", caption, figure)


def _dimension(label: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return an axis of parallel coordinates; names become places in their sorted order."""
    label = html.escape(label)
    if not all(is_number(value) for value in values):
        names = sorted({str(value) for value in values})
        texts = [html.escape(name) for name in names]
        places = [names.index(str(value)) for value in values]
        return {"label": label, "values": places, "tickvals": [*range(len(names))]} | {
            "ticktext": texts
        }
    if is_wide(values):
        logs = [math.log10(value) for value in values]
        ticks = list(range(math.floor(min(logs)), math.ceil(max(logs)) + 1))
        texts = [f"1e{tick}" for tick in ticks]
        return {"label": label, "values": logs, "tickvals": ticks, "ticktext": texts} | {
            "range": [ticks[0], ticks[-1]]
        }
    whole = all(isinstance(value, int) for value in values)
    return {"label": label, "values": list(values), "tickformat": "d" if whole else ".3~g"}

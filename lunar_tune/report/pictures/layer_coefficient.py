"""The map of layer and coefficient: what each setting forgot and kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from lunar_tune.errors import InputError
from lunar_tune.metrics.names import Metric
from lunar_tune.report.axes import offsets
from lunar_tune.report.pictures.annotations import (
    axis_label,
    is_log,
    metrics_of,
    parameter_place,
    show_parameter,
    shown_rows,
)
from lunar_tune.report.pictures.figure import SMALL, Canvas, make_figure, show_legend
from lunar_tune.report.report import Report
from lunar_tune.study.rows import TrialRow

__all__ = ["layer_coefficient", "no_layer_coefficient"]

_COLOURS = "cividis"  # perceptually uniform, for the colour-blind too, and ascending in grey
_BAND = "0.94"


def no_layer_coefficient(report: Report) -> str | None:
    """Say why there is no such map; None if there is."""
    rows = shown_rows(report)
    for name in ("layer", "coefficient"):
        values = [row.parameters.get(name) for row in rows]
        if not all(isinstance(value, (int, float)) for value in values):
            return f"{name} is not one number in every trial"
        if len(set(values)) < 2:
            return f"no two completed trials differ in {name}"
    return None


def layer_coefficient(report: Report) -> Canvas:
    """Draw a panel for what is made good and one for what is kept.

    Raises:
        InputError: Layer and coefficient were not both searched, or are lists.
    """
    reason = no_layer_coefficient(report)
    if reason is not None:
        raise InputError(f"no map of layer and coefficient: {reason}.")
    metrics = metrics_of(report)
    figure, panels = make_figure(report.title, columns=2, width=8.4, height=4.8)
    rows = shown_rows(report)
    places = _places(report, rows)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw(axes, report, shown_rows(report, metric.name), metric, places)
    panels[1].set_ylabel("")
    if isinstance(engine := figure.get_layout_engine(), ConstrainedLayoutEngine):
        engine.set(wspace=0.06)  # keeps the first bar's label off the second panel
    show_legend(figure)
    return figure


def _places(report: Report, rows: Sequence[TrialRow]) -> dict[int, tuple[float, float]]:
    """Return where each trial stands, by its number."""
    column, place = parameter_place(report, "layer"), parameter_place(report, "coefficient")
    layers = [column(row.parameters["layer"]) for row in rows]
    heights = [place(row.parameters["coefficient"]) for row in rows]
    is_logarithmic = "coefficient" in report.log_scale
    beside = offsets(layers, [math.log(one) for one in heights] if is_logarithmic else heights)
    return {
        row.number: (layer + offset, height)
        for row, layer, offset, height in zip(rows, layers, beside, heights, strict=True)
    }


def _draw(
    axes: Axes,
    report: Report,
    rows: Sequence[TrialRow],
    metric: Metric,
    places: Mapping[int, tuple[float, float]],
) -> None:
    scores = [row.scores[metric.name] for row in rows]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    kind = LogNorm if is_log(metric) else Normalize
    norm = kind(low, high if high > low else low + 1.0)
    for feasible, marker in ((True, "o"), (False, "X")):
        mine = [row for row in rows if row.feasible is feasible]
        if mine:
            axes.scatter(
                [places[row.number][0] for row in mine],
                [places[row.number][1] for row in mine],
                s=46,
                c=[row.scores[metric.name] for row in mine],
                cmap=_COLOURS,
                norm=norm,
                marker=marker,
                edgecolors="black",
                linewidths=0.6,
                zorder=2,
            )
            label = f"{'feasible' if feasible else 'infeasible'} ({len(mine)})"
            axes.scatter([], [], s=46, marker=marker, c="0.8", edgecolors="black", label=label)
    if report.best is not None:
        x, y = places[report.best.number]
        axes.scatter(
            [x],
            [y],
            s=260,
            marker="o",
            facecolors="none",
            edgecolors="black",
            linewidths=1.6,
            path_effects=[withStroke(linewidth=4, foreground="white")],
            label=f"best: trial {report.best.number}",
            zorder=3,
        )
    layers = [int(row.parameters["layer"]) for row in rows]
    heights = [place[1] for place in places.values()]
    show_parameter(axes, report, "coefficient", heights, along="y")
    show_parameter(axes, report, "layer", layers, along="x")
    columns = {round(place[0]) for place in places.values()}
    for column in range(min(columns), max(columns) + 1):
        if column % 2:
            axes.axvspan(column - 0.5, column + 0.5, color=_BAND, lw=0, zorder=0)
    if any(place[0] != round(place[0]) for place in places.values()):
        axes.set_xlabel(
            f"{axes.get_xlabel()}\nmarks of a layer stand beside each other", fontsize=9
        )
    bar = axes.figure.colorbar(ScalarMappable(norm, _COLOURS), ax=axes, pad=0.02)
    bar.set_label(axis_label(metric), fontsize=9)
    bar.ax.tick_params(labelsize=SMALL)

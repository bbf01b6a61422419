"""The curve that chooses layers: how alike answers are to refusals and to the truth."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import MaxNLocator

from lunar_tune.errors import InputError
from lunar_tune.report.layer_curve import LayerCurve
from lunar_tune.report.pictures.figure import (
    BEST,
    FEASIBLE,
    INFEASIBLE,
    Canvas,
    make_figure,
    save_figure,
    show_legend,
)
from lunar_tune.report.report import Report

__all__ = ["curve_figure", "draw_layers", "layers", "no_layers"]


def no_layers(report: Report) -> str | None:
    """Say why there is no such picture; None if there is."""
    return "the search was not told to score layers" if report.layers is None else None


def layers(report: Report) -> Canvas:
    """Draw the curve that a search began with.

    Raises:
        InputError: It had none.
    """
    if report.layers is None:
        raise InputError(f"no curve over the layers: {no_layers(report)} (--layer-prior).")
    return curve_figure(report.layers, title=report.title)


def draw_layers(curve: LayerCurve, path: Path, *, title: str) -> None:
    """Write the curve's picture as PNG, or SVG by the file's suffix."""
    save_figure(curve_figure(curve, title=title), path)


def curve_figure(curve: LayerCurve, *, title: str) -> Canvas:
    """Draw a curve over layers."""
    figure, (axes,) = make_figure(title)
    for number, layer in enumerate(curve.recommended):
        axes.axvspan(
            layer - 0.5,
            layer + 0.5,
            color="0.9",
            lw=0,
            zorder=0,
            label="recommended" if number == 0 else None,
        )
    axes.axhline(
        curve.unmodified,
        color="0.4",
        lw=1,
        ls=":",
        label="s1 − s2, nothing added",  # noqa: RUF001
    )
    # Line, marker and colour each tell the curves apart.
    for values, colour, line, marker, width, label in (
        (curve.refusal, FEASIBLE, "--", "o", 1.3, "s1: like refusals"),
        (curve.truth, INFEASIBLE, "-.", "s", 1.3, "s2: like the true answers"),
        (curve.scores, BEST, "-", "D", 2.2, "s1 − s2"),  # noqa: RUF001 a minus sign
    ):
        axes.plot(
            curve.layers, values, color=colour, ls=line, marker=marker, lw=width, ms=5, label=label
        )
    axes.scatter(
        [curve.best],
        [curve.scores[curve.layers.index(curve.best)]],
        s=200,
        marker="*",
        c=BEST,
        edgecolors="black",
        label=f"best: layer {curve.best}",
        zorder=3,
    )
    axes.set_xlim(min(curve.layers) - 0.6, max(curve.layers) + 0.6)
    axes.set_xlabel("layer (decoder block, from 0)", fontsize=9)
    axes.set_ylabel("mean cosine similarity", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    show_legend(figure)
    return figure

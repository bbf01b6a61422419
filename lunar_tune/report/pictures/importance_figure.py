"""How much each parameter decides, as bars."""

from __future__ import annotations

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import score_label
from lunar_tune.report.pictures.figure import (
    FEASIBLE,
    INFEASIBLE,
    SMALL,
    Canvas,
    make_figure,
    show_legend,
)
from lunar_tune.report.report import Report

__all__ = ["importance", "no_importance"]

_LOOKS = ((FEASIBLE, ""), (INFEASIBLE, "///"))


def no_importance(report: Report) -> str | None:
    """Say why there is no such picture; None if there is."""
    if not report.importance():
        return "too few trials are completed, or their scores do not differ"
    return None


def importance(report: Report) -> Canvas:
    """Draw a bar for each parameter and score, the most important parameter on top.

    Raises:
        InputError: There are no shares.
    """
    reason = no_importance(report)
    if reason is not None:
        raise InputError(f"no importance of parameters: {reason}.")
    shares = report.importance()
    names = list(dict.fromkeys(name for one in shares.values() for name in one))
    names.sort(key=lambda name: sum(one.get(name, 0.0) for one in shares.values()))
    figure, (axes,) = make_figure(report.title, height=2.4 + 0.5 * len(names))
    thick = 0.8 / len(shares)
    for place, (metric, share) in enumerate(shares.items()):
        colour, hatch = _LOOKS[place % len(_LOOKS)]
        heights = [index + 0.4 - thick * (place + 0.5) for index in range(len(names))]
        bars = axes.barh(
            heights,
            [share.get(name, 0.0) for name in names],
            height=thick,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"of {score_label(metric)}",
        )
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=SMALL)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of the score's variance that the parameter alone explains", fontsize=9)
    show_legend(figure)
    return figure

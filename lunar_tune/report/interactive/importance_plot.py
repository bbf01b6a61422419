"""How much each parameter decides, for the mouse."""

from __future__ import annotations

from lunar_tune.metrics.goal import score_label
from lunar_tune.report.interactive.style import BLUE, VERMILION, Interactive, new_figure
from lunar_tune.report.report import Report

__all__ = ["importance"]

# Colours, and shapes that tell apart in grey.
_LOOKS = ((BLUE, ""), (VERMILION, "/"))


def importance(report: Report) -> Interactive | None:
    """Draw a bar for each parameter and score, the most important parameter on top."""
    shares = report.importance()
    if not shares:
        return None
    names = list(dict.fromkeys(name for one in shares.values() for name in one))
    names.sort(key=lambda name: -sum(one.get(name, 0.0) for one in shares.values()))
    figure = new_figure()
    for place, (metric, share) in enumerate(shares.items()):
        colour, shape = _LOOKS[place % len(_LOOKS)]
        values = [share.get(name, 0.0) for name in names]
        figure.add_bar(
            x=values,
            y=[name.replace("_", " ") for name in names],
            orientation="h",
            marker={"color": colour, "pattern": {"shape": shape}},
            text=[f"{value:.2f}" for value in values],
            textposition="outside",
            hoverinfo="skip",
            name=f"of {score_label(metric)}",
        )
    figure.update_layout(barmode="group", height=200 + 80 * len(names))
    figure.update_xaxes(title_text="share of the score's variance", range=[0, 1.1])
    figure.update_yaxes(autorange="reversed")
    caption = (
        "What each parameter explains by itself (fANOVA of the completed trials); what is missing "
        "to 1 is interaction."
    )
    return Interactive("importance", "Importance of parameters", caption, figure)

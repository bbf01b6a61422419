"""The charts of a search: one function each, for the page, the pictures and a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import altair as alt

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import METRICS, in_words, score_label
from lunar_tune.metrics.means import errors_of
from lunar_tune.report import belief_chart, marks, parameter_charts
from lunar_tune.study.rows import FAILED, TrialRow, best_so_far, is_number
from lunar_tune.study.stored_search import StoredSearch

_OPEN_SQUARE = "M-1,-1H1V1H-1ZM-.6,-.6V.6H.6V-.6Z"
_RING = "M-1,0A1,1,0,0,1,1,0A1,1,0,0,1,-1,0M-.9,0A.9,.9,0,0,0,.9,0A.9,.9,0,0,0,-.9,0"
_STEPS = "M-1.4,.7H-.1V-.7H1.4V-.45H.15V.95H-1.4Z"
# The ends of an axis, in pixels, by the side of a bound.
_ENDS: Mapping[str, Any] = {"x": {">=": "width", "<=": 0}, "y": {">=": 0, "<=": "height"}}
_TIMES = ((3 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (300, 60, "minutes"))


def trade_off(search: StoredSearch) -> alt.ConcatChart:
    """Draw the trials' two scores, the bounds, the Pareto front, the base model and the best.

    A trial that was stopped early stands at the mean of the retained questions that it was asked.
    """
    x, y = search.goal.shown
    rows = _completed(search, "trade-off", x, y)
    axes = marks.score_axis(alt.X, x), marks.score_axis(alt.Y, y)
    looks: dict[str, Any] = {"x": axes[0], "y": axes[1]}
    lower = METRICS[x].lower_is_better, METRICS[y].lower_is_better
    scores = [(row.scores[x], row.scores[y]) for row in rows]
    front = pareto_front(scores, lower_is_better=lower)
    member = marks.Mark(f"Pareto front ({len(front)})", marks.INK, _STEPS)

    def at(scores: Mapping[str, float]) -> dict[str, Any]:
        return {"x": scores[x], "y": scores[y]}

    rings = [marks.point(member, rows[place], **at(rows[place].scores)) for place in front]
    special = [
        marks.point(mark, row, scores, **at(scores))
        for mark, row, scores in _special(search)
        if is_number(scores.get(x)) and is_number(scores.get(y))
    ]
    steps = [scores[place] for place in front]
    dashed: dict[str, Any] = {"interpolate": "step-after", "strokeWidth": 1, "strokeDash": [2, 3]}
    ringed: dict[str, Any] = {"shape": alt.value(_RING), "color": alt.value(marks.INK)}
    layers = [
        *_feasible_region(search, *axes),
        *marks.bounds(search, x, axes[0]),
        *marks.bounds(search, y, axes[1]),
        marks.trial_points(search, rows, lambda row: at(row.scores), **looks),
        marks.line(member, steps, *axes, **dashed),
        marks.points(rings, size=220, keys=(), **looks, **ringed),
        marks.points(special, size=280, **marks.OUTLINED, **looks),
    ]
    best = search.confirmed or {}
    if (errors := errors_of(best)).keys() >= {x, y}:
        bars = marks.error_bars([(name, best[name], errors[name]) for name in (x, y)], *axes)
        layers.insert(-1, bars)
    return marks.frame(search.title, [layers], width=540, height=330)


def _completed(search: StoredSearch, what: str, *metrics: str) -> list[TrialRow]:
    """Return the completed trials whose scores are known, at least one."""
    rows = marks.completed(search, *metrics)
    if not rows:
        known = " and ".join(map(score_label, metrics))
        raise InputError(f"no picture of the {what}: no completed trial has {known}.")
    return rows


def _feasible_region(search: StoredSearch, x: alt.X, y: alt.Y) -> list[marks.Layer]:
    """Return where the bounds on both scores are kept; nothing without bounds."""
    corner: dict[str, float] = {}
    encodings: dict[str, Any] = {}
    for along, axis, metric in zip("xy", (x, y), search.goal.shown, strict=True):
        kept = [one for one in search.goal.constraints if one.metric == metric]
        for field, one in zip((along, f"{along}2"), kept, strict=False):
            corner[field] = one.bound
            encodings |= {along: axis, f"{along}2": f"{along}2"}
        if len(kept) == 1:
            encodings[f"{along}2"] = alt.value(_ENDS[along][kept[0].sense])
    rest = in_words(one for one in search.goal.constraints if one.metric not in search.goal.shown)
    mark = marks.Mark(
        f"feasible region{f' (also {rest}, not drawn)' if rest else ''}", marks.REGION, "square"
    )
    return [marks.shade(mark, [corner], **encodings)] if corner else []


def _special(
    search: StoredSearch,
) -> Iterator[tuple[marks.Mark, TrialRow | None, Mapping[str, float]]]:
    """Yield the scores that are marked by themselves, of the best with its trial."""
    yield marks.Mark("base model", marks.INK, _OPEN_SQUARE), None, search.baseline
    if search.best is not None and search.confirmed is not None:
        if search.held_out:
            mark = marks.Mark("base model, held out", marks.ORANGE, _OPEN_SQUARE)
            yield mark, None, search.baseline_in_full
        asked = "held out" if search.held_out else "confirmed"
        yield marks.best_mark(search.best, asked), search.best, search.confirmed


def pareto_front(
    points: Sequence[tuple[float, float]], *, lower_is_better: tuple[bool, bool]
) -> list[int]:
    """Return the indices of the points that no other beats, best first coordinate first.

    A point beats another if it is as good in both coordinates, which are finite, and better in
    one; equal points are all kept.
    """
    signs = [1.0 if low else -1.0 for low in lower_is_better]
    signed = [(signs[0] * x, signs[1] * y) for x, y in points]
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: signed[index]):
        last = signed[front[-1]] if front else None
        if last is None or signed[index][1] < last[1] or signed[index] == last:
            front.append(index)
    return front


def history(search: StoredSearch) -> alt.ConcatChart:
    """Draw the objective of every trial and the best feasible one so far, over trials and time.

    Shaded is where the best of the whole space lies by what was known before each trial.
    """
    score = search.goal.shown[0]
    rows = _completed(search, "course of the search", score)
    y = marks.score_axis(alt.Y, score)
    best = marks.Mark("best feasible so far", marks.GREEN, marks.LINE)
    enough = marks.Mark("enough: little more is to gain", marks.INK, marks.DASHES)

    def panel(x: alt.X, places: Mapping[int, float]) -> list[marks.Layer]:
        ordered = sorted((r for r in rows if r.number in places), key=lambda r: places[r.number])
        steps = [(places[row.number], one.scores[score]) for row, one in best_so_far(ordered)]
        likely = _likely(search, ordered, places, x, y)

        def at(row: TrialRow) -> dict[str, float]:
            return {"x": places[row.number], "y": row.scores[score]}

        trials = marks.trial_points(search, ordered, at, x=x, y=y)
        found = marks.line(best, steps, x, y, interpolate="step-after", strokeWidth=2.5)
        drawn = [*likely, trials, *([found] if steps else ())]
        if ordered and search.study.knows_enough:
            drawn.append(marks.rule(enough, places[ordered[-1].number], x))
        return drawn

    trials = marks.scale("linear", domain=[0, max(len(search.rows) - 1, 1)], padding=10)
    whole = alt.Axis(tickMinStep=1, format="d")
    x = alt.X("x:Q", title="trial (from 0)", scale=trials, axis=whole)
    panels = [panel(x, {row.number: row.number for row in rows})]
    failed = [row for row in search.rows if row.counts and row.state == FAILED]
    if failed:
        mark = marks.Mark(f"failed ({len(failed)})", marks.INK, "triangle-up")
        below = [marks.point(mark, row, x=row.number) for row in failed]
        panels[0].append(marks.points(below, x=x, y=alt.value("height")))
    unit, times = _times(search, rows)
    if times:
        title = f"{unit} since the first trial began"
        span = marks.scale("linear", domain=[0, max(times.values()) * 1.03 or 1.0])
        panels.append(panel(alt.X("x:Q", title=title, scale=span), times))
    return marks.frame(search.title, panels, width=300, height=250, columns=2)


def _likely(
    search: StoredSearch,
    ordered: Sequence[TrialRow],
    places: Mapping[int, float],
    x: alt.X,
    y: alt.Y,
) -> list[marks.Layer]:
    """Return the shade from the best so far to the least objective that is likely; or nothing."""
    sign = 1 if search.goal.objective.lower_is_better else -1
    band = [
        {
            "x": places[row.number],
            "y": sign * best.reached,
            "y2": sign * min(best.reached, row.outlook["least"]),
        }
        for row, best in best_so_far(ordered)
        if row.outlook
    ]
    mark = marks.Mark("best of the space, 95 % likely", marks.GREEN, "square")
    return [marks.band(mark, band, x, y)] if len(band) > 1 else []


def _times(search: StoredSearch, rows: Sequence[TrialRow]) -> tuple[str, dict[int, float]]:
    """Return when trials ended after the first began, by number, where known; and in which unit."""
    begun = min((row.started for row in search.rows if row.started is not None), default=None)
    ended = {row.number: row.ended for row in rows if row.ended is not None}
    if begun is None or not ended:
        return "seconds", {}
    seconds = {number: (end - begun).total_seconds() for number, end in ended.items()}
    span = max(seconds.values())
    unit, name = next(((u, name) for least, u, name in _TIMES if span >= least), (1, "seconds"))
    return name, {number: value / unit for number, value in seconds.items()}


def layers(search: StoredSearch) -> alt.ConcatChart:
    """Draw the curve over the layers that a search began with."""
    if search.layer_prior is None:
        raise InputError(
            "no curve over the layers: the search did not score layers (--layer-prior)."
        )
    return layer_curve(search.layer_prior, title=search.title)


def layer_curve(prior: Mapping[str, Any], *, title: str) -> alt.ConcatChart:
    """Draw, of a `LayerPrior`'s document, how alike answers are to refusals and to the truth."""
    whole = alt.Axis(tickMinStep=1, format="d")
    span = marks.scale("linear", padding=16)
    x = alt.X("x:Q", title="layer (decoder block, from 0)", axis=whole, scale=span)
    y = alt.Y("y:Q", title="mean cosine similarity", scale=alt.Scale(zero=False))
    base = marks.Mark("s1 − s2 of the base model", marks.INK, marks.LINE)  # noqa: RUF001 a minus sign
    shaded = [{"x": layer - 0.5, "x2": layer + 0.5} for layer in prior["recommended"]]
    drawn = [
        marks.shade(marks.Mark("recommended", marks.REGION, "square"), shaded, x=x, x2="x2"),
        marks.rule(base, prior["base_model"]["score"], y),
    ]
    # Line, mark and colour each tell the curves apart.
    for label, colour, shape, dash, score in (
        ("s1: like refusals", marks.BLUE, "circle", [6, 3], "s1"),
        ("s2: like the true answers", marks.VERMILION, "square", [6, 2, 1, 2], "s2"),
        ("s1 − s2", marks.GREEN, "diamond", [1, 0], "score"),  # noqa: RUF001
    ):
        mark = marks.Mark(label, colour, shape)
        places = [(one["layer"], one[score]) for one in prior["layers"]]
        drawn.append(marks.line(mark, places, x, y, strokeDash=dash))
        drawn.append(marks.points([marks.point(mark, x=a, y=b) for a, b in places], x=x, y=y))
    highest = next(one for one in prior["layers"] if one["layer"] == prior["best"])
    best = marks.Mark(f"best: layer {highest['layer']}", marks.GREEN, marks.STAR)
    star = marks.point(best, x=highest["layer"], y=highest["score"])
    drawn.append(marks.points([star], size=280, **marks.OUTLINED, x=x, y=y))
    return marks.frame(title, [drawn], width=540, height=300)


CHARTS: Mapping[Callable[..., alt.ConcatChart], str] = {
    trade_off: "what is forgotten against what is kept",
    history: "best feasible so far, over trials and time",
    parameter_charts.layer_coefficient: "layer and coefficient",
    belief_chart.beliefs: "what the trials say of layers and coefficients that were not tried",
    parameter_charts.sensitivity: "sensitivity to the learning rate or its counterpart",
    parameter_charts.parameters: "the objective over each parameter",
    parameter_charts.importance: "importance of the parameters",
    layers: "similarities that choose a layer",
}
"""Captions by what draws a chart, or raises an InputError where there is nothing to draw."""


def charts_of(search: StoredSearch) -> Iterator[tuple[str, str, alt.ConcatChart]]:
    """Yield the charts that a search has, each after its name and caption."""
    for draw, caption in CHARTS.items():
        with suppress(InputError):
            yield draw.__name__, caption, draw(search)


def write_charts(search: StoredSearch, folder: Path) -> dict[str, str]:
    """Write a search's charts as PNG and SVG; return captions by the PNGs beside the folder."""
    captions = {}
    for name, caption, chart in charts_of(search):
        marks.save_chart(chart, *(folder / f"{name}{suffix}" for suffix in marks.PICTURE_SUFFIXES))
        captions[f"{folder.name}/{name}.png"] = caption
    return captions

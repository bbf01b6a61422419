"""The charts of what parameters do: layer and coefficient, sensitivity, and all side by side."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import METRICS, score_label
from lunar_tune.report import marks
from lunar_tune.study.rows import TrialRow, is_number
from lunar_tune.study.stored_search import StoredSearch

_RING = "M-1,0A1,1,0,0,1,1,0A1,1,0,0,1,-1,0M-.8,0A.8,.8,0,0,0,.8,0A.8,.8,0,0,0,-.8,0"
_FIRST, _LAST = ("learning_rate", "ridge"), ("coefficient", "layer")  # these two have a map
_NEAR = 0.05  # of a score's range


def layer_coefficient(search: StoredSearch) -> alt.ConcatChart:
    """Draw the map of layer and coefficient: a panel for each of the two scores."""
    rows = mapped_rows(search)
    columns: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        columns[row.parameters["layer"]].append(row.number)
    places = search.study.listed.get("layer") or range(min(columns), max(columns) + 1)
    title = ["layer (decoder block, from 0)"]
    if any(len(column) > 1 for column in columns.values()):
        title.append("trials of a layer stand beside each other")
    x = alt.X(
        "x:O",
        title=title,
        scale=alt.Scale(domain=sorted(places)),
        axis=alt.Axis(labelAngle=0, labelOverlap=True, grid=True, tickBand="extent"),
    )
    coefficients = [row.parameters["coefficient"] for row in rows]
    y = marks.parameter_axis(alt.Y, search, "coefficient", coefficients)
    offset = alt.XOffset("beside:Q", scale=alt.Scale(domain=[0, 1]))
    looks: dict[str, Any] = {"x": x, "y": y, "xOffset": offset, "keys": ["shape"]}
    best = [] if search.best is None else [search.best]
    ring = marks.Mark(f"best: trial {best[0].number}" if best else "", marks.INK, _RING)

    def at(row: TrialRow) -> dict[str, Any]:
        layer, coefficient = row.parameters["layer"], row.parameters["coefficient"]
        column = columns[layer]
        beside = (column.index(row.number) + 0.5) / len(column)
        return {"x": layer, "y": coefficient, "beside": beside}

    def panel(score: str) -> list[marks.Layer]:
        bar = alt.Legend(title=score_label(score), orient="top", type="symbol", columns=0)
        scored = marks.trial_points(
            search,
            marks.completed(search, score),
            lambda row: at(row) | {"score": row.scores[score]},
            **looks,
            color=alt.Color(
                "score:Q", scale=marks.scale(marks.scale_of(score), scheme="cividis"), legend=bar
            ),
            **marks.OUTLINED,
        )
        around = [marks.point(ring, row, row.scores, **at(row)) for row in best]
        rings = marks.points(around, size=300, **looks, color=alt.value(marks.INK))
        return [scored, rings]

    panels = [panel(score) for score in search.goal.shown]
    chart = marks.frame(search.title, panels, width=300, height=270, columns=2)
    resolved: alt.ConcatChart = chart.resolve_scale(color="independent")
    return resolved


def mapped_rows(search: StoredSearch) -> list[TrialRow]:
    """Return the completed trials, each with one place on the map."""
    rows = marks.completed(search)
    for name in ("layer", "coefficient"):
        values = [row.parameters.get(name) for row in rows]
        what = "no map of layer and coefficient"
        if not all(isinstance(value, (int, float)) for value in values):
            raise InputError(f"{what}: {name} is not one number in every trial.")
        if len(set(values)) < 2:
            raise InputError(f"{what}: no two completed trials differ in {name}.")
    return rows


def _varied(search: StoredSearch, has_place: Callable[[Any], bool] = lambda _: True) -> list[str]:
    """Return the parameters in which completed trials differ and whose values all have a place."""
    rows = marks.completed(search)
    found = []
    for name in rows[0].parameters if rows else ():
        values = [row.parameters.get(name) for row in rows]
        if all(map(has_place, values)) and len({str(value) for value in values}) > 1:
            found.append(name)
    return found


def sensitivity(search: StoredSearch, parameter: str | None = None) -> alt.ConcatChart:
    """Draw both scores against a parameter, on the scale that it was searched on.

    None is the learning rate, or what the method has in its place.
    """
    names, name = _varied(search, is_number), parameter
    if parameter is None:
        rest = [one for one in names if one not in (*_FIRST, *_LAST)]
        name = next((one for one in (*_FIRST, *rest, *_LAST) if one in names), None)
    if name is None or name not in names:
        shown = "a number" if name is None else name
        there = ", ".join(names) or "none"
        raise InputError(f"no two completed trials differ in {shown}; those that vary: {there}.")
    pairs = [(name, score) for score in search.goal.shown]
    return _scores_over_parameters(search, pairs, width=540, columns=1)


def parameters(search: StoredSearch) -> alt.ConcatChart:
    """Draw the objective against each parameter that varies, names included."""
    pairs = [(name, search.goal.shown[0]) for name in _varied(search)]
    if len(pairs) < 2:
        raise InputError("no overview: completed trials differ in fewer than two parameters.")
    return _scores_over_parameters(search, pairs, width=300, columns=2)


def _scores_over_parameters(
    search: StoredSearch, pairs: Sequence[tuple[str, str]], *, width: int, columns: int
) -> alt.ConcatChart:
    """Draw a panel for each pair of a parameter and a score.

    Shaded is the range of the feasible trials whose objective is near the best one's.
    """
    best = [] if search.best is None else [search.best]
    margin, near = _near_best(search)
    label = f"range of trials that are feasible and within {margin:.2g} of the best"
    region = marks.Mark(f"{label} {score_label(search.goal.shown[0])}", marks.REGION, "square")

    def panel(name: str, score: str) -> list[marks.Layer]:
        values = [row.parameters[name] for row in marks.completed(search)]
        is_scale = all(map(is_number, values))
        x, y = marks.parameter_axis(alt.X, search, name, values), marks.score_axis(alt.Y, score)

        def at(row: TrialRow) -> dict[str, Any]:
            value = row.parameters[name]
            return {"x": value if is_scale else str(value), "y": row.scores[score]}

        span = {row.parameters[name] for row in near} if is_scale else set()
        ends = [{"x": min(span), "x2": max(span)}] if len(span) > 1 else []
        known = [row for row in best if is_number(row.scores.get(score))]
        stars = [
            marks.point(marks.best_mark(r, "as searched"), r, r.scores, **at(r)) for r in known
        ]
        return [
            *(marks.shade(region, [one], x=x, x2="x2") for one in ends),
            *marks.bounds(search, score, y),
            marks.trial_points(search, marks.completed(search, score), at, x=x, y=y),
            marks.points(stars, size=280, **marks.OUTLINED, x=x, y=y),
        ]

    panels = [panel(*pair) for pair in pairs]
    return marks.frame(search.title, panels, width=width, height=190, columns=columns)


def _near_best(search: StoredSearch) -> tuple[float, list[TrialRow]]:
    """Return .05 of the objective's range, and the feasible trials within it of the best one.

    Where a score has no end, what the trials reached is its range.
    """
    metric = METRICS[search.goal.shown[0]]
    rows = marks.completed(search, metric.name)
    scores = [row.scores[metric.name] for row in rows]
    span = metric.high - metric.low
    margin = _NEAR * (max(scores) - min(scores) if math.isinf(span) and scores else span)
    sign = 1.0 if metric.lower_is_better else -1.0
    feasible = [row for row in rows if row.feasible]
    least = min((sign * row.scores[metric.name] for row in feasible), default=0.0)
    end = least + margin * (1 + 1e-9)  # a score that lies at the margin is within
    return margin, [row for row in feasible if sign * row.scores[metric.name] <= end]


def importance(search: StoredSearch) -> alt.ConcatChart:
    """Draw a bar for each parameter and score, the most important parameter on top."""
    shares = search.importance
    if not shares:
        raise InputError(
            "no importance of parameters: too few trials are completed, or their scores do not "
            "differ."
        )
    names = list(dict.fromkeys(name for one in shares.values() for name in one))
    names.sort(key=lambda name: -sum(one.get(name, 0.0) for one in shares.values()))
    entries = [
        marks.Mark(f"of {score_label(score)}", colour, "square")
        for score, colour in zip(shares, (marks.BLUE, marks.ORANGE), strict=False)
    ]
    values = [
        {"parameter": name.replace("_", " "), "kind": entry.kind, "share": one.get(name, 0.0)}
        for entry, one in zip(entries, shares.values(), strict=True)
        for name in names
    ]
    bars = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X(
            "share:Q",
            title=["share of the score's variance", "that the parameter alone explains"],
            scale=alt.Scale(domain=[0, 1.1]),
            axis=alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1]),
        ),
        y=alt.Y("parameter:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)),
        yOffset=alt.YOffset("kind:N", sort=None),
    )
    numbers = bars.mark_text(align="left", dx=3, color=marks.INK)
    panel = [
        marks.Layer(chart=bars.mark_bar(), marks=entries, keys=["color"]),
        marks.Layer(chart=numbers.encode(text=alt.Text("share:Q", format=".2f"))),
    ]
    return marks.frame(search.title, [panel], width=480, height=30 + 44 * len(names))

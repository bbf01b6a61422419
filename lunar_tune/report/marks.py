"""What the charts share: marks and layers, axes, the frame, and the bytes of a picture.

Colours are Okabe and Ito's, which the colour-blind tell apart; shapes tell marks apart in grey.
Columns of a chart's data have names of this program alone: Vega reads dots and brackets in names.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import altair as alt
import vl_convert

from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import METRICS, in_words, score_label
from lunar_tune.metrics.means import error_name
from lunar_tune.study.rows import COMPLETE, HEADLINE_SCORES, TrialRow, is_number, shown_score
from lunar_tune.study.stored_search import StoredSearch

PICTURE_SUFFIXES = (".png", ".svg")
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The version that Altair writes for, as vl-convert names it."""

INK, BLUE, VERMILION, GREEN, ORANGE = "#222222", "#0072B2", "#D55E00", "#009E73", "#E69F00"
REGION = "#9CC4DE"  # drawn half transparent
ON_DARK: dict[str, Any] = {"stroke": alt.value("white"), "strokeWidth": alt.value(1.2)}
OUTLINED: dict[str, Any] = {"stroke": alt.value(INK), "strokeWidth": alt.value(0.8)}
STAR = "M0,-1L.24,-.32L.95,-.31L.38,.12L.59,.81L0,.4L-.59,.81L-.38,.12L-.95,-.31L-.24,-.32Z"
LINE = "M-1.4,-.2H1.4V.2H-1.4Z"
_CROSS = "M-1,-.7L-.7,-1L0,-.3L.7,-1L1,-.7L.3,0L1,.7L.7,1L0,.3L-.7,1L-1,.7L-.3,0Z"
DASHES = "M-1.4,-.15H-.6V.15H-1.4ZM-.4,-.15H.4V.15H-.4ZM.6,-.15H1.4V.15H.6Z"
_PLUS = "M-1,-.12H-.12V-1H.12V-.12H1V.12H.12V1H-.12V.12H-1Z"
_UNITS = {
    "rouge1": "recall",
    "rougeL": "recall",
    "log_prob": "[nats]",
    "answer_log_prob": "[nats a token]",
    "deviation_score": "[%]",
    "refusal_quality": "[cosine]",
}
_LABEL, _TITLE_LINES = 40, 3  # characters of a line of the legend; lines of a title
_LEGEND_CHARACTER, _LEGEND_KEY, _TITLE_CHARACTER = 5.5, 40.0, 7.0  # pixels, on the average
# vl-convert sets Arial in letters of the same widths; a browser has at least one of these.
_FONT = "Arial, Liberation Sans, Helvetica, sans-serif"
_TICKS = 5  # about as many labels has an axis
_SCALE = 1.6  # of a PNG's pixels to a chart's

Channel = TypeVar("Channel", alt.X, alt.Y)


@dataclass(frozen=True, slots=True)
class Mark:
    """An entry of a chart's legend."""

    label: str
    colour: str
    shape: str  # Vega's name of a shape, or the path of one

    @property
    def kind(self) -> str:
        """The label in lines; what its points have in the column `kind`."""
        return textwrap.fill(self.label, _LABEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Marks of one form, and their entries in the legend."""

    chart: alt.Chart
    marks: Sequence[Mark] = ()
    keys: Sequence[str] = ()  # the channels, colour and shape, that follow the column `kind`


def _data(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[dict(one) for one in values]))


def shade(mark: Mark, values: Sequence[Mapping[str, Any]], **encodings: Any) -> Layer:
    """Return shaded rectangles."""
    chart = _data(values).mark_rect(color=mark.colour, opacity=0.3)
    return Layer(chart=chart.encode(**encodings), marks=[mark])


def cells(values: Sequence[Mapping[str, Any]], **encodings: Any) -> Layer:
    """Return rectangles side by side, each with a colour of its own."""
    return Layer(chart=_data(values).mark_rect().encode(**encodings))


def band(mark: Mark, values: Sequence[Mapping[str, float]], x: alt.X, y: alt.Y) -> Layer:
    """Return the area between `y` and `y2` along `x`."""
    chart = _data(values).mark_area(color=mark.colour, opacity=0.2, interpolate="step-after")
    return Layer(chart=chart.encode(x=x, y=y, y2="y2"), marks=[mark])


def rule(mark: Mark, value: float, axis: alt.X | alt.Y) -> Layer:
    """Return a line across the chart at a value of an axis, dashed if its entry is."""
    chart = _data([{type(axis).__name__.lower(): value}])
    dash = [5, 3] if mark.shape == DASHES else [1, 0]
    return Layer(chart=chart.mark_rule(color=INK, strokeDash=dash).encode(axis), marks=[mark])


def line(
    mark: Mark, places: Sequence[tuple[float, float]], x: alt.X, y: alt.Y, **looks: Any
) -> Layer:
    """Return a line through places in their order."""
    values = [{"x": at, "y": height, "place": place} for place, (at, height) in enumerate(places)]
    chart = _data(values).mark_line(color=mark.colour, **looks)
    return Layer(chart=chart.encode(x, y, order="place:Q"), marks=[mark])


Point = tuple[Mark, dict[str, Any]]  # its entry in the legend, and its data


def point(
    mark: Mark, row: TrialRow | None = None, scores: Mapping[str, float] | None = None, **at: Any
) -> Point:
    """Return a point: its place, and what it says when it is pointed at or clicked."""
    known = [
        f"{score_label(name)} {shown_score(scores[name], scores.get(error_name(name)))}"
        for name in HEADLINE_SCORES
        if scores is not None and is_number(scores.get(name))
    ]
    what = mark.label if row is None else f"trial {row.number}: {row.label}"
    trial = {} if row is None else {"trial": row.number}
    return mark, {"kind": mark.kind, "says": "\n".join([what, *known]), **trial, **at}


def points(
    values: Sequence[Point],
    *,
    marks: Iterable[Mark] = (),
    size: float = 60,
    keys: Sequence[str] = ("color", "shape"),
    **encodings: Any,
) -> Layer:
    """Return points; `marks` are entries of the legend that come before those of the points."""
    chart = _data([data for _, data in values]).mark_point(filled=True, size=size, opacity=1)
    entries = dict.fromkeys([*marks, *(mark for mark, _ in values)])
    return Layer(chart=chart.encode(**encodings, tooltip="says:N"), marks=[*entries], keys=keys)


def error_bars(at: Sequence[tuple[str, float, float]], x: alt.X, y: alt.Y) -> Layer:
    """Return a cross of one standard error to each side of a point, no further than its scores go.

    Of each axis `at` has the score's name, its value and its error.
    """
    bars = []
    for along, (name, value, error) in zip("xy", at, strict=True):
        ends = max(METRICS[name].low, value - error), min(METRICS[name].high, value + error)
        fixed = {axis: place for axis, (_, place, _) in zip("xy", at, strict=True)}
        bars.append(
            {**fixed, "x2": fixed["x"], "y2": fixed["y"], along: ends[0], f"{along}2": ends[1]}
        )
    chart = _data(bars).mark_rule(color=GREEN, strokeWidth=2)
    return Layer(
        chart=chart.encode(x=x, x2="x2", y=y, y2="y2"),
        marks=[Mark("± standard error", GREEN, _PLUS)],
    )


def trial_points(
    search: StoredSearch,
    rows: Sequence[TrialRow],
    at: Callable[[TrialRow], Mapping[str, Any]],
    **looks: Any,
) -> Layer:
    """Return a point a trial of `rows`; the legend counts all completed ones.

    `at` gives a trial's place, and what else its data have; `looks` are what `points` takes.
    """
    feasible = [bool(row.feasible) for row in completed(search)]
    marks = {
        True: Mark(f"feasible ({feasible.count(True)})", BLUE, "circle"),
        False: Mark(f"infeasible ({feasible.count(False)})", VERMILION, _CROSS),
    }
    values = [point(marks[bool(row.feasible)], row, row.scores, **at(row)) for row in rows]
    return points(values, marks=[marks[one] for one in (True, False) if one in feasible], **looks)


def best_mark(row: TrialRow, how: str) -> Mark:
    """Return the entry of the best trial; `how` says of which evaluation its scores are."""
    return Mark(f"best, {how}: trial {row.number}, {row.label}", GREEN, STAR)


def bounds(search: StoredSearch, metric: str, axis: alt.X | alt.Y) -> list[Layer]:
    """Return a line at each bound of a score along its axis."""
    return [
        rule(Mark(f"constraint: {in_words([one])}", INK, DASHES), one.bound, axis)
        for one in search.goal.constraints
        if one.metric == metric
    ]


def completed(search: StoredSearch, *metrics: str) -> list[TrialRow]:
    """Return the completed trials of which the scores are known, by number."""
    return [
        row
        for row in search.rows
        if row.state == COMPLETE
        if all(math.isfinite(row.scores.get(name, math.nan)) for name in metrics)
    ]


def scale_of(name: str) -> Literal["log", "linear"]:
    """Return the scale of a score; perplexity runs over orders of magnitude."""
    metric = METRICS[name]
    return "log" if metric.low > 0 and math.isinf(metric.high) else "linear"


def scale(kind: Literal["log", "linear"], **more: Any) -> alt.Scale:
    """Return a scale that ends at its data and not at 0."""
    return alt.Scale(
        type=kind, nice=False, zero=False if kind == "linear" else alt.Undefined, **more
    )


def score_axis(channel: type[Channel], name: str) -> Channel:
    """Return the axis of a score: its unit, its better direction, all of 0 to 1 if it is that."""
    metric = METRICS[name]
    better = "lower" if metric.lower_is_better else "higher"
    title = f"{score_label(name)} {_UNITS.get(metric.quantity, '')}".strip()
    domain = [0, 1] if (metric.low, metric.high) == (0.0, 1.0) else alt.Undefined
    axis = alt.Axis(labelOverlap=True, tickCount=_TICKS)
    field = f"{channel.__name__.lower()}:Q"
    return channel(
        field,
        title=[title, f"({better} is better)"],
        scale=scale(scale_of(name), domain=domain, padding=10),
        axis=axis,
    )


def parameter_axis(
    channel: type[Channel], search: StoredSearch, name: str, values: Sequence[Any]
) -> Channel:
    """Return the axis of a parameter on the scale that it was searched on.

    Values of a list and names stand at even distances.
    """
    field, kind = channel.__name__.lower(), search.study.distributions.get(name)
    title = "layer (decoder block, from 0)" if name == "layer" else name.replace("_", " ")
    if name in search.study.listed or not all(map(is_number, values)):
        listed = search.study.listed.get(name)
        places: list[Any] = sorted(listed or {str(value) for value in values})
        form = "~g" if listed else alt.Undefined
        axis = alt.Axis(labelAngle=0, labelLimit=90, labelOverlap=True, format=form)
        return channel(f"{field}:O", title=title, scale=alt.Scale(domain=places), axis=axis)
    is_log, is_whole = getattr(kind, "log", False), all(isinstance(one, int) for one in values)
    ticks = alt.Axis(
        tickCount=_TICKS,
        labelOverlap="greedy",
        labelSeparation=8,
        tickMinStep=1 if is_whole else alt.Undefined,
        format="~g" if is_log else alt.Undefined,
    )
    return channel(
        f"{field}:Q",
        title=title + (" (log scale)" if is_log else ""),
        scale=scale("log" if is_log else "linear", padding=16),
        axis=ticks,
    )


def frame(
    title: str, panels: Sequence[Sequence[Layer]], *, width: int, height: int, columns: int = 1
) -> alt.ConcatChart:
    """Return panels, each of so many pixels, under a title and over one legend.

    A layer that comes first lies below. What is too long of the title is broken or left out.
    """
    marks = list(dict.fromkeys(mark for panel in panels for one in panel for mark in one.marks))
    kinds = [mark.kind for mark in marks]
    legend = alt.Legend(title=None, labelExpr="split(datum.label, '\\n')")
    colours = alt.Scale(domain=kinds, range=[mark.colour for mark in marks])
    shapes = alt.Scale(domain=kinds, range=[mark.shape for mark in marks])
    keys: dict[str, Any] = {
        "color": alt.Color("kind:N", scale=colours, legend=legend),
        "shape": alt.Shape("kind:N", scale=shapes, legend=legend),
    }
    drawn = [
        [one.chart.encode(**{key: keys[key] for key in one.keys}) for one in panel]
        for panel in panels
    ]
    room = columns * width + 40  # an axis's labels are beside a panel
    lines = textwrap.wrap(
        title, int(room / _TITLE_CHARACTER), max_lines=_TITLE_LINES, placeholder=" …"
    )
    longest = max((len(row) for kind in kinds for row in kind.splitlines()), default=0)
    entries = int(room / (longest * _LEGEND_CHARACTER + _LEGEND_KEY))
    return alt.concat(
        *(alt.layer(*layers, width=width, height=height) for layers in drawn),
        columns=columns,
        spacing=24,
        title=alt.Title(lines, anchor="start", fontSize=13, limit=room),
        config=alt.Config(
            font=_FONT,
            legend=alt.LegendConfig(
                orient="bottom",
                columns=max(1, min(4, entries)),
                labelLimit=room,
                symbolSize=110,
                labelFontSize=11,
                titleFontWeight="normal",
            ),
            axis=alt.AxisConfig(titleFontWeight="normal", labelFontSize=10, titleFontSize=11),
        ),
    )


def save_chart(chart: alt.ConcatChart, *paths: Path) -> None:
    """Write a chart as PNG, or as SVG where a file's name says so; the same bytes every time."""
    spec = chart.to_dict()
    for path in paths:
        if path.suffix.lower() == ".svg":
            content = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode()
        else:
            content = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=_SCALE)
        write_atomically(path, content)

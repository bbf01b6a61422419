"""Pictures: what is drawn is what the rows say, and it can be read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from invented_searches import CURVE, IMPORTANCE, LONG, failed, report_of, search_of, trial
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.pareto import pareto_front
from lunar_tune.report.pictures.figure import PICTURE_SUFFIXES
from lunar_tune.report.pictures.history_figure import history
from lunar_tune.report.pictures.importance_figure import importance
from lunar_tune.report.pictures.layer_coefficient import layer_coefficient
from lunar_tune.report.pictures.layers_figure import draw_layers, layers
from lunar_tune.report.pictures.pictures import PICTURES, write_pictures
from lunar_tune.report.pictures.sensitivity import sensitivity, swept_parameter
from lunar_tune.report.pictures.trade_off_figure import trade_off
from lunar_tune.report.report import Report
from lunar_tune.study.rows import COMPLETE, TrialRow

GOAL = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])
FULL = {"importance": lambda: IMPORTANCE, "layers": CURVE}
POINT = {"layer": 9, "coefficient": 2.0, "learning_rate": 0.003}
SEARCHES = {
    "of 6": search_of(6, **FULL),
    "of 30": search_of(30, **FULL),
    "of 300 and a long name": search_of(300, title=LONG, **FULL),
    "of one word that does not end": search_of(12, title="W" * 200, **FULL),
    "of another goal": search_of(
        30, objective="forget_log_prob", constraints=["retain_perplexity<=3", "retain_rouge1>=0.5"]
    ),
    "without bounds": search_of(30, constraints=[]),
    "to raise what is kept": search_of(
        30, objective="retain_rouge1", constraints=["forget_rouge1<=0.2"]
    ),
    "without a trial": report_of([], goal=GOAL),
    "of failures": report_of([failed(0), failed(1)], goal=GOAL),
    "of one trial": report_of([trial(0, 0.2, 0.9, POINT, GOAL)], goal=GOAL),
    "of infeasible trials": report_of(
        [trial(n, 0.1, 0.3 + n / 100, POINT | {"layer": n}, GOAL) for n in range(5)], goal=GOAL
    ),
    "of equal trials": report_of([trial(n, 0.5, 0.9, POINT, GOAL) for n in range(5)], goal=GOAL),
    "of near rates": report_of(
        [trial(n, 0.5, 0.9, {"learning_rate": 0.0031 + n / 1e5}, GOAL) for n in range(5)], goal=GOAL
    ),
    "of a list": dataclasses.replace(
        report_of(
            [trial(n, n / 9, 0.9, {"ridge": 10.0 ** (n % 5 - 4)}, GOAL) for n in range(9)],
            goal=GOAL,
        ),
        listed={"ridge": (1e-2, 1e-3, 1e-4, 1.0, 1e-1)},
    ),
}
searches = pytest.mark.parametrize("case", list(SEARCHES))


@functools.cache
def figures_of(case: str) -> dict[str, Figure]:
    """Return every picture that a search has, laid out, for tests that look and change nothing."""
    report = SEARCHES[case]
    figures = {
        name: picture.draw(report)
        for name, picture in PICTURES.items()
        if picture.why_not(report) is None
    }
    for figure in figures.values():
        figure.draw_without_rendering()
    return figures


def complete(report: Report) -> list[TrialRow]:
    return [row for row in report.rows if row.state == COMPLETE]


def labelled(axes: Axes, beginning: str) -> Any:
    """Return the artist with a label."""
    found = [one for one in axes.get_children() if str(one.get_label()).startswith(beginning)]
    assert len(found) == 1, [one.get_label() for one in axes.get_children()]
    return found[0]


def has(axes: Axes, beginning: str) -> bool:
    return any(str(one.get_label()).startswith(beginning) for one in axes.get_children())


def points_of(axes: Axes, beginning: str) -> list[tuple[float, float]]:
    collection = labelled(axes, beginning)
    assert isinstance(collection, PathCollection)
    return [(float(x), float(y)) for x, y in np.asarray(collection.get_offsets())]


def written(figure: Figure) -> list[tuple[str, Bbox]]:
    """Return the texts that a figure shows, with their boxes in pixels."""
    ticks: set[Artist] = set()
    shown: list[Text] = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                ticks |= {tick.label1, tick.label2}
                inside = low <= tick.get_loc() <= high
                shown += [one for one in (tick.label1, tick.label2) if inside]
    shown += [one for one in figure.findobj(Text) if one not in ticks]
    return [
        (one.get_text(), one.get_window_extent())
        for one in shown
        if one.get_visible() and one.get_text().strip()
    ]


@searches
def test_no_text_covers_another_or_leaves_the_picture(case: str) -> None:
    for name, figure in figures_of(case).items():
        texts = written(figure)
        assert len(texts) > 5
        for (first, one), (second, other) in itertools.combinations(texts, 2):
            # A pixel is what hinting may add to a box.
            apart = one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1
            apart |= one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1
            assert apart, (name, first, second)
        for text, box in texts:
            assert box.x0 >= -1, (name, text)
            assert box.y0 >= -1, (name, text)
            assert box.x1 <= figure.bbox.x1 + 1, (name, text)
            assert box.y1 <= figure.bbox.y1 + 1, (name, text)


@searches
def test_legends_lie_outside_the_axes(case: str) -> None:
    for name, figure in figures_of(case).items():
        for legend in figure.legends:
            box = legend.get_window_extent()
            for axes in figure.axes:
                assert not box.overlaps(axes.bbox), name
        assert all(axes.get_legend() is None for axes in figure.axes)


@searches
def test_axes_say_what_they_show_and_end_at_numbers(case: str) -> None:
    for name, figure in figures_of(case).items():
        for axes in figure.axes:
            assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all(), name
        labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
        assert all(labels), name


@pytest.mark.parametrize("case", ["of 30", "of 300 and a long name", "without a trial"])
def test_every_picture_that_applies_is_written_as_png_and_svg(tmp_path: Path, case: str) -> None:
    files = write_pictures(SEARCHES[case], tmp_path)
    applies = [name for name, one in PICTURES.items() if one.why_not(SEARCHES[case]) is None]
    assert list(files) == applies
    assert (len(files) == len(PICTURES)) is (case != "without a trial")
    every = [path for paths in files.values() for path in paths]
    assert sorted(tmp_path.iterdir()) == sorted(every)
    assert {path.suffix for path in every} == set(PICTURE_SUFFIXES)
    for path in every:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert imread(path)[..., :3].std() > 0.03


@searches
def test_a_picture_that_does_not_apply_says_why(case: str) -> None:
    report = SEARCHES[case]
    for picture in PICTURES.values():
        reason = picture.why_not(report)
        if reason is not None:
            with pytest.raises(InputError, match="no "):
                picture.draw(report)


def test_a_notebook_gets_a_png_and_no_figure_stays_open() -> None:
    import matplotlib as mpl

    figure = trade_off(SEARCHES["of 6"])
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert mpl._pylab_helpers.Gcf.get_all_fig_managers() == []


def test_the_same_search_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_pictures(SEARCHES["of 6"], tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("lower_is_better", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("n_points", [0, 1, 2, 40])
def test_the_front_is_what_nothing_beats(n_points: int, lower_is_better: tuple[bool, bool]) -> None:
    draw = random.Random(n_points)
    for _ in range(20):
        # Few values, so that many coordinates and some points are equal.
        points = [(draw.randint(0, 6) / 6, draw.randint(0, 6) / 6) for _ in range(n_points)]
        signs = [1 if low else -1 for low in lower_is_better]

        def beats(one: tuple[float, float], other: tuple[float, float], signs: Any = signs) -> bool:
            gains = [sign * (b - a) for sign, a, b in zip(signs, one, other, strict=True)]
            return min(gains) >= 0 and max(gains) > 0

        expected = {
            index
            for index, point in enumerate(points)
            if not any(beats(other, point) for other in points)
        }
        front = pareto_front(points, lower_is_better=lower_is_better)
        assert set(front) == expected
        assert len(front) == len(expected)
        along = [signs[0] * points[index][0] for index in front]
        assert along == sorted(along)


def test_the_trade_off_has_every_trial_the_floor_and_the_confirmed_best() -> None:
    report = SEARCHES["of 30"]
    (axes,) = trade_off(report).axes
    for feasible, name in ((True, "feasible ("), (False, "infeasible (")):
        expected = [
            (row.scores["forget_rouge1"], row.scores["retain_rouge1"])
            for row in complete(report)
            if row.feasible is feasible
        ]
        assert expected
        assert np.array(points_of(axes, name)) == pytest.approx(np.array(expected))
    assert list(labelled(axes, "bound").get_ydata()) == [0.8, 0.8]
    region = labelled(axes, "feasible region").get_bbox()
    assert region.y0 == pytest.approx(0.8)
    corner = (*axes.get_xlim(), axes.get_ylim()[1])
    assert (region.x0, region.x1, region.y1) == pytest.approx(corner)
    assert report.confirmed is not None
    confirmed = report.confirmed["forget_rouge1"], report.confirmed["retain_rouge1"]
    assert points_of(axes, "best, in full") == [pytest.approx(confirmed)]
    assert points_of(axes, "base model") == [(0.98, 0.99)]
    assert "forget ROUGE-1 recall" in axes.get_xlabel()


def test_the_trade_off_follows_the_goal() -> None:
    report = SEARCHES["of another goal"]
    (axes,) = trade_off(report).axes
    assert "forget log prob [nats]" in axes.get_xlabel()
    assert "retain perplexity" in axes.get_ylabel()
    region = labelled(axes, "feasible region").get_bbox()
    assert region.y1 == pytest.approx(3)
    corner = (*axes.get_xlim(), axes.get_ylim()[0])
    assert (region.x0, region.x1, region.y0) == pytest.approx(corner)


def test_a_bound_on_what_is_raised_shades_its_side() -> None:
    (axes,) = trade_off(SEARCHES["to raise what is kept"]).axes
    assert "retain ROUGE-1" in axes.get_xlabel()
    assert list(labelled(axes, "bound").get_ydata()) == [0.2, 0.2]
    assert labelled(axes, "feasible region").get_bbox().y1 == pytest.approx(0.2)


def test_nothing_is_shaded_where_nothing_is_bounded() -> None:
    (axes,) = trade_off(SEARCHES["without bounds"]).axes
    assert not has(axes, "feasible region")
    assert not has(axes, "bound")


def test_the_history_has_the_best_feasible_so_far_by_number_and_by_time() -> None:
    rows = [
        trial(0, 0.9, 0.9, POINT, GOAL),
        trial(1, 0.1, 0.2, POINT, GOAL),
        failed(2),
        trial(3, 0.6, 0.9, POINT, GOAL),
        trial(4, 0.7, 0.9, POINT, GOAL),
    ]
    rows[3] = dataclasses.replace(rows[3], ended=rows[0].ended)  # beside the first
    by_number, by_time = history(report_of(rows, goal=GOAL)).axes
    steps = labelled(by_number, "best feasible").get_xydata().tolist()
    assert steps == [[0, 0.9], [1, 0.9], [3, 0.6], [4, 0.6]]
    assert points_of(by_number, "infeasible") == [(1.0, 0.1)]
    assert list(labelled(by_number, "failed").get_xdata()) == [2]
    # Five minutes by the hand: it began with the first trial, the last ended in the fifth minute.
    assert "minutes since the first trial began" in by_time.get_xlabel()
    steps = labelled(by_time, "best feasible").get_xydata().tolist()
    assert steps == [[1, 0.9], [1, 0.6], [2, 0.6], [5, 0.6]]


def test_the_map_has_every_trial_apart_in_its_layers_column_with_its_score() -> None:
    spread = [
        trial(n, n / 10, 0.9 - n / 10, POINT | {"layer": 8 + n // 5, "coefficient": 2.0}, GOAL)
        for n in range(10)
    ]
    spread.append(trial(10, 0.3, 0.9, POINT | {"layer": 10, "coefficient": 4.0}, GOAL))
    figure = layer_coefficient(report_of(spread, goal=GOAL))
    for axes, metric in zip(figure.axes[:2], ("forget_rouge1", "retain_rouge1"), strict=True):
        marks = [
            (tuple(place), value)
            for one in axes.collections
            if one.get_array() is not None
            for place, value in zip(one.get_offsets().tolist(), one.get_array(), strict=True)
        ]
        expected = sorted((row.parameters["layer"], row.scores[metric]) for row in spread)
        found = sorted((round(x), float(value)) for (x, _), value in marks)
        assert np.array(found) == pytest.approx(np.array(expected))
        assert len({place for place, _ in marks}) == len(spread)
        assert {y for (_, y), _ in marks} == {2.0, 4.0}
        assert max(abs(x - round(x)) for (x, _), _ in marks) == pytest.approx(0.2)
        assert [(one.get_x(), one.get_width()) for one in axes.patches] == [(8.5, 1.0)]
        assert "beside each other" in axes.get_xlabel()
    assert [axes.get_ylabel() for axes in figure.axes[2:]] == [
        "forget ROUGE-1 recall",
        "retain ROUGE-1 recall",
    ]


def test_layers_of_a_list_stand_where_their_ticks_are() -> None:
    rows = [trial(n, 0.1, 0.9, POINT | {"layer": 4 * n, "coefficient": n}, GOAL) for n in range(3)]
    report = dataclasses.replace(report_of(rows, goal=GOAL), listed={"layer": (0, 4, 8)})
    axes = layer_coefficient(report).axes[0]
    marks = [one for one in axes.collections if one.get_array() is not None]
    assert [x for one in marks for x, _ in one.get_offsets().tolist()] == [0, 1, 2]
    assert "beside each other" not in axes.get_xlabel()


def test_a_single_trial_near_the_best_is_no_range() -> None:
    rows = [trial(n, n / 2, 0.9, {"learning_rate": 10.0**-n}, GOAL) for n in range(1, 3)]
    for axes in sensitivity(report_of(rows, goal=GOAL)).axes:
        assert not has(axes, "range of trials")


def test_bounds_that_have_no_axis_are_named() -> None:
    report = SEARCHES["of another goal"]
    (axes,) = trade_off(report).axes
    (label,) = [one.get_label() for one in axes.patches]
    assert label == "feasible region (also retain ROUGE-1 of at least 0.5, not drawn)"


@pytest.mark.parametrize(
    "parameters",
    [
        {"learning_rate": 0.1},
        {"layer": 9, "coefficient": 2.0},
        {"layer": [8, 9], "coefficient": 2.0},
    ],
    ids=["no layer", "one setting", "several layers"],
)
def test_there_is_no_map_where_layer_and_coefficient_were_not_searched(
    parameters: dict[str, Any],
) -> None:
    rows = [trial(n, 0.2, 0.9, parameters, GOAL) for n in range(3)]
    assert PICTURES["layer_coefficient"].why_not(report_of(rows, goal=GOAL)) is not None


def test_sensitivity_shades_what_is_near_the_best_and_marks_it() -> None:
    scores = {1e-4: 0.9, 1e-3: 0.14, 3e-3: 0.1, 1e-2: 0.15, 2e-2: 0.16}
    rows = [
        trial(n, forget, 0.9, {"learning_rate": rate}, GOAL)
        for n, (rate, forget) in enumerate(scores.items())
    ]
    rows.append(trial(5, 0.0, 0.1, {"learning_rate": 5e-2}, GOAL))
    figure = sensitivity(report_of(rows, goal=GOAL))
    forget, retain = figure.axes
    for axes in (forget, retain):
        assert axes.get_xscale() == "log"
        span = labelled(axes, "range of trials that are feasible and within 0.05").get_bbox()
        assert (span.x0, span.x1) == pytest.approx((1e-3, 1e-2))
    assert points_of(forget, "best, as searched") == [(3e-3, 0.1)]
    assert points_of(forget, "feasible (") == list(scores.items())
    assert points_of(retain, "infeasible (") == [(5e-2, 0.1)]
    assert list(labelled(retain, "bound").get_ydata()) == [0.8, 0.8]
    assert not has(forget, "bound")
    assert retain.get_xlabel() == "learning rate (log scale)"


def test_sensitivity_takes_any_parameter_that_varies_and_names_those() -> None:
    report = SEARCHES["of 30"]
    assert swept_parameter(report) == "learning_rate"
    axes = sensitivity(report, "coefficient").axes
    assert axes[1].get_xlabel() == "coefficient"
    assert axes[1].get_xscale() == "linear"
    with pytest.raises(InputError, match="layer, coefficient, learning_rate"):
        sensitivity(report, "momentum")


def test_values_of_a_list_stand_at_even_distances() -> None:
    report = SEARCHES["of a list"]
    assert swept_parameter(report) == "ridge"
    axes = sensitivity(report).axes[1]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert [x for x, _ in points_of(axes, "feasible (")] == [n % 5 for n in range(9)]


def test_importance_has_a_bar_for_each_share_and_the_largest_on_top() -> None:
    (axes,) = importance(SEARCHES["of 30"]).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["learning rate", "coefficient", "layer"]
    for bars, (metric, shares) in zip(axes.containers, IMPORTANCE.items(), strict=True):
        assert metric.split("_")[0] in bars.get_label()
        widths = dict(zip(names, (bar.get_width() for bar in bars), strict=True))
        assert widths == {name: shares.get(name.replace(" ", "_"), 0.0) for name in names}


def test_the_curve_over_layers_is_drawn_with_its_best_and_what_is_recommended() -> None:
    (axes,) = layers(SEARCHES["of 30"]).axes
    for label, values in (("s1:", CURVE.refusal), ("s2:", CURVE.truth)):
        assert labelled(axes, label).get_xydata().tolist() == [
            [layer, value] for layer, value in zip(CURVE.layers, values, strict=True)
        ]
    assert points_of(axes, "best: layer 3") == [(3.0, 0.5)]
    shaded = [one.get_bbox() for one in axes.patches]
    assert [(box.x0, box.x1) for box in shaded] == [(2.5, 3.5), (3.5, 4.5)]
    assert list(labelled(axes, "s1 − s2, nothing").get_ydata()) == [-0.9, -0.9]  # noqa: RUF001


def test_the_curve_of_one_layer_can_be_drawn_and_is_svg_where_its_name_says_so(
    tmp_path: Path,
) -> None:
    one = dataclasses.replace(
        CURVE, layers=(0,), refusal=(0.1,), truth=(0.9,), best=0, recommended=(0,)
    )
    draw_layers(one, tmp_path / "a.png", title="tiny")
    assert imread(tmp_path / "a.png")[..., :3].std() > 0.03
    draw_layers(one, tmp_path / "a.SVG", title="tiny")
    assert ElementTree.parse(tmp_path / "a.SVG").getroot().tag.endswith("svg")

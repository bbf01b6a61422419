"""Charts: what is drawn is what the rows say."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from chart_specs import axis, drawn, forms, legend, panels, places, steps
from invented_searches import IMPORTANCE, POINT, PRIOR, SEARCHES, results_with_best, trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from PIL import Image

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.belief_chart import beliefs
from lunar_tune.report.charts import (
    CHARTS,
    charts_of,
    history,
    layer_curve,
    layers,
    pareto_front,
    trade_off,
    write_charts,
)
from lunar_tune.report.marks import PICTURE_SUFFIXES, save_chart
from lunar_tune.report.parameter_charts import (
    importance,
    layer_coefficient,
    parameters,
    sensitivity,
)
from lunar_tune.report.results import SearchResults
from lunar_tune.study.rows import COMPLETE, TrialRow

GOAL = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])


def complete(search: SearchResults) -> list[TrialRow]:
    return [row for row in search.rows if row.state == COMPLETE]


@pytest.mark.parametrize("case", SEARCHES)
def test_charts_say_what_they_show_or_why_there_is_none(case: str) -> None:
    search, drawn = SEARCHES[case], set()
    for name, _, chart in charts_of(search):
        drawn.add(name)
        for panel in panels(chart):
            assert axis(panel, "x")["title"], name
            # The parameters of the importance say themselves what they are.
            assert name == "importance" or axis(panel, "y")["title"], name
    for draw in (draw for draw in CHARTS if draw.__name__ not in drawn):
        with pytest.raises(InputError, match="no "):
            draw(search)


def test_a_title_is_broken_and_ends_where_the_picture_does() -> None:
    for case in ("of 300 and a long name", "of one word that does not end"):
        title = trade_off(SEARCHES[case]).to_dict()["title"]
        assert SEARCHES[case].title.startswith(title["text"][0])
        assert 1 < len(title["text"]) <= 3
        assert title["limit"] < 600


def test_every_chart_is_written_as_png_and_svg_the_same_each_time(tmp_path: Path) -> None:
    captions = write_charts(SEARCHES["of 6"], tmp_path / "all")
    assert [*captions.values()] == [*CHARTS.values()]
    every = [
        (tmp_path / place).with_suffix(suffix) for place in captions for suffix in PICTURE_SUFFIXES
    ]
    assert sorted((tmp_path / "all").iterdir()) == sorted(every)
    one = PRIOR | {"layers": PRIOR["layers"][:1], "best": 2, "recommended": [2]}
    save_chart(layer_curve(one, title="tiny"), tmp_path / "of one layer.SVG")
    for path in (*every, tmp_path / "of one layer.SVG"):
        if path.suffix.lower() == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert "NaN" not in path.read_text(encoding="utf-8")
        else:
            assert np.asarray(Image.open(path).convert("RGB")).std() > 0.03 * 255
    again = [tmp_path / f"trade_off{suffix}" for suffix in PICTURE_SUFFIXES]
    save_chart(trade_off(SEARCHES["of 6"]), *again)
    for path in again:
        assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes()
    assert [name for name, *_ in charts_of(SEARCHES["without a trial"])] == ["layers"]


@pytest.mark.parametrize("lower_is_better", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("n_points", [0, 1, 2, 40])
def test_the_front_is_what_nothing_beats(n_points: int, lower_is_better: tuple[bool, bool]) -> None:
    draw = random.Random(n_points)
    for _ in range(20):
        # Few values, so that many coordinates and some points are equal.
        points = [(draw.randint(0, 6) / 6, draw.randint(0, 6) / 6) for _ in range(n_points)]
        signs = [1 if low else -1 for low in lower_is_better]
        values = [(signs[0] * x, signs[1] * y) for x, y in points]  # less is better
        expected = {
            index
            for index, (x, y) in enumerate(values)
            if not any(one != (x, y) and one[0] <= x and one[1] <= y for one in values)
        }
        front = pareto_front(points, lower_is_better=lower_is_better)
        assert set(front) == expected
        assert len(front) == len(expected)
        along = [values[index][0] for index in front]
        assert along == sorted(along)


def test_the_trade_off_has_every_trial_and_the_confirmed_best() -> None:
    search = SEARCHES["of 30"]
    (panel,) = panels(trade_off(search))
    for feasible, name in ((True, "feasible ("), (False, "infeasible (")):
        rows = [row for row in complete(search) if row.feasible is feasible]
        expected = [(row.scores["forget_rouge1"], row.scores["retain_rouge1"]) for row in rows]
        assert expected
        assert places(panel, name) == expected
        # A click asks for the trial, a pointer for what it scored.
        for row, one in zip(rows, drawn(panel, name), strict=True):
            assert one["trial"] == row.number
            assert f"trial {row.number}: {row.label}" in one["says"]
            assert f"retain ROUGE-1 {row.scores['retain_rouge1']:.3f}" in one["says"]
    assert search.confirmed is not None
    confirmed = search.confirmed["forget_rouge1"], search.confirmed["retain_rouge1"]
    assert places(panel, "best, confirmed") == [confirmed]
    assert places(panel, "base model") == [(0.98, 0.99)]
    assert axis(panel, "x")["title"][0] == "forget ROUGE-1 recall"
    assert axis(panel, "x")["scale"]["domain"] == [0, 1]


def test_the_front_is_steps_and_rings_its_members() -> None:
    """The least to be forgotten comes first: each step goes right before it goes up."""
    (panel,) = panels(trade_off(SEARCHES["of 30"]))
    rings = places(panel, "Pareto front")
    assert steps(panel) == rings
    assert len(rings) > 2
    for along in zip(*rings, strict=True):
        assert list(along) == sorted(along)


def test_the_trade_off_follows_the_goal() -> None:
    chart = trade_off(SEARCHES["of another goal"])
    (panel,) = panels(chart)
    assert axis(panel, "x")["title"] == ["forget log prob [nats]", "(lower is better)"]
    assert axis(panel, "y")["title"][0] == "retain perplexity"
    assert axis(panel, "y")["scale"]["type"] == "log"
    assert legend(chart)[0] == ("feasible region (also retain ROUGE-1 of at least 0.5, not drawn)")


def test_the_shaded_region_follows_the_bounds() -> None:
    goal = Goal.read("forget_rouge1", ["retain_rouge1>=0.5", "retain_rouge1<=0.9"])
    both = results_with_best([trial(0, 0.2, 0.6, POINT, goal)], goal=goal)
    for search, bounds, region, end in (
        (SEARCHES["of 30"], [0.8], {"y": 0.8}, {"value": 0}),  # the upper end
        (SEARCHES["of another goal"], [3], {"y": 3}, {"value": "height"}),
        (SEARCHES["to raise what is kept"], [0.2], {"y": 0.2}, {"value": "height"}),
        (both, [0.5, 0.9], {"y": 0.5, "y2": 0.9}, {"field": "y2"}),
    ):
        (panel,) = panels(trade_off(search))
        drawn_bounds = [one for layer in forms(panel, "rule") for one in layer["values"]]
        assert drawn_bounds == [{"y": bound} for bound in bounds]
        (shaded,) = forms(panel, "rect")
        assert (shaded["values"], shaded["encoding"]["y2"]) == ([region], end)
        assert "x" not in shaded["encoding"], "over the whole width"
    (panel,) = panels(trade_off(SEARCHES["without bounds"]))
    assert forms(panel, "rect") == forms(panel, "rule") == []


def test_the_history_has_the_best_feasible_so_far_by_number_and_by_time() -> None:
    rows = [
        trial(0, 0.9, 0.9, POINT, GOAL),
        trial(1, 0.1, 0.2, POINT, GOAL),
        dataclasses.replace(SEARCHES["of failures"].rows[0], number=2),
        trial(3, 0.6, 0.9, POINT, GOAL),
        trial(4, 0.7, 0.9, POINT, GOAL),
    ]
    rows[3] = dataclasses.replace(rows[3], ended=rows[0].ended)  # beside the first
    by_number, by_time = panels(history(results_with_best(rows)))

    assert steps(by_number) == [(0, 0.9), (1, 0.9), (3, 0.6), (4, 0.6)]
    assert places(by_number, "infeasible") == [(1, 0.1)]
    assert [one["x"] for one in drawn(by_number, "failed (1)")] == [2]
    # Five minutes by the hand: it began with the first trial, the last ended in the fifth minute.
    assert axis(by_time, "x")["title"] == "minutes since the first trial began"
    assert steps(by_time) == [(1, 0.9), (1, 0.6), (2, 0.6), (5, 0.6)]


def test_the_map_has_every_trial_apart_in_its_layers_column_with_its_score() -> None:
    spread = [
        trial(n, n / 10, 0.9 - n / 10, POINT | {"layer": 8 + n // 5, "coefficient": 2.0}, GOAL)
        for n in range(10)
    ]
    spread.append(trial(10, 0.3, 0.9, POINT | {"layer": 10, "coefficient": 4.0}, GOAL))
    search = results_with_best(spread)
    assert search.best is not None
    for panel, metric in zip(
        panels(layer_coefficient(search)), ("forget_rouge1", "retain_rouge1"), strict=True
    ):
        marks, ring = panel[0]["values"], panel[1]["values"]
        for row, one in zip(spread, marks, strict=True):
            assert (one["x"], one["y"]) == (row.parameters["layer"], row.parameters["coefficient"])
            assert one["score"] == row.scores[metric]
        assert len({(one["x"], one["y"], one["beside"]) for one in marks}) == len(spread)
        assert all(0 < one["beside"] < 1 for one in marks)
        assert [one["trial"] for one in ring] == [search.best.number]
        assert "beside each other" in axis(panel, "x")["title"][1]
        title = panel[0]["encoding"]["color"]["legend"]["title"]
        assert title == metric.replace("_rouge1", " ROUGE-1")


def test_what_is_believed_of_settings_not_tried_is_near_what_they_would_score() -> None:
    def scores(layer: float, coefficient: float) -> tuple[float, float]:
        return math.exp(-coefficient * layer / 16), 1 - coefficient * layer / 160

    draw = random.Random(1)
    space = {"layer": IntDistribution(8, 12), "coefficient": FloatDistribution(0.5, 6.0)}
    rows = []
    for number in range(40):
        setting = {"layer": draw.randint(8, 12), "coefficient": draw.uniform(0.5, 6.0)}
        rows.append(trial(number, *scores(**setting), setting, GOAL))
    search = results_with_best(rows, distributions=space)
    objective, kept = panels(beliefs(search))
    for panel in (objective, kept):
        (cells,) = forms(panel, "rect")
        assert len(cells["values"]) == 5 * 24
        assert [cells["values"][0]["y"], cells["values"][-1]["y2"]] == [0.5, 6.0]
        trials = [one for layer in panel for one in layer["values"] if "trial" in one]
        assert [(one["x"], one["y"]) for one in trials] == [
            tuple(row.parameters.values()) for row in rows
        ]
    for one in forms(objective, "rect")[0]["values"]:
        forget, _ = scores(one["x"], (one["y"] + one["y2"]) / 2)
        assert one["score"] == pytest.approx(forget, abs=0.05)
    for one in forms(kept, "rect")[0]["values"]:
        _, retain = scores(one["x"], (one["y"] + one["y2"]) / 2)
        if abs(retain - 0.8) > 0.02:
            assert one["score"] == pytest.approx(float(retain >= 0.8), abs=0.3)
    with pytest.raises(InputError, match="it takes 5 completed trials"):
        beliefs(results_with_best(rows[:4], distributions=space))


def test_the_history_shades_where_the_best_of_the_space_is_and_marks_when_it_is_enough() -> None:
    rows = [trial(n, 0.9 - n / 10, 0.9, POINT, GOAL) for n in range(4)]
    least = (None, 0.3, 0.65, 0.55)  # before the third trial less than that one reached
    rows = [
        dataclasses.replace(row, outlook={} if one is None else {"chance": 0.5, "least": one})
        for row, one in zip(rows, least, strict=True)
    ]
    by_number, _ = panels(history(results_with_best(rows, outlook={"enough": True})))
    (shade,) = forms(by_number, "area")
    seen = [tuple(round(one[name], 9) for name in ("x", "y", "y2")) for one in shade["values"]]
    assert seen == [(1, 0.8, 0.3), (2, 0.7, 0.65), (3, 0.6, 0.55)]
    (stop,) = forms(by_number, "rule")
    assert stop["values"] == [{"x": 3}]
    (by_number, _) = panels(history(results_with_best(rows, outlook={"enough": False})))
    assert not forms(by_number, "rule")


def test_there_is_no_map_where_layer_and_coefficient_were_not_searched() -> None:
    for setting in ({"learning_rate": 0.1}, POINT, POINT | {"layer": [8, 9]}):
        rows = [trial(n, 0.2, 0.9, setting, GOAL) for n in range(3)]
        with pytest.raises(InputError, match="no map of layer and coefficient"):
            layer_coefficient(results_with_best(rows))


def test_sensitivity_shades_what_is_near_the_best_and_marks_it() -> None:
    scores = {1e-4: 0.9, 1e-3: 0.14, 3e-3: 0.1, 1e-2: 0.15, 2e-2: 0.16}
    rows = [
        trial(n, forget, 0.9, {"learning_rate": rate}, GOAL)
        for n, (rate, forget) in enumerate(scores.items())
    ]
    rows.append(trial(5, 0.0, 0.1, {"learning_rate": 5e-2}, GOAL))
    chart = sensitivity(results_with_best(rows))
    told = "range of trials that are feasible and within 0.05 of the best forget ROUGE-1"
    assert legend(chart)[0] == told
    forget, retain = panels(chart)
    for panel in (forget, retain):
        x = axis(panel, "x")
        assert (x["scale"]["type"], x["title"]) == ("log", "learning rate (log scale)")
        (span,) = forms(panel, "rect")
        assert span["values"] == [{"x": 1e-3, "x2": 1e-2}]
    assert places(forget, "best, as searched") == [(3e-3, 0.1)]
    assert places(forget, "feasible (") == list(scores.items())
    assert places(retain, "infeasible (") == [(5e-2, 0.1)]
    assert [one["values"] for one in forms(retain, "rule")] == [[{"y": 0.8}]]
    assert forms(forget, "rule") == []
    alone = sensitivity(results_with_best([rows[0], dataclasses.replace(rows[2], number=1)]))
    assert not any(entry.startswith("range") for entry in legend(alone)), "one trial is no range"


def test_sensitivity_takes_any_parameter_that_varies_and_names_those() -> None:
    search = SEARCHES["of 30"]
    assert axis(panels(sensitivity(search))[0], "x")["title"] == "learning rate (log scale)"
    x = axis(panels(sensitivity(search, "coefficient"))[0], "x")
    assert (x["title"], x["scale"]["type"]) == ("coefficient", "linear")
    with pytest.raises(InputError, match="layer, coefficient, learning_rate"):
        sensitivity(search, "momentum")


def test_values_of_a_list_stand_at_even_distances() -> None:
    panel = panels(sensitivity(SEARCHES["of a list"]))[0]
    x = axis(panel, "x")
    assert (x["type"], x["scale"]["domain"]) == ("ordinal", [1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert places(panel, "feasible (") == [(10.0 ** (n % 5 - 4), n / 9) for n in range(9)]
    rows = [trial(n, 0.1, 0.9, POINT | {"layer": 4 * n, "coefficient": n}, GOAL) for n in range(3)]
    search = results_with_best(rows, distributions={"layer": CategoricalDistribution((0, 8, 4))})
    x = axis(panels(layer_coefficient(search))[0], "x")
    assert (x["type"], x["scale"]["domain"]) == ("ordinal", [0, 4, 8])
    assert len(x["title"]) == 1, "each layer has one trial"


def test_the_overview_has_a_panel_for_each_parameter_also_for_names() -> None:
    rows = [
        trial(n, n / 10, 0.9, {"layer": n, "loss": name, "ridge": 0.1}, GOAL)
        for n, name in enumerate("bca")
    ]
    numbers, names = panels(parameters(results_with_best(rows)))
    assert places(numbers, "feasible (") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert places(names, "feasible (") == [("b", 0.0), ("c", 0.1), ("a", 0.2)]
    assert axis(names, "x")["scale"]["domain"] == ["a", "b", "c"]
    with pytest.raises(InputError, match="no overview"):
        parameters(SEARCHES["of near rates"])


def test_importance_has_a_bar_for_each_share_and_the_largest_on_top() -> None:
    chart = importance(SEARCHES["of 30"])
    assert legend(chart) == ["of forget ROUGE-1", "of retain ROUGE-1"]
    ((bars, numbers),) = panels(chart)
    assert bars["values"] == numbers["values"]
    assert bars["encoding"]["y"]["sort"] is None, "in the order of the data"
    for metric, shares in IMPORTANCE.items():
        kind = f"of {metric.replace('_rouge1', ' ROUGE-1')}"
        found = {one["parameter"]: one["share"] for one in bars["values"] if one["kind"] == kind}
        assert list(found) == ["layer", "coefficient", "learning rate"]
        assert found == {name: shares.get(name.replace(" ", "_"), 0.0) for name in found}


def test_the_curve_over_layers_is_drawn_with_its_best_and_what_is_recommended() -> None:
    (panel,) = panels(layers(SEARCHES["of 30"]))
    assert places(panel, "s1:") == [(2, 0.1), (3, 0.6), (4, 0.5), (7, 0.2)]
    assert places(panel, "s2:") == [(2, 0.9), (3, 0.1), (4, 0.2), (7, 0.3)]
    assert [y for _, y in places(panel, "s1 − s2")] == pytest.approx([-0.8, 0.5, 0.3, -0.1])  # noqa: RUF001
    assert places(panel, "best: layer 3") == [(3, 0.5)]
    (shaded,) = forms(panel, "rect")
    assert shaded["values"] == [{"x": 2.5, "x2": 3.5}, {"x": 3.5, "x2": 4.5}]
    (base,) = forms(panel, "rule")
    assert base["values"] == [{"y": -0.9}]

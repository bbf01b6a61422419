"""Recorded surfaces: their files, the scores of kept answers, what they say, all by hand."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import pytest
from bench_samplers import Subject, check_replayable, distributions_of, replay, row_of
from optuna.distributions import FloatDistribution, IntDistribution
from recorder import describe, recorded, unrecorded
from surfaces import DECLINING, REFUSING, ROUGE, Surface, findings_of, read_surface

from lunar_tune.errors import InputError

AXES = {"layer": (0, 1, 4), "coefficient": (1.0, 2.0)}
FORGET = {(0, 1.0): 1.0, (0, 2.0): 0.9, (1, 1.0): 0.5, (1, 2.0): 0.0, (4, 1.0): 0.1, (4, 2.0): 0.11}
RETAIN = {(0, 1.0): 1.0, (0, 2.0): 1.0, (1, 1.0): 0.9, (1, 2.0): 0.7, (4, 1.0): 0.85, (4, 2.0): 0.8}
REFUSED = {(1, 1.0): 0.95, (1, 2.0): 1.0}


@pytest.fixture
def surface() -> Surface:
    """Five blocks, of which three, times two coefficients."""
    points = {
        one: {
            "forget": FORGET[one],
            "forget_whole": FORGET[one],
            "retain": RETAIN[one],
            "seconds": 1.0,
            "forget_refused": REFUSED.get(one, 0.0),
        }
        for one in FORGET
    }
    about = {"model": "made", "solver": "closed_form", "blocks": 5}
    return Surface(name="made", about=about, axes=AXES, points=points)


def test_a_file_says_all_of_a_surface_also_of_an_unfinished_one(
    surface: Surface, tmp_path: Path
) -> None:
    file = tmp_path / "made.json"
    surface.save(file)
    assert read_surface(file) == surface
    document = json.loads(file.read_text())
    del document["points"][2]
    document["points"][0] = {"parameters": {"layer": 0, "coefficient": 1.0}, "failure": "NaN"}
    file.write_text(json.dumps(document))
    part = read_surface(file)
    assert (len(part.points), len(part.done)) == (5, 4)
    with pytest.raises(InputError, match="1 of its settings are not recorded"):
        check_replayable(part, 0.8)
    document["points"][1]["parameters"]["coefficient"] = 3.0
    for content, said in ((json.dumps(document), "not on its axes"), ("[]", "no recorded surface")):
        file.write_text(content)
        with pytest.raises(InputError, match=said):
            read_surface(file)


def test_a_surface_tells_optima_what_a_space_holds_of_them_and_what_each_axis_does(
    surface: Surface,
) -> None:
    found = findings_of(surface, {"layer": (0, 3), "learning_rate": (0, 1)}, 0.8)
    assert found["feasible"] == 5 / 6  # all but (1, 2.0), whose retain score is .7
    best = found["goals"][ROUGE]
    assert best["optimum"]["parameters"] == {"layer": 4, "coefficient": 1.0}
    assert best["optimum"]["depth"] == 1  # the last of five blocks
    assert [one["forget"] for one in best["near"]] == [0.1, 0.11]
    assert best["near_in_space"] == 0
    assert best["best_in_space"]["parameters"] == {"layer": 1, "coefficient": 1.0}
    declining = found["goals"][REFUSING]
    assert declining["optimum"]["parameters"] == {"layer": 1, "coefficient": 1.0}
    assert declining["near_in_space"] == len(declining["near"]) == 1
    # With coefficient 1 forget goes from 1 to .1, with 2 from .9 to 0: both by .9. By coefficient
    # it goes by .1, .5 and .01.
    assert found["axes"]["layer"]["forget"] == pytest.approx(0.9)
    assert found["axes"]["coefficient"]["forget"] == pytest.approx(0.1)
    assert found["axes"]["layer"]["best"] == {0: 0.9, 1: 0.5, 4: 0.1}
    assert found["axes"]["coefficient"]["best"] == {1.0: 0.1, 2.0: 0.11}


def test_answers_of_several_processes_are_scored_by_the_metrics_of_today(tmp_path: Path) -> None:
    axes = {"layer": (0, 1), "coefficient": (1.0,)}
    describe(tmp_path, {"model": "made", "solver": "adamw", "date": "2026-01-01"}, axes)
    mine, others = unrecorded(tmp_path, axes), unrecorded(tmp_path, axes)
    (first, setting), (second, other) = next(mine), next(others)
    assert (setting["layer"], other["layer"]) == (0, 1)  # the first is being recorded
    rows = [
        ["forget", "A", "Where?", "In Rome.", "In Oslo.", True, None],  # one of two words: .5
        ["retain", "B", "Who?", "Ann Lee.", "Ann Lee.", None, None],
        ["retain", "B", "When?", "In May.", "Never.", True, None],
    ]
    declining = "I'm sorry, but I do not know that."
    whole = [["forget", "A", "Where?", "In Rome.", declining, True, 0.1]]
    whole += [["forget", "A", "Why?", "In Rome.", "In Rome. " * 20, False, 0.1]]
    answers = {"seconds": {"trial": 2.0}, "scores": {"forget_mrr": 1 / 3}, "whole": whole}
    first.write_text(json.dumps({"parameters": setting, "rows": rows, **answers}))
    second.write_text(json.dumps({"parameters": other, "failure": "NaN"}))
    assert not list(islice(unrecorded(tmp_path, axes), 1))
    scores, failed = recorded(tmp_path).points.values()
    assert (scores["forget"], scores["retain"], scores["seconds"]) == (0.5, 0.5, 2.0)
    assert (scores["forget_refused"], scores["forget_degenerate"]) == (0.5, 0.5)
    # Of two rows, 1 and 0: sqrt(.25 + .25) / 2.
    assert (scores["retain_rouge1_se"], scores["forget_mrr"]) == (0.3536, 0.3333)
    assert (scores["forget"], scores["forget_whole"]) == (0.5, 0.5)
    assert failed == {"failure": "NaN"}
    describe(tmp_path, {"model": "made", "solver": "adamw", "date": "2026-01-02"}, axes)
    with pytest.raises(InputError, match="solver: adamw, not lora"):
        describe(tmp_path, {"model": "made", "solver": "lora"}, axes)


def test_samplers_are_replayed_on_a_surface_without_its_model(surface: Surface) -> None:
    proposed = distributions_of(surface)
    assert proposed["layer"] == IntDistribution(0, 4)
    assert proposed["coefficient"] == FloatDistribution(1.0, 2.0)
    rates = Surface(name="", about={}, axes={"learning_rate": (0.001, 0.1), "ridge": (0.01,)})
    assert distributions_of(rates)["learning_rate"] == FloatDistribution(0.001, 0.1, log=True)
    assert distributions_of(rates)["ridge"].single()
    subject = Subject(surface=surface, floor=0.8)
    told = replay(subject, "random", 0, 4)
    assert len(told) == subject.count
    assert (0.1 <= min(told) < 0.3, max(told)) == (True, math.inf)  # the floor's misses are told
    space = {"layer": IntDistribution(1, 1), "coefficient": FloatDistribution(1.0, 2.0)}
    first = {"layer": 1, "coefficient": 1.0}
    subject = Subject(
        surface=surface, floor=0.8, goal=DECLINING, count=9, space=space, starts=[first]
    )
    told = replay(subject, "random", 0, 1)
    assert (told[0], len(told)) == (0.5, 9)
    assert min(told) >= 0.25, "of layer 1 the floor is kept up to coefficient 1.5"


def test_between_settings_a_surface_is_linear(surface: Surface) -> None:
    # Two thirds of the way from layer 1 to layer 4, .6 of the way from coefficient 1 to 2.
    place = {"layer": 3, "coefficient": 1.6}
    assert surface.at(place)["forget"] == pytest.approx((0.2 + 2 * 0.106) / 3)
    rates = {(0.001,): 1.0, (0.1,): 0.0}
    points = {one: {"forget": score, "retain": 1.0} for one, score in rates.items()}
    axes: dict[str, tuple[float, ...]] = {"learning_rate": (0.001, 0.1)}
    line = Surface(name="", about={}, axes=axes, points=points)
    assert line.at({"learning_rate": 0.01})["forget"] == pytest.approx(0.5)
    assert surface.at({"layer": 4, "coefficient": 9.0})["forget"] == FORGET[4, 2.0]
    # Layer 4 has .1 itself; layer 3 has (.5 - .5t + 2(.1 + .01t)) / 3 and keeps .75 up to t = 1.
    assert surface.least(0.8) == pytest.approx(0.1)
    assert surface.least(0.75) == pytest.approx((0.0 + 2 * 0.11) / 3)
    assert surface.least(1.1) == math.inf
    failed = {**surface.points, (4, 2.0): {"failure": "NaN"}}
    part = Surface(name="", about={}, axes=AXES, points=failed)
    assert "failure" in part.at(place)
    assert part.at({"layer": 1, "coefficient": 2.0})["forget"] == 0.0
    assert part.least(0.75) == pytest.approx(0.1)


def test_a_sampler_is_judged_by_what_it_has_found_at_a_cost() -> None:
    one = [0.5, 0.3, 0.3, 0.3, 0.3, 0.11] + [0.5] * 24
    other = [math.inf] * 9 + [0.2] * 21
    row = row_of("made", 1, [one, other], 0.1, 0.25)
    assert row.regret["5"] == {"median": None, "p95": None, "near": 0, "none": 0.5}
    assert row.regret["8"]["near"] == 0.5
    assert row.regret["30"] == {"median": 0.1, "p95": 0.1, "near": 0.5, "none": 0}

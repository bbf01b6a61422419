"""Which layers are searched and which settings come first: of scored layers, other searches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from command_lines import without_ray
from hypothesis import given
from hypothesis import strategies as st
from made_outcomes import base_model
from made_search import ONE_CPU, session_of
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console
from search_results import rows_of
from shared_searches import SharedSearch
from test_study import run_trials
from tracked_searches import TAGS, make_search

from lunar_tune.cli.layers import layers as LAYERS
from lunar_tune.cli.search import search as SEARCH
from lunar_tune.config.options import SearchConfig
from lunar_tune.driver import starting_points
from lunar_tune.driver.persistence import resumed, search_document, signature_of
from lunar_tune.driver.plan import SearchPlan, make_folder, plan_search
from lunar_tune.driver.samplers import open_study
from lunar_tune.driver.space import Parameter, SearchSpace, bounds_of
from lunar_tune.driver.starting_points import choose_layers, usual_point
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.goal import goal_of
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.study.study import keep_note
from lunar_tune.trial.layer_scores import LayerPrior, LayerSimilarities, Similarities
from lunar_tune.yaml_files import read_yaml, write_yaml

CURVE = {0: 0.1, 1: 0.9, 2: 0.7, 3: 0.2}
OWN = {"layer": 3, "coefficient": 0.9, "learning_rate": 0.003}  # search_spaces/tiny.yaml


def prior_of(
    scores: Mapping[int, float],
    recommended: Sequence[int],
    *,
    base_model: float = -1.0,
    unfinished: int = 0,
    **changes: Any,
) -> LayerPrior:
    """Return a prior of 12 answers with such scores (s1 - s2); the test knows what it recommends.

    `unfinished` answers of every layer do not end. The highest score is the best one's, the lowest
    layer's first.
    """
    best = min(scores, key=lambda layer: (-scores[layer], layer))
    values: dict[str, Any] = {
        "model": "tiny",
        "n_layers": 4,
        "best": best,
        "recommended": tuple(recommended),
        "data": "mini",
        "forget_edges": ("A_B",),
        "rows": 12,
        "coefficient": 0.5,
        "max_new_tokens": 32,
        "seed": 0,
        "embedding": "by hand",
        "base_model": Similarities(s1=base_model, s2=0.0, unfinished=0),
        "layers": tuple(
            LayerSimilarities(layer=layer, s1=score, s2=0.0, unfinished=unfinished)
            for layer, score in sorted(scores.items())
        ),
    }
    return LayerPrior(**(values | changes))


def planned(folder: Path, **options: Any) -> SearchPlan:
    return plan_search(SearchConfig(output=folder / "runs", **options))


def document_of(plan: SearchPlan) -> str:
    facts = {"uri": "sqlite:///x.db", "given": {}, "baseline": {}}
    return search_document(plan, name="n", resources=ONE_CPU, **facts)


def prior_file(folder: Path, **changes: Any) -> str:
    path = folder / "layers.json"
    path.write_text(prior_of(CURVE, [1, 2], **changes).document(), encoding="utf-8")
    return str(path)


def first_trials(plan: SearchPlan, folder: Path, count: int) -> list[dict[str, Any]]:
    study = open_study(Folder(folder), plan.space, plan.config)
    return [study.ask()[1] for _ in range(count)]


def test_the_usual_setting_is_the_first_that_the_space_names_else_the_middle() -> None:
    kinds = {
        "layer": IntDistribution(2, 7),
        "coefficient": FloatDistribution(1.0, 4.0),
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "ridge": CategoricalDistribution((1.0, 1e-4, 1e-2)),
        "even": CategoricalDistribution((4, 1, 2, 3)),
        "seed": IntDistribution(9, 9),
    }
    space = SearchSpace("lunar", "adamw", kinds, (), "a test")
    usual = dict(usual_point(space))
    space.check(usual)
    assert usual.pop("learning_rate") == pytest.approx(1e-3)
    assert usual == {"layer": 4, "coefficient": 2.5, "ridge": 1e-2, "even": 2, "seed": 9}
    points = ({"layer": 3}, {"layer": 1})
    assert usual_point(dataclasses.replace(space, starting_points=points)) == {"layer": 3}


def test_a_prior_narrows_the_plan_and_its_best_layer_comes_first(tmp_path: Path) -> None:
    plan = planned(tmp_path, layer_prior=prior_file(tmp_path))
    assert plan.space.parameters["layer"] == IntDistribution(1, 2)
    assert plan.spec.layers == (1, 2), "only these blocks' activations are captured"
    assert plan.facts["  layer"] == "1 … 2 by s1 - s2 (layers.json)"
    assert plan.facts["starting points"] == (
        "1 (the best layer by s1 - s2); left out: the space's own (layer: is 3, outside 1 … 2)"
    )
    assert first_trials(plan, tmp_path, 1) == [OWN | {"layer": 1}]
    document = read_yaml(document_of(plan))["resolved"]["layer_prior"]
    assert document["made_of_it"] == "1 … 2 by s1 - s2 (layers.json)"
    assert {one["layer"]: one["score"] for one in document["layers"]} == CURVE
    assert (document["best"], document["data"]) == (1, "mini")
    assert "layer_prior" not in read_yaml(document_of(planned(tmp_path)))["resolved"]

    path = prior_file(tmp_path, forget_edges=("B_C", "C_D"))
    facts = planned(tmp_path, layer_prior=path).facts
    assert facts["  layer"] == "1 … 2 by s1 - s2 (layers.json, scored on mini B_C+C_D)"


def test_auto_keeps_the_full_range_until_the_layers_are_scored(tmp_path: Path) -> None:
    plan = planned(tmp_path, layer_prior="auto")
    assert plan.layer_coefficient == OWN["coefficient"]
    assert plan.space.values_of("layer") == plan.spec.layers == (0, 1, 2, 3)
    assert "to be narrowed by s1 - s2 (auto, coefficient 0.9)" in plan.facts["  layer"]

    scored = plan.with_prior(prior_of(CURVE, [1, 2]))
    assert scored.layer_coefficient is None
    assert scored.space.parameters["layer"] == IntDistribution(1, 2)
    assert scored.spec.layers == (0, 1, 2, 3), "the worker has captured them"
    kept = read_yaml(document_of(scored))["resolved"]["space_before_layers"]
    assert kept["parameters"]["layer"]["high"] == 3
    assert scored.facts["  layer"] == "1 … 2 by s1 - s2 (auto, coefficient 0.5)"
    assert first_trials(scored, tmp_path, 1) == [OWN | {"layer": 1}]

    tie = plan.with_prior(prior_of(dict.fromkeys(range(4), 0.5), [0, 1, 2, 3]))
    assert tie.space == plan.space
    assert "all layers score the same" in tie.facts["  layer"]


def test_a_search_that_goes_on_keeps_its_layers_and_its_base_model(tmp_path: Path) -> None:
    """Scores of another machine may differ in the last digits, and so may what they recommend."""
    plan = planned(tmp_path, layer_prior="auto", name="n", resume="n")
    folder = make_folder(plan.config, plan.spec)
    console = Console(record=True, file=StringIO(), width=200)

    def begun(recommended: list[int], retain: float) -> str:
        session = session_of(plan, folder, MagicMock(), console=console)
        prior = prior_of(CURVE, recommended).document()
        study = session.begin(base_model(1.0, retain, layer_prior=prior))
        session._display.doing(None)
        assert session.plan.space.parameters["layer"] == IntDistribution(1, 2)
        assert study.ask()[1]["layer"] == 1
        return console.export_text()

    assert "differently" not in begun([1, 2], 1.0)
    assert "a little differently" in begun([1], 0.99)
    kept = folder.answers(None).stat()
    with pytest.raises(InputError, match="differs from that of the earlier"):
        begun([1], 0.9)
    assert folder.answers(None).stat() == kept, "a resume that is refused leaves the answers"
    config = read_yaml(folder.config)
    assert config["resolved"]["layer_prior"]["recommended"] == [1, 2]


def test_a_search_of_another_model_of_the_same_name_is_pointed_out(tmp_path: Path) -> None:
    plan = planned(tmp_path, name="n")
    other = make_search(tmp_path, "other", mirrored=False)
    config = dataclasses.replace(plan.config, start_from=(str(other.path), "none"))
    console = Console(record=True, file=StringIO(), width=200)
    for digest in ("a", "b"):
        keep_note(other.journal, "model", {"weights": ["float32", digest]})
        folder = Folder(tmp_path / digest)
        folder.path.mkdir()
        told = dataclasses.replace(plan, config=config)
        session = session_of(told, folder, MagicMock(), console=console)
        session.begin(base_model(model={"weights": ["float32", "a"]}))
        session._display.doing(None)
        said = f"{other.path} searched another tiny: its weights differ"
        assert (said in console.export_text()) is (digest == "b")


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        planned(folder, **options)
    return str(caught.value)


def space_file(folder: Path, layer: dict[str, Any], lowest: float = 1) -> str:
    kinds = {"layer": layer, "coefficient": {"type": "float", "low": lowest, "high": 3.5}}
    kinds["learning_rate"] = {"type": "fixed", "value": 0.01}
    path = folder / "space.yaml"
    path.write_text(write_yaml({"lunar": {"adamw": {"parameters": kinds}}}))
    return str(path)


def test_a_prior_that_has_no_use_is_refused(tmp_path: Path) -> None:
    """RMU edits a block, too, but moves activations along a random direction."""
    message = refusal(tmp_path, layer_prior=prior_file(tmp_path, model="other"))
    assert message.startswith("--layer-prior ")
    assert "was made for model 'other' with 4 decoder blocks, and the model is 'tiny'" in message
    for method, prior in (("npo", "auto"), ("rmu", prior_file(tmp_path))):
        message = refusal(tmp_path, method=method, layer_prior=prior)
        assert message.startswith(f"--layer-prior {prior}: layers are scored along LUNAR's")
        assert f"--method {method} has none" in message
    for layer in ({"type": "fixed", "value": 2}, {"type": "choice", "values": [2]}):
        path = space_file(tmp_path, layer)
        message = refusal(tmp_path, space=path, layer_prior="auto")
        assert message.startswith(f"--layer-prior auto: the space ({path}) has layer 2 alone")
    path = space_file(tmp_path, {"type": "int", "low": 0, "high": 3}, lowest=-3.5)
    message = refusal(tmp_path, space=path, layer_prior="auto")
    assert "the middle of the space's coefficients is 0" in message
    (bad := tmp_path / "bad.json").write_text("{}")
    message = refusal(tmp_path, layer_prior=str(bad), num_trials=0)
    for part in ("2 things are wrong:", "--num-trials 0", "bad.json: is not a layer prior"):
        assert part in message


FOUND = {"layer": 2, "coefficient": 4.0, "learning_rate": 0.001}
GOOD, BETTER, INFEASIBLE = (0.5, 0.9), (0.25, 0.9), (0.0, 0.5)  # forget and retain ROUGE-1


def searched(
    folder: Path,
    name: str,
    *trials: tuple[dict[str, Any], tuple[float, float]],
    confirmed: int | None = None,
    n_layers: int | None = 4,
    **tags: str,
) -> str:
    """Return the name of a search with such trials, settings and scores, none of them run."""
    settings = tuple(setting for setting, _ in trials)
    kinds = {
        key: CategoricalDistribution(tuple(sorted({one[key] for one in settings})))
        for key in settings[0]
    }
    space = SearchSpace("lunar", "adamw", kinds, settings, "a test")
    config = SearchConfig(output=folder / "runs", name=name, sampler="random")
    made = Folder(folder / "runs" / name)
    made.path.mkdir(parents=True)
    study = open_study(made, space, config)
    study.note("goal", goal_of(config).text)
    study.note("tags", TAGS | tags)
    run_trials(study, *(scores for _, scores in trials))
    if confirmed is not None:
        study.note("confirmed", {"number": confirmed, "scores": {}, "max_new_tokens": 512})
    resolved = {"n_layers": n_layers} if n_layers is not None else {}
    made.config.write_text(configuration_document(config, given={}, derived={}, resolved=resolved))
    return name


def best_file(folder: Path, **changes: Any) -> str:
    document = {"n_layers": 4, "method": "lunar", "solver": "adamw", "parameters": FOUND}
    path = folder / "best.yaml"
    path.write_text(write_yaml(document | changes))
    return str(path)


def starts(plan: SearchPlan) -> str:
    return plan.facts["starting points"]


def test_the_best_of_searches_of_other_models_are_a_studys_first_trials(tmp_path: Path) -> None:
    """The confirmed best; else the best feasible one as searched."""
    other = FOUND | {"layer": 3}
    third = FOUND | {"coefficient": 1.5}
    trials = (FOUND, GOOD), (other, BETTER), (third, INFEASIBLE)
    one = searched(tmp_path, "one", *trials, confirmed=0, model="other")
    two = searched(tmp_path, "two", *trials, model="other")
    file = best_file(tmp_path, parameters=third)
    plan = planned(tmp_path, start_from=(str(tmp_path / "runs" / one), two, file))

    assert first_trials(plan, tmp_path, 4) == [FOUND, other, third, OWN]
    places = f"found in {tmp_path / 'runs/one'}, found in two, found in {file}"
    assert starts(plan) == f"4 ({places}, the space's own)"
    assert "earlier trials" not in plan.facts

    own = searched(tmp_path, "own", (OWN, GOOD), model="other")
    plan = planned(tmp_path, start_from=(own, own, file))
    assert plan.space.starting_points == (OWN, third), "what is the same is tried once"
    assert starts(plan) == f"2 (found in own, found in {file})"


def test_of_the_same_model_every_trial_counts_by_the_goal_of_the_new_search(
    tmp_path: Path,
) -> None:
    other = FOUND | {"layer": 3, "coefficient": 9.0}
    one = searched(tmp_path, "one", (FOUND, GOOD), (other, INFEASIBLE))
    solved = {"layer": 1, "coefficient": 2.0, "ridge": 0.1}
    two = searched(tmp_path, "two", (solved, BETTER), solver="closed_form")
    three = searched(tmp_path, "three", (FOUND, GOOD), model="other")
    plan = planned(tmp_path, start_from=(one, two, three), constrain=("retain_rouge1>=0.4",))
    usual = f"found in two with the usual learning_rate {OWN['learning_rate']:g}"
    assert starts(plan) == f"2 (found in one, {usual})", "what is the same is tried once"
    assert plan.facts["earlier trials"] == "2 of one, 1 of two"

    study = open_study(Folder(tmp_path), plan.space, plan.config, plan.found.numbered)
    told = open_study(Folder(tmp_path), plan.space, plan.config).earlier
    assert told == study.earlier, "a resumed search has them, too"
    assert [dict(one.parameters) for one in told] == [
        FOUND,
        other,  # where it was, outside of the space
        {"layer": 1, "coefficient": 2.0, "learning_rate": OWN["learning_rate"]},
    ]
    assert [(one.value, one.search) for one in told] == [(0.5, 1), (0.0, 1), (0.25, 2)]
    missed = [one.missed["retain_rouge1>=0.4"] for one in told]
    assert missed == pytest.approx([-0.5, -0.1, -0.5])


def test_of_a_long_search_trials_count_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting_points, "MOST_TOLD", 3)
    trials = [(FOUND | {"coefficient": 1.0 + n}, (0.5 - n / 10, 0.9)) for n in range(5)]
    one = searched(tmp_path, "one", *trials)
    told = planned(tmp_path, start_from=(one,)).found.numbered
    assert [told_one.parameters["coefficient"] for told_one in told] == [1.0, 3.0, 5.0]


def test_trials_that_lack_what_the_goal_takes_do_not_count(tmp_path: Path) -> None:
    one = searched(tmp_path, "one", (FOUND, GOOD))
    plan = planned(tmp_path, start_from=(one,), minimise="forget_mrr")
    assert starts(plan) == "2 (found in one, the space's own)"
    assert plan.found.numbered == []


def test_without_the_spaces_own_points_the_found_ones_are_tried(tmp_path: Path) -> None:
    found, prior = (best_file(tmp_path), "none"), prior_file(tmp_path)
    plan = planned(tmp_path, start_from=found, layer_prior=prior)
    assert plan.space.starting_points == (FOUND,)
    assert starts(plan) == f"1 (found in {tmp_path / 'best.yaml'})"
    assert starts(planned(tmp_path, start_from=("none",))) == "none"


def test_what_lies_outside_is_moved_and_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    space = space_file(tmp_path, {"type": "choice", "values": [0, 3]})
    file = best_file(tmp_path, parameters=FOUND | {"coefficient": 5.25})
    plan = planned(tmp_path, space=space, start_from=(file,))
    expected = {"layer": 3, "coefficient": 3.5, "learning_rate": 0.01}
    assert first_trials(plan, tmp_path, 1) == [expected]
    moves = "layer 2 → 3 and coefficient 5.25 → 3.5 and learning_rate 0.001 → 0.01"
    assert starts(plan) == f"1 (found in {file} with {moves})"
    file = best_file(tmp_path, parameters={"layer": 9, "learning_rate": 0.001, "ridge": 1.0})
    text = starts(planned(tmp_path, start_from=(file,)))
    assert text.startswith(f"1 (the space's own); left out: found in {file} (")
    for part in ("coefficient: is missing", "ridge: "):
        assert part in text


def test_of_another_solver_layer_and_coefficient_are_taken_and_the_rest_is_as_usual(
    tmp_path: Path,
) -> None:
    setting = {"layer": 2, "coefficient": 4.0, "ridge": 0.1}
    solved = searched(tmp_path, "solved", (setting, GOOD), solver="closed_form", model="other")
    plan = planned(tmp_path, start_from=(solved,))
    expected = {"layer": 2, "coefficient": 4.0, "learning_rate": OWN["learning_rate"]}
    assert plan.space.starting_points[0] == expected
    usual = f"with the usual learning_rate {OWN['learning_rate']:g}"
    assert starts(plan) == f"2 (found in solved {usual}, the space's own)"


def test_found_settings_follow_the_best_layer_in_the_narrowed_range(tmp_path: Path) -> None:
    """The layer is moved once, from where it was found to the nearest that is left."""
    setting = FOUND | {"layer": 0, "coefficient": 9.0}
    name = searched(tmp_path, "one", (setting, GOOD), model="other")
    plan = planned(tmp_path, start_from=(name,), layer_prior="auto")
    assert starts(plan) == "2 (found in one with coefficient 9 → 8, the space's own)"
    scored = plan.with_prior(prior_of(CURVE, [1, 2]))
    moved = FOUND | {"layer": 1, "coefficient": 8.0}
    assert scored.space.starting_points == (OWN | {"layer": 1}, moved)
    assert starts(scored) == (
        "2 (the best layer by s1 - s2, found in one with layer 0 → 1 and coefficient 9 → 8); "
        "left out: the space's own (layer: is 3, outside 1 … 2)"
    )


def test_a_layer_of_a_deeper_model_is_carried_over_by_depth(tmp_path: Path) -> None:
    """28 blocks, by the search's configuration and by best.yaml; 4 of tiny."""
    for layer, expected in ((0, 0), (9, 1), (20, 2), (27, 3)):
        setting = FOUND | {"layer": layer}
        name = searched(tmp_path, f"of {layer}", (setting, GOOD), n_layers=28)
        for source in (name, best_file(tmp_path, parameters=setting, n_layers=28)):
            plan = planned(tmp_path, start_from=(source,))
            assert plan.space.starting_points[0] == FOUND | {"layer": expected}
            assert f" (layer {layer} of 28 → {expected} of 4 by depth)" in starts(plan)


def test_what_cannot_be_started_from_is_said_in_one_message(tmp_path: Path) -> None:
    nothing = searched(tmp_path, "nothing", (FOUND, INFEASIBLE))
    npo = searched(tmp_path, "npo", ({"learning_rate": 0.1}, GOOD), method="npo", solver="lora")
    deep = searched(tmp_path, "deep", (FOUND, GOOD), n_layers=None)
    message = refusal(tmp_path, start_from=(nothing, npo, deep, "absent"), num_trials=0)
    assert message.startswith("5 things are wrong:")
    for part in (
        "--num-trials 0",
        "--start-from nothing: none of its trials is feasible",
        "--start-from npo: has a setting of npo, and this search is of lunar",
        "--start-from deep: n_layers: is empty",
        "absent: there is no such search",
    ):
        assert part in message


def test_a_file_that_is_no_best_setting_is_refused(tmp_path: Path) -> None:
    for changes, part in (
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"layer": True}}, "parameters.layer"),
        ({"solver": None}, "solver"),
        ({"n_layers": None}, "n_layers: is empty"),
    ):
        message = refusal(tmp_path, start_from=(best_file(tmp_path, **changes),))
        assert message.startswith(f"--start-from {tmp_path / 'best.yaml'}: {part}")
        assert "Name a search, or the best.yaml of one" in message


def test_a_resumed_search_has_what_was_found_when_it_began(tmp_path: Path) -> None:
    """The study has it queued; the other search may be gone, and no other is taken instead."""
    file = best_file(tmp_path, n_layers=7, parameters=FOUND | {"coefficient": 9.0})
    plan = planned(tmp_path, start_from=(file,), name="n")
    folder = make_folder(plan.config, plan.spec)
    open_study(folder, plan.space, plan.config)
    folder.config.write_text(document_of(plan))
    Path(file).unlink()

    problems = Problems()
    given: dict[str, Any] = {"resume": "n", "output": tmp_path / "runs"}
    config, _ = resumed(given, problems)
    again = plan_search(config)
    assert signature_of(again) == signature_of(plan) == signature_of(planned(tmp_path))
    first = [FOUND | {"layer": 1, "coefficient": 8.0}, OWN]
    study = open_study(folder, again.space, config)
    assert [study.ask()[1] for _ in first] == first
    assert problems.messages == []
    resumed({**given, "start_from": ("x",)}, problems)
    assert "--start-from: n was begun with another value or none" in problems.messages[0]


# What scored layers make of a space

GAINS = {0: 0.1, 1: 0.7, 2: 0.9, 3: 0.2}  # over -1: gains 1.1, 1.7, 1.9, 1.2; 80 % of 1.9 is 1.52


def space_with(layer: Parameter) -> SearchSpace:
    parameters = {"layer": layer, "coefficient": FloatDistribution(0.5, 8.0)}
    points = ({"layer": 0, "coefficient": 2.0},)
    return SearchSpace("lunar", "adamw", parameters, points, "a test")


def chosen(layer: Parameter, prior: LayerPrior) -> tuple[SearchSpace, int | None, str]:
    return choose_layers(space_with(layer), prior, origin="l.json")


def test_an_int_range_becomes_the_smallest_that_holds_the_recommended_layers() -> None:
    """Answers that mostly do not end tell little."""
    space = space_with(IntDistribution(0, 3))
    narrowed, best, text = choose_layers(space, prior_of(GAINS, [1, 2]), origin="l.json")
    assert (best, text) == (2, "1 … 2 by s1 - s2 (l.json)")
    assert list(narrowed.parameters) == list(space.parameters), "the order of the method"
    assert space.parameters["layer"] == IntDistribution(0, 3), "the space itself is left alone"
    tie = prior_of({0: 0.0, 1: 0.9, 2: 0.9, 3: 0.1}, [1, 2])
    assert chosen(IntDistribution(0, 3), tie)[1] == 1, "of equal ones the lowest is the best"
    for unfinished in (6, 7):
        text = chosen(IntDistribution(0, 3), prior_of(GAINS, [1, 2], unfinished=unfinished))[2]
        assert ("most answers there do not end" in text) is (unfinished > 6)


def test_layers_between_recommended_ones_stay_in_a_range_and_not_in_a_choice() -> None:
    prior = prior_of({0: 0.9, 1: -0.9, 2: 0.8, 3: -0.8}, [0, 2])
    assert chosen(IntDistribution(0, 3), prior)[0].parameters["layer"] == IntDistribution(0, 2)
    kept = chosen(CategoricalDistribution((3, 2, 1, 0)), prior)[0].parameters["layer"]
    assert kept == CategoricalDistribution((2, 0)), "in the order of the file"
    prior = prior_of({0: -0.9, 1: -0.8, 2: -0.7, 3: 0.9}, [3])
    assert chosen(IntDistribution(0, 3), prior)[2] == "3 by s1 - s2 (l.json)"


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(0, 9), st.integers(0, 9))
def test_what_is_left_is_as_small_as_can_be(wanted: set[int], one: int, other: int) -> None:
    """Against brute force: the shortest run of the space's layers that holds those in it."""
    low, high = min(one, other), max(one, other)
    scores = {layer: 1.0 if layer in wanted else 0.0 for layer in range(10)}
    if len(wanted) == 10:
        scores[9] = 0.99
    prior = prior_of(scores, sorted(wanted), n_layers=10)
    space = space_with(IntDistribution(low, high))
    inside = {layer for layer in wanted if low <= layer <= high}
    if not inside:
        with pytest.raises(InputError, match=r"--layer-prior l.*recommends layer.*\(a test\) has"):
            choose_layers(space, prior, origin="l")
        return
    runs = [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]
    fitting = (run for run in runs if inside <= set(range(run[0], run[1] + 1)))
    shortest = min(fitting, key=lambda run: run[1] - run[0])
    narrowed, best, _ = choose_layers(space, prior, origin="l")
    assert bounds_of(narrowed.parameters["layer"]) == shortest
    assert best in inside


def test_scores_that_tell_nothing_leave_the_space_as_it_is() -> None:
    space = space_with(IntDistribution(0, 3))
    for curve, unedited, reason in (
        ({0: 0.66, 1: 0.66 + 1e-12, 2: 0.66, 3: 0.66}, -1.5, "all layers score the same"),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, 0.4, "no layer gains on the base model"),
        ({2: 0.9}, -1.0, "layer 2 alone was scored, and compared with none"),
    ):
        prior = prior_of(curve, [max(curve)], base_model=unedited)
        text = f"0 … 3, as in the space: {reason} (l.json)"
        assert choose_layers(space, prior, origin="l.json") == (space, None, text)


# With a coefficient of 2 the tiny model repeats itself whichever layer is steered.
SPACE = """
lunar:
  adamw:
    parameters:
      layer: {type: int, low: 0, high: 3}
      coefficient: {type: float, low: 0.5, high: 8.0}
      learning_rate: {type: float, low: 1e-4, high: 3e-2, log: true}
    starting_points:
      - {layer: 1, coefficient: 0.5, learning_rate: 0.003}
"""


@pytest.mark.slow  # a search of its own
def test_a_search_keeps_to_the_layers_that_it_scores_as_the_command_does(
    finished: SharedSearch,
    empty_store: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the worker that then runs the trials; what another search found is tried second."""
    monkeypatch.chdir(tmp_path)
    empty_store(tmp_path / "runs" / "mlflow.db")
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    found = finished.copied(tmp_path / "runs")
    options = ["--space", "space.yaml", "--layer-prior", "auto", "--name", "n"]
    options += ["--start-from", f"{found}/best.yaml"]
    options += ["--num-trials", "2", "--factual-data", "none", "--retain-rows", "12"]
    done = without_ray(SEARCH, *options, "--fix", "epochs=6", "--output", "runs", "--in-process")
    assert (done.exit_code in {0, 3}, done.stderr) == (True, "")
    prior = read_yaml(tmp_path / "runs/n/config.yaml")["resolved"]["layer_prior"]
    gains = {one["layer"]: one["score"] - prior["base_model"]["score"] for one in prior["layers"]}
    good = [layer for layer, gain in gains.items() if gain >= 0.8 * max(gains.values())]
    assert len(good) < 4, "else this would show nothing"
    first, second = (
        {name: row[f"params.{name}"] for name in OWN} for row in rows_of(tmp_path / "runs/n")
    )
    best = max(gains, key=lambda layer: gains[layer])
    assert first == {"layer": best, "coefficient": 0.5, "learning_rate": 0.003}
    before = read_yaml(found / "best.yaml")["parameters"]
    moved = min(max(before["layer"], min(good)), max(good))
    assert second == pytest.approx(before | {"layer": moved})
    for said in ("found in ", "to be narrowed by s1 - s2 (auto, coefficient 0.5)"):
        assert said in done.stdout

    assert LAYERS.main(["--fix", "coefficient=0.5", "--json", "l.json"]) == 0
    expected = json.loads(Path("l.json").read_text())
    assert (prior["best"], prior["recommended"]) == (expected["best"], expected["recommended"])
    for one, other in zip(prior["layers"], expected["layers"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)

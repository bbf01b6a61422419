"""Which settings come first: of scored layers, of other searches, of the space."""

from __future__ import annotations

import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from made_outcomes import base_model
from made_search import ONE_CPU, session_of
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from priors import prior_of
from rich.console import Console
from test_study import run_trials
from tracked_searches import TAGS

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.persistence import resumed, search_document, signature_of
from lunar_tune.driver.plan import SearchPlan, make_folder, plan_search
from lunar_tune.driver.space import SearchSpace, open_study
from lunar_tune.driver.starting_points import usual_point
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.goal import goal_of
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.yaml_files import read_yaml, write_yaml

CURVE = {0: 0.1, 1: 0.2, 2: 0.7, 3: 0.9}
OWN = {"layer": 1, "coefficient": 1.0, "learning_rate": 0.003}  # search_spaces/tiny.yaml


def planned(folder: Path, **options: Any) -> SearchPlan:
    return plan_search(SearchConfig(output=folder / "runs", **options))


def document_of(plan: SearchPlan) -> str:
    """Return the `config.yaml` of a search as planned."""
    facts = {"uri": "sqlite:///x.db", "given": {}, "baseline": {}}
    return search_document(plan, name="n", resources=ONE_CPU, **facts)


def prior_file(folder: Path, **changes: Any) -> str:
    path = folder / "layers.json"
    path.write_text(prior_of(CURVE, [2, 3], **changes).document(), encoding="utf-8")
    return str(path)


def first_trials(plan: SearchPlan, folder: Path, count: int) -> list[dict[str, Any]]:
    study = open_study(folder / "study.journal", name="s", space=plan.space, config=plan.config)
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
    assert plan.space.parameters["layer"] == IntDistribution(2, 3)
    assert plan.spec.layers == (2, 3), "only these blocks' activations are captured"
    assert plan.facts["  layer"] == "2 … 3 by s1 - s2 (layers.json)"
    assert plan.facts["starting points"] == (
        "1 (the best layer by s1 - s2); left out: the space's own (layer: is 1, outside 2 … 3)"
    )
    assert first_trials(plan, tmp_path, 1) == [OWN | {"layer": 3}]
    document = read_yaml(document_of(plan))["resolved"]["layer_prior"]
    assert document["made_of_it"] == "2 … 3 by s1 - s2 (layers.json)"
    assert {one["layer"]: one["score"] for one in document["layers"]} == CURVE
    assert (document["best"], document["data"]) == (3, "mini")
    assert "layer_prior" not in read_yaml(document_of(planned(tmp_path)))["resolved"]

    path = prior_file(tmp_path, forget_edges=("B_C", "C_D"))
    facts = planned(tmp_path, layer_prior=path).facts
    assert facts["  layer"] == "2 … 3 by s1 - s2 (layers.json, scored on mini B_C+C_D)"


def test_auto_keeps_the_full_range_until_the_layers_are_scored(tmp_path: Path) -> None:
    """And after it, where the scores tell nothing."""
    plan = planned(tmp_path, layer_prior="auto")
    assert plan.layer_coefficient == OWN["coefficient"]
    assert plan.space.values_of("layer") == plan.spec.layers == (0, 1, 2, 3)
    assert "to be narrowed by s1 - s2 (auto, coefficient 1)" in plan.facts["  layer"]

    scored = plan.with_own_prior(prior_of(CURVE, [2, 3]).document())
    assert scored.layer_coefficient is None
    assert scored.space.parameters["layer"] == IntDistribution(2, 3)
    assert scored.spec.layers == (0, 1, 2, 3), "the worker has captured them"
    assert scored.facts["  layer"] == "2 … 3 by s1 - s2 (auto, coefficient 0.5)"
    assert first_trials(scored, tmp_path, 1) == [OWN | {"layer": 3}]

    tie = plan.with_own_prior(prior_of(dict.fromkeys(range(4), 0.5), [0, 1, 2, 3]).document())
    assert tie.space == plan.space
    assert "all layers score the same" in tie.facts["  layer"]


def test_a_search_that_goes_on_keeps_its_layers_and_finds_out_another_base_model(
    tmp_path: Path,
) -> None:
    """Scores of another machine may differ in the last digits, and so may what they recommend."""
    plan = planned(tmp_path, layer_prior="auto", name="n", resume=True)
    folder = make_folder(plan.config, plan.spec)
    console = Console(record=True, file=StringIO(), width=200)

    def begun(recommended: list[int], retain: float) -> str:
        session = session_of(plan, folder, MagicMock(), console=console)
        prior = prior_of(CURVE, recommended).document()
        study = session.begin(dataclasses.replace(base_model(1.0, retain), layer_prior=prior))
        session._display.doing(None)
        assert session.plan.space.parameters["layer"] == IntDistribution(2, 3)
        assert study.ask()[1]["layer"] == 3
        return console.export_text()

    assert "differently" not in begun([2, 3], 1.0)
    assert "a little differently" in begun([3], 0.99)
    with pytest.raises(InputError, match="another one than"):
        begun([3], 0.9)
    config = read_yaml(folder.config)
    assert config["resolved"]["layer_prior"]["recommended"] == [2, 3]


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
    assert "was made for model 'other' with 4 decoder blocks, and this is 'tiny'" in message
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
    for part in ("2 things are wrong:", "--num-trials 0", "bad.json: is no layer prior"):
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
    study = open_study(made.journal, name=name, space=space, config=config)
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


def test_the_best_of_other_searches_are_a_studys_first_trials(tmp_path: Path) -> None:
    """The confirmed best; else the best feasible one as searched."""
    other = FOUND | {"layer": 3}
    third = FOUND | {"coefficient": 1.5}
    trials = (FOUND, GOOD), (other, BETTER), (third, INFEASIBLE)
    one = searched(tmp_path, "one", *trials, confirmed=0)
    two = searched(tmp_path, "two", *trials)
    file = best_file(tmp_path, parameters=third)
    plan = planned(tmp_path, start_from=(str(tmp_path / "runs" / one), two, file))

    assert first_trials(plan, tmp_path, 4) == [FOUND, other, third, OWN]
    places = f"found in {tmp_path / 'runs/one'}, found in two, found in {file}"
    assert starts(plan) == f"4 ({places}, the space's own)"

    own = searched(tmp_path, "own", (OWN, GOOD))
    plan = planned(tmp_path, start_from=(own, own, file))
    assert plan.space.starting_points == (OWN, third), "what is the same is tried once"
    assert starts(plan) == f"2 (found in own, found in {file})"


def test_without_the_spaces_own_points_the_found_ones_are_tried_all_the_same(
    tmp_path: Path,
) -> None:
    found, prior = (best_file(tmp_path), "none"), prior_file(tmp_path)
    plan = planned(tmp_path, start_from=found, layer_prior=prior)
    assert plan.space.starting_points == (FOUND,)
    assert starts(plan) == f"1 (found in {tmp_path / 'best.yaml'})"
    assert starts(planned(tmp_path, start_from=("none",))) == "none"


def test_what_lies_outside_the_space_is_moved_and_what_does_not_fit_is_left_out(
    tmp_path: Path,
) -> None:
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


def test_found_settings_follow_the_best_layer_and_keep_to_the_narrowed_range(
    tmp_path: Path,
) -> None:
    """The layer is moved once, from where it was found to the nearest that is left."""
    name = searched(tmp_path, "one", (FOUND | {"layer": 0, "coefficient": 9.0}, GOOD))
    plan = planned(tmp_path, start_from=(name,), layer_prior="auto")
    assert starts(plan) == "2 (found in one with coefficient 9 → 8, the space's own)"
    scored = plan.with_own_prior(prior_of(CURVE, [2, 3]).document())
    moved = FOUND | {"coefficient": 8.0}
    assert scored.space.starting_points == (OWN | {"layer": 3}, moved)
    assert starts(scored) == (
        "2 (the best layer by s1 - s2, found in one with layer 0 → 2 and coefficient 9 → 8); "
        "left out: the space's own (layer: is 1, outside 2 … 3)"
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
    solved = searched(tmp_path, "solved", (FOUND, GOOD), solver="closed_form")
    deep = searched(tmp_path, "deep", (FOUND, GOOD), n_layers=None)
    message = refusal(tmp_path, start_from=(nothing, npo, solved, deep, "absent"), num_trials=0)
    assert message.startswith("6 things are wrong:")
    for part in (
        "--num-trials 0",
        "--start-from nothing: none of its trials is feasible",
        "--start-from npo: has a setting of npo (lora), and this search is of lunar (adamw)",
        "--start-from solved: has a setting of lunar (closed_form), and this search is of lunar",
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
    open_study(folder.journal, name="n", space=plan.space, config=plan.config)
    folder.config.write_text(document_of(plan))
    Path(file).unlink()

    problems = Problems()
    given: dict[str, Any] = {"resume": "n", "output": tmp_path / "runs"}
    config, _ = resumed(given, problems)
    again = plan_search(config)
    assert signature_of(again) == signature_of(plan) == signature_of(planned(tmp_path))
    first = [FOUND | {"layer": 1, "coefficient": 8.0}, OWN]
    study = open_study(folder.journal, name="n", space=again.space, config=config)
    assert [study.ask()[1] for _ in first] == first
    assert problems.messages == []
    resumed({**given, "start_from": ("x",)}, problems)
    assert "--start-from: n was begun with another value or none" in problems.messages[0]

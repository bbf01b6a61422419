"""Which settings come first, and a plan that puts scored layers and tuned settings together.

Covers: middles of ranges, the order of tuned settings, what is left out; plans, and the first
trials of a study made from one.
Does not cover: whole searches (`test_layer_prior_search`), keeping settings (`test_tuned_store`).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from priors import prior_of
from rich.console import Console
from tuned import tuned_setting

from lunar_tune.config.gradient_settings import GradientSettings
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.search.backends.ray.cluster import Resources
from lunar_tune.search.outputs import make_folder
from lunar_tune.search.plan import SearchPlan, plan_search, resolved_values
from lunar_tune.search.samplers import open_study
from lunar_tune.search.session import SearchSession
from lunar_tune.search.space.space import Choice, Fixed, FloatRange, IntRange, SearchSpace
from lunar_tune.search.starting_points import (
    StartingPoint,
    fitting,
    own_points,
    tuned_points,
    usual_point,
)
from lunar_tune.search.table5.table_cells import Cell
from lunar_tune.search.tuned.tuned_settings import TunedSetting
from lunar_tune.search.tuned.tuned_store import keep_setting

CURVE = {0: 0.1, 1: 0.2, 2: 0.7, 3: 0.9}
OWN = {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003}  # search_spaces/tiny.yaml


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of tuned settings that is this test's alone."""
    monkeypatch.setenv("LUNAR_TUNE_TUNED", str(tmp_path / "tuned"))
    return tmp_path / "tuned"


def planned(folder: Path, **options: Any) -> SearchPlan:
    return plan_search(SearchConfig(output=folder / "runs", **options))


def prior_file(folder: Path, **changes: Any) -> str:
    path = folder / "layers.json"
    path.write_text(prior_of(CURVE, [2, 3], **changes).document(), encoding="utf-8")
    return str(path)


def first_trials(plan: SearchPlan, folder: Path, count: int) -> list[dict[str, Any]]:
    study = open_study(folder / "study.journal", name="s", space=plan.space, config=plan.config)
    return [study.ask()[1] for _ in range(count)]


def space_of(**parameters: Any) -> SearchSpace:
    return SearchSpace("lunar", "adamw", parameters, (), "a test")


def test_the_usual_setting_is_the_middle_where_the_space_names_none() -> None:
    space = space_of(
        layer=IntRange(low=2, high=7),
        coefficient=FloatRange(low=1.0, high=4.0),
        learning_rate=FloatRange(low=1e-4, high=1e-2, log=True),
        ridge=Choice(values=(1.0, 1e-4, 1e-2)),
        even=Choice(values=(4, 1, 2, 3)),
        seed=Fixed(value=9),
    )
    usual = usual_point(space)
    assert usual.pop("learning_rate") == pytest.approx(1e-3)
    assert usual == {"layer": 4, "coefficient": 2.5, "ridge": 1e-2, "even": 2, "seed": 9}
    space.check({**usual, "learning_rate": math.sqrt(1e-4 * 1e-2)})


def test_the_usual_setting_is_the_first_that_the_space_names() -> None:
    points = ({"layer": 3}, {"layer": 1})
    space = dataclasses.replace(space_of(layer=IntRange(low=0, high=3)), starting_points=points)
    assert usual_point(space) == {"layer": 3}


def test_points_outside_the_space_are_left_out_and_named() -> None:
    space = space_of(layer=IntRange(low=0, high=3), coefficient=FloatRange(low=0.5, high=2.0))
    good = {"layer": 1, "coefficient": 1.0}
    points = fitting(
        [
            StartingPoint({"layer": 9, "coefficient": 3.0}, "tuned on a A_B"),
            StartingPoint(good, "tuned on b A_B"),
            StartingPoint({"layer": 1}, "tuned on c A_B"),
            StartingPoint(dict(good), "the space's own"),
        ],
        space,
    )
    assert points.values == (good,)
    assert points.text == (
        "1 (tuned on b A_B); left out: tuned on a A_B (layer: is 9, outside 0 … 3, coefficient: is "
        "3, outside 0.5 … 2); tuned on c A_B (coefficient: is missing)"
    )


def names(settings: list[TunedSetting], **changes: Any) -> list[str]:
    wanted: dict[str, Any] = {"data": "mini", "forget_edges": ("A_B",), "method": "lunar"}
    points = tuned_points(settings, **(wanted | {"variant": "adamw"} | changes))
    return [point.origin.removeprefix("tuned on ") for point in points]


def test_what_was_tuned_on_the_same_data_comes_first_then_three_others() -> None:
    """The others: of the same data first, then the newest."""
    settings = [
        tuned_setting("old", date="2024-01-01"),
        tuned_setting("new", date="2026-01-01"),
        tuned_setting("mini", ("B_C",), date="2023-01-01"),
        tuned_setting("newer", ("A_B", "C_D"), date="2026-02-02"),
        tuned_setting("mini", ("A_B",), date="2020-01-01"),
        tuned_setting("mini", ("A_B",), variant="lora"),
        tuned_setting("mini", ("A_B",), method="npo"),
    ]
    assert names(settings) == ["mini A_B", "mini B_C", "newer A_B+C_D", "new A_B"]
    assert names(settings) == names(settings[::-1])
    assert names(settings, variant="lora") == ["mini A_B"]
    assert names(settings, forget_edges=("X",)) == ["mini B_C", "mini A_B", "newer A_B+C_D"]
    assert names(settings, method="ga") == []
    swapped = names(settings, data="newer", forget_edges=("C_D", "A_B"))
    assert swapped[0] == "newer A_B+C_D", "the order of edges says nothing"


def test_a_prior_narrows_the_plan_and_its_best_layer_comes_first(tmp_path: Path) -> None:
    plan = planned(tmp_path, layer_prior=prior_file(tmp_path))

    assert plan.space.parameters["layer"] == IntRange(low=2, high=3)
    assert plan.spec.layers == (2, 3), "only these blocks' activations are captured"
    assert plan.facts["  layer"] == "2 … 3 by s1 - s2 (layers.json)"
    assert plan.facts["starting points"] == (
        "1 (the best layer by s1 - s2); left out: the space's own (layer: is 1, outside 2 … 3)"
    )
    assert first_trials(plan, tmp_path, 1) == [OWN | {"layer": 3}]


def test_the_configuration_has_the_curve_and_what_was_made_of_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, layer_prior=prior_file(tmp_path))
    document = resolved_values(plan, {})["layer_prior"]
    assert document["made_of_it"] == "2 … 3 by s1 - s2 (layers.json)"
    assert {one["layer"]: one["score"] for one in document["layers"]} == CURVE
    assert (document["best"], document["data"]) == (3, "mini")
    assert "layer_prior" not in resolved_values(planned(tmp_path), {})


def test_a_prior_of_other_data_says_so(tmp_path: Path) -> None:
    path = prior_file(tmp_path, forget_edges=("B_C", "C_D"))
    facts = planned(tmp_path, layer_prior=path).facts
    assert facts["  layer"] == "2 … 3 by s1 - s2 (layers.json, scored on mini B_C+C_D)"


def test_auto_keeps_the_full_range_until_the_layers_are_scored(tmp_path: Path) -> None:
    plan = planned(tmp_path, layer_prior="auto")
    assert plan.layer_coefficient == OWN["coefficient"]
    assert plan.space.values_of("layer") == plan.spec.layers == (0, 1, 2, 3)
    assert "to be narrowed by s1 - s2 (auto, coefficient 2)" in plan.facts["  layer"]

    scored = plan.with_own_prior(prior_of(CURVE, [2, 3]).document())
    assert scored.layer_coefficient is None
    assert scored.space.parameters["layer"] == IntRange(low=2, high=3)
    assert scored.spec.layers == (0, 1, 2, 3), "the worker has captured them"
    assert scored.facts["  layer"] == "2 … 3 by s1 - s2 (auto, coefficient 0.5)"
    assert first_trials(scored, tmp_path, 1) == [OWN | {"layer": 3}]


def test_a_search_that_goes_on_keeps_the_layers_that_it_began_with(tmp_path: Path) -> None:
    """Scores of another machine may differ in the last digits, and so may what they recommend."""
    plan = planned(tmp_path, layer_prior="auto", name="n", resume=True)
    folder = make_folder(plan.config, plan.spec)
    vanilla = {"forget_rouge1": 1.0, "retain_rouge1": 1.0}
    for recommended in ([2, 3], [3]):
        session = SearchSession(
            plan,
            folder,
            Resources(cpus=1, gpus=0, concurrency=1),
            lambda: MagicMock(uri="sqlite:///x.db", address={}, continued=False),
            console=Console(quiet=True),
            given={},
        )
        study = session.on_vanilla(vanilla, None, prior_of(CURVE, recommended).document())
        assert session.plan.space.parameters["layer"] == IntRange(low=2, high=3)
        assert study.ask()[1]["layer"] == 3
        session._display.doing(None)
    config = yaml.safe_load(folder.config.read_text())
    assert config["resolved"]["layer_prior"]["recommended"] == [2, 3]


def test_scores_that_tell_nothing_leave_space_and_points(tmp_path: Path) -> None:
    tie = prior_of(dict.fromkeys(range(4), 0.5), [0, 1, 2, 3])
    plan = planned(tmp_path, layer_prior="auto")
    scored = plan.with_own_prior(tie.document())
    assert scored.space == plan.space
    assert "all layers score the same" in scored.facts["  layer"]
    assert first_trials(scored, tmp_path, 1) == [OWN]


def test_without_starting_points_a_prior_only_narrows(tmp_path: Path) -> None:
    plan = planned(tmp_path, layer_prior=prior_file(tmp_path), starting_points=False)
    (first,) = first_trials(plan, tmp_path, 1)
    assert first["layer"] in {2, 3}
    assert first["coefficient"] != OWN["coefficient"]
    assert "starting points" not in plan.facts


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        planned(folder, **options)
    return str(caught.value)


def test_a_prior_of_another_model_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, layer_prior=prior_file(tmp_path, model="other"))
    assert message.startswith("--layer-prior ")
    assert "was made for model 'other' with 4 decoder blocks, and this is 'tiny'" in message


@pytest.mark.parametrize("method", ["npo", "rmu"])
@pytest.mark.parametrize("named", ["auto", "FILE"])
def test_a_prior_for_a_method_without_vectors_is_refused(
    tmp_path: Path, method: str, named: str
) -> None:
    run = RunOptions(method=method, gradient=GradientSettings(trained="lora"))
    prior = "auto" if named == "auto" else prior_file(tmp_path)
    message = refusal(tmp_path, run=run, layer_prior=prior)
    assert message.startswith(f"--layer-prior {prior}: layers are scored along LUNAR's")


def test_a_prior_for_a_fixed_layer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "lunar: {adamw: {parameters: {layer: {type: fixed, value: 2}, coefficient: "
        "{type: fixed, value: 2.0}, learning_rate: {type: fixed, value: 0.01}}}}"
    )
    message = refusal(tmp_path, space=str(path), layer_prior="auto")
    assert message.startswith(f"--layer-prior auto: the space ({path}) has layer 2 alone")


def test_a_coefficient_of_zero_scores_no_layers(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "lunar: {adamw: {parameters: {layer: {type: int, low: 0, high: 3}, coefficient: "
        "{type: float, low: -2, high: 2}, learning_rate: {type: fixed, value: 0.01}}}}"
    )
    assert "the middle of the space's coefficients is 0" in refusal(
        tmp_path, space=str(path), layer_prior="auto"
    )


def test_a_file_that_is_no_prior_is_said_with_everything_else(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    message = refusal(tmp_path, layer_prior=str(tmp_path / "bad.json"), num_trials=0)
    assert message.startswith("2 things are wrong:")
    for part in ("--num-trials 0", "bad.json: is no layer prior"):
        assert part in message
    message = refusal(tmp_path, layer_prior=str(tmp_path / "nosuch.json"))
    assert "nosuch.json: cannot be read" in message


def test_tuned_settings_are_a_studys_first_trials(tmp_path: Path, kept: Path) -> None:
    other = {"layer": 3, "coefficient": 4.0, "learning_rate": 0.001}
    keep_setting("tiny", tuned_setting("contracts", parameters=other))
    keep_setting("tiny", tuned_setting("far", parameters=other | {"layer": 17}))
    mine = tuned_setting()
    keep_setting("tiny", mine)
    keep_setting("tiny-2", tuned_setting("elsewhere"))
    plan = planned(tmp_path)

    assert first_trials(plan, tmp_path, 3) == [mine.parameters, other, OWN]
    assert plan.facts["starting points"] == (
        "3 (tuned on mini A_B, tuned on contracts A_B, the space's own); left out: tuned on far "
        "A_B (layer: is 17, outside 0 … 3)"
    )
    assert (kept / "tiny.yaml").is_file()


@pytest.mark.usefixtures("kept")
def test_without_starting_points_nothing_tuned_is_tried(tmp_path: Path) -> None:
    mine = tuned_setting()
    keep_setting("tiny", mine)
    plan = planned(tmp_path, starting_points=False)
    assert first_trials(plan, tmp_path, 1) != [mine.parameters]
    assert plan.space.starting_points == (OWN,)


@pytest.mark.usefixtures("kept")
def test_tuned_settings_follow_the_best_layer_and_keep_to_the_narrowed_range(
    tmp_path: Path,
) -> None:
    inside = {"layer": 2, "coefficient": 4.0, "learning_rate": 0.001}
    keep_setting("tiny", tuned_setting(parameters=inside))
    keep_setting("tiny", tuned_setting("contracts", parameters=inside | {"layer": 0}))
    plan = planned(tmp_path, layer_prior=prior_file(tmp_path))
    assert plan.space.starting_points == (OWN | {"layer": 3}, inside)
    assert "left out: tuned on contracts A_B (layer: is 0" in plan.facts["starting points"]


@pytest.mark.usefixtures("kept")
def test_a_comparison_of_methods_is_without_tuned_settings(tmp_path: Path) -> None:
    """Else a table that goes on would find its cells made with other settings."""
    cell = Cell(model="tiny", data="", method="lunar", variant="adamw", seed=0)
    before = plan_search(cell.config(SearchConfig(output=tmp_path / "runs")))
    keep_setting("tiny", tuned_setting())
    after = plan_search(cell.config(SearchConfig(output=tmp_path / "runs")))
    assert before.space == after.space
    assert after.space.starting_points == (OWN,)


def test_a_bad_file_of_tuned_settings_is_said_with_the_way_around(
    tmp_path: Path, kept: Path
) -> None:
    kept.mkdir()
    (kept / "tiny.yaml").write_text("model: tiny\nentries: 3\n")
    message = refusal(tmp_path, num_trials=0)
    for part in ("--num-trials 0", "tiny.yaml: entries: ", "--no-starting-points goes without"):
        assert part in message
    planned(tmp_path, starting_points=False)
    (kept / "tiny.yaml").rename(kept / "other.yaml")
    planned(tmp_path)


def test_points_of_the_space_alone_are_its_own() -> None:
    space = dataclasses.replace(
        space_of(layer=IntRange(low=0, high=3)), starting_points=({"layer": 1},)
    )
    assert [point.origin for point in own_points(space)] == ["the space's own"]

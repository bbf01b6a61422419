"""Parameters of a space that are fixed or narrowed on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lunar_tune.config.options import SearchConfig, read_assignments
from lunar_tune.driver.plan import SearchPlan, plan_search
from lunar_tune.driver.space import Parameter, SearchSpace, open_study
from lunar_tune.driver.space_sources import narrowed
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import configure_method
from lunar_tune.trial.assemble import configured

KINDS: Mapping[str, Parameter] = {
    "layer": IntDistribution(0, 3),
    "coefficient": FloatDistribution(0.5, 8.0),
    "learning_rate": FloatDistribution(1e-4, 3e-2, log=True),
}
POINT = {"layer": 1, "coefficient": 1.0, "learning_rate": 0.003}
NPO: Mapping[str, Parameter] = {"learning_rate": FloatDistribution(1e-5, 1e-2, log=True)}


def narrow(
    kinds: Mapping[str, Parameter] = KINDS,
    point: Mapping[str, Any] | None = None,
    *,
    fix: tuple[str, ...] = (),
    ranges: tuple[str, ...] = (),
    method: str = "lunar",
) -> SearchSpace:
    """Narrow a space of four blocks as a plan does."""
    fixed = read_assignments(fix)
    made, _ = configure_method(method, solver=None, fixed=fixed)
    space = SearchSpace(
        method, made.variant, dict(kinds), (point,) if point is not None else (), "a test"
    )
    return narrowed(space, made, fixed=fixed, ranges=ranges, n_layers=4)


@pytest.mark.parametrize("name", KINDS)
def test_a_parameter_of_any_kind_can_be_fixed(name: str) -> None:
    fixed = IntDistribution(2, 2) if name == "layer" else FloatDistribution(2, 2)
    for kind in (*KINDS.values(), CategoricalDistribution((1, 2, 3)), IntDistribution(3, 3)):
        space = narrow({**KINDS, name: kind}, fix=(f"{name}=2",))
        assert space.parameters == {**KINDS, name: fixed}


WHOLE, REAL, CHOICE = IntDistribution, FloatDistribution, CategoricalDistribution


@pytest.mark.parametrize(
    ("name", "kind", "text", "expected"),
    [
        ("layer", WHOLE(0, 1), "1:3", WHOLE(1, 3)),
        ("layer", WHOLE(0, 3), "2:2", WHOLE(2, 2)),
        ("layer", CHOICE((0, 2, 3)), "1:3", CHOICE((2, 3))),
        ("coefficient", REAL(0.5, 8), "-1:4", REAL(-1, 4)),
        ("coefficient", WHOLE(1, 1), "1:4", REAL(1, 4)),
        ("learning_rate", REAL(1e-4, 0.03, log=True), "1e-3:0.01", REAL(1e-3, 0.01, log=True)),
    ],
)
def test_a_parameter_of_any_kind_can_be_narrowed(
    name: str, kind: Parameter, text: str, expected: Parameter
) -> None:
    space = narrow({**KINDS, name: kind}, ranges=(f"{name}={text}",))
    assert space.parameters == {**KINDS, name: expected}
    assert narrow({**KINDS, name: kind}, ranges=(f"{name.replace('_', '-')}={text}",)) == space


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"ranges": ("layer=2:4",)}, "layer 4: the model has blocks 0 to 3"),
        ({"fix": ("layer=1.5",)}, "--fix layer=1.5: is 1.5; a whole number is needed"),
        ({"fix": ("coefficient=much",)}, "a number is needed"),
        ({"fix": ("learning_rate=0",)}, "a positive number"),
        ({"ranges": ("coefficient=1:inf",)}, "a finite number is needed"),
        ({"ranges": ("learning_rate=0:1",)}, "`low > 0` must hold for `log=True`"),
        ({"ranges": ("ridge=0.1:1",)}, "searches no ridge. There are: batch_size"),
        ({"fix": ("layer=2",), "ranges": ("layer=0:1",)}, "layer is named twice"),
        ({"ranges": ("layer=0:1", "layer=2:3")}, "--range layer=2:3: layer is named twice"),
        ({"kinds": {"ridge": CHOICE((1, 4))}, "ranges": ("ridge=2:3",)}, "holds none of 1, 4"),
        ({"kinds": NPO, "ranges": ("dropout=0:1",), "method": "npo"}, "less than 1"),
        ({"fix": ("coefficient=much",), "ranges": ("ridge=1:2", "layer=0.5:1")}, "3 things are"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        narrow(**options)
    assert part in str(caught.value)


def test_a_setting_that_is_fixed_is_searched_no_more() -> None:
    """Starting points have what is fixed, and nothing else of theirs changes."""
    kinds = {**NPO, "rank": IntDistribution(2, 16), "beta": FloatDistribution(0.1, 1)}
    point = {"learning_rate": 1e-3, "rank": 4, "beta": 0.5}
    space = narrow(kinds, point, fix=("rank=8",), method="npo")
    assert space.parameters == {name: kind for name, kind in kinds.items() if name != "rank"}
    assert space.starting_points == ({"learning_rate": 1e-3, "beta": 0.5},)
    space = narrow(point=POINT, fix=("layer=3",), ranges=("coefficient=4:8",))
    assert space.starting_points == (POINT | {"layer": 3},)


def test_a_setting_that_the_space_does_not_search_is_searched_in_a_range() -> None:
    """A setting of whole numbers has a whole range; starting points begin in its middle."""
    point = {"learning_rate": 1e-3}
    space = narrow(NPO, point, ranges=("rank=2:16", "beta=0.1:0.5"), method="npo")
    added = {"rank": IntDistribution(2, 16), "beta": FloatDistribution(0.1, 0.5)}
    assert space.parameters == {**NPO, **added}
    assert space.starting_points == ({**point, "rank": 9, "beta": pytest.approx(0.3)},)


# Searches


def planned(folder: Path, **options: Any) -> SearchPlan:
    return plan_search(SearchConfig(output=folder / "runs", **options))


def test_a_plan_searches_what_is_left_and_a_study_asks_for_nothing_else(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, sampler="random", fix=("layer=2", "epochs=3"), range=("coefficient=1:2",)
    )
    assert plan.facts["  layer"] == "2 (fixed)"
    assert plan.facts["  coefficient"] == "1 … 2"
    assert plan.spec.layers == (2,)
    assert configured(plan.config)[1] == {"layer": 2}
    assert plan.spec.method.settings.epochs == 3  # type: ignore[attr-defined]
    study = open_study(tmp_path / "study.journal", name="s", space=plan.space, config=plan.config)
    asked = [study.ask()[1] for _ in range(12)]
    assert asked[0] == {"layer": 2, "coefficient": 1.0, "learning_rate": 0.003}
    assert {one["layer"] for one in asked} == {2}
    assert all(1 <= one["coefficient"] <= 2 for one in asked)
    assert len({one["coefficient"] for one in asked}) == 12

    plan = planned(tmp_path, range=("coefficient=4:8",))
    assert plan.space.starting_points == ()
    assert "coefficient: is 1, outside 4 … 8" in plan.facts["starting points"]

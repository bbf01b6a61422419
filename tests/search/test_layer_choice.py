"""What scored layers make of a space: every kind of layer, and scores that tell nothing.

The priors are made up by hand (`priors`), so that what they recommend is known.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from priors import prior_of

from lunar_tune.errors import InputError
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.search.space import Parameter, SearchSpace, bounds_of
from lunar_tune.search.space_sources import load_space
from lunar_tune.search.starting_points import check_has_choice, choose_layers

CURVE = {0: 0.1, 1: 0.7, 2: 0.9, 3: 0.2}  # over -1: gains 1.1, 1.7, 1.9, 1.2; 80 % of 1.9 is 1.52


def space_with(layer: Parameter, *, method: str = "lunar") -> SearchSpace:
    return SearchSpace(
        method=method,
        variant="adamw",
        parameters={
            "layer": layer,
            "coefficient": FloatDistribution(0.5, 8.0),
            "learning_rate": FloatDistribution(1e-4, 3e-2, log=True),
        },
        starting_points=({"layer": 0, "coefficient": 2.0, "learning_rate": 0.003},),
        origin="a test",
    )


def test_an_int_range_becomes_the_smallest_that_holds_the_recommended_layers() -> None:
    space = space_with(IntDistribution(0, 3))
    narrowed, best, text = choose_layers(space, prior_of(CURVE, [1, 2]), origin="l.json")

    assert narrowed.parameters["layer"] == IntDistribution(1, 2)
    assert best == 2
    assert text == "1 … 2 by s1 - s2 (l.json)"
    for name in ("coefficient", "learning_rate"):
        assert narrowed.parameters[name] == space.parameters[name]
    assert list(narrowed.parameters) == list(space.parameters), "the order of the method"
    assert space.parameters["layer"] == IntDistribution(0, 3), "the space itself is left alone"


def test_layers_between_recommended_ones_stay_in_a_range_and_not_in_a_choice() -> None:
    curve = {0: 0.9, 1: -0.9, 2: 0.8, 3: -0.8}
    prior = prior_of(curve, [0, 2])
    ranged = choose_layers(space_with(IntDistribution(0, 3)), prior, origin="l")[0]
    chosen = choose_layers(space_with(CategoricalDistribution((3, 2, 1, 0))), prior, origin="l")[0]
    assert ranged.parameters["layer"] == IntDistribution(0, 2)
    assert chosen.parameters["layer"] == CategoricalDistribution((2, 0)), "in the order of the file"


def test_one_recommended_layer_leaves_one() -> None:
    prior = prior_of({0: -0.9, 1: -0.8, 2: -0.7, 3: 0.9}, [3])
    space, _, text = choose_layers(space_with(IntDistribution(0, 3)), prior, origin="l")
    assert space.values_of("layer") == (3,)
    assert text == "3 by s1 - s2 (l)"
    space, _, _ = choose_layers(space_with(CategoricalDistribution((1, 3))), prior, origin="l")
    assert space.parameters["layer"] == CategoricalDistribution((3,))


def test_a_range_by_depth_is_narrowed_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "lunar: {adamw: {parameters: {layer: {type: depth, low: 0.0, high: 1.0}, coefficient: "
        "{type: fixed, value: 2.0}, learning_rate: {type: fixed, value: 0.01}}}}"
    )
    space = load_space(str(path), LunarMethod(LunarSettings()), model_name="m", n_layers=4)
    narrowed = choose_layers(space, prior_of(CURVE, [1, 2]), origin="l")[0]
    assert narrowed.parameters["layer"] == IntDistribution(1, 2)


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
        with pytest.raises(InputError, match="recommends layer"):
            choose_layers(space, prior, origin="l")
        return
    runs = [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]
    shortest = min(
        (run for run in runs if inside <= set(range(run[0], run[1] + 1))),
        key=lambda run: run[1] - run[0],
    )
    narrowed, best, _ = choose_layers(space, prior, origin="l")
    assert bounds_of(narrowed.parameters["layer"]) == shortest
    assert best in inside


def test_the_best_layer_within_the_space_comes_first() -> None:
    """The best of all is 2, which this space does not hold."""
    prior = prior_of(CURVE, [1, 2])
    narrowed, best, _ = choose_layers(space_with(IntDistribution(0, 1)), prior, origin="l")
    assert best == 1
    assert narrowed.parameters["layer"] == IntDistribution(1, 1)


def test_of_equal_layers_the_lowest_is_the_best() -> None:
    prior = prior_of({0: 0.0, 1: 0.9, 2: 0.9, 3: 0.1}, [1, 2])
    assert choose_layers(space_with(IntDistribution(0, 3)), prior, origin="l")[1] == 1


def test_a_recommendation_outside_the_space_is_refused_with_both() -> None:
    with pytest.raises(InputError) as caught:
        choose_layers(space_with(IntDistribution(0, 1)), prior_of(CURVE, [2]), origin="l.json")
    for part in ("--layer-prior l.json", "recommends layer 2", "(a test) has 0 … 1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("curve", "base_model", "reason"),
    [
        ({0: 0.66, 1: 0.66, 2: 0.66, 3: 0.66}, -1.5, "all layers score the same"),
        ({0: 0.66, 1: 0.66 + 1e-12, 2: 0.66, 3: 0.66}, -1.5, "all layers score the same"),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, 0.4, "no layer gains on the base model"),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, 0.5, "no layer gains on the base model"),
        ({2: 0.9}, -1.0, "layer 2 alone was scored, and compared with none"),
    ],
)
def test_scores_that_tell_nothing_leave_the_space_as_it_is(
    curve: dict[int, float], base_model: float, reason: str
) -> None:
    space = space_with(IntDistribution(0, 3))
    prior = prior_of(curve, [max(curve)], base_model=base_model)
    same, best, text = choose_layers(space, prior, origin="l.json")
    assert same == space
    assert best is None
    assert text == f"0 … 3, as in the space: {reason} (l.json)"


@pytest.mark.parametrize(("unfinished", "warned"), [(6, False), (7, True)])
def test_a_curve_of_answers_that_do_not_end_is_said_to_tell_little(
    unfinished: int, warned: bool
) -> None:
    prior = prior_of(CURVE, [1, 2], unfinished=unfinished)
    text = choose_layers(space_with(IntDistribution(0, 3)), prior, origin="l")[2]
    assert ("most answers there do not end" in text) is warned


@pytest.mark.parametrize("layer", [IntDistribution(2, 2), CategoricalDistribution([2])], ids=str)
def test_a_space_with_one_layer_has_none_to_choose(layer: Parameter) -> None:
    with pytest.raises(InputError) as caught:
        check_has_choice(space_with(layer), option="--layer-prior auto")
    for part in ("--layer-prior auto: the space (a test) has layer 2 alone", "several layers"):
        assert part in str(caught.value)


def test_two_layers_are_a_choice() -> None:
    check_has_choice(space_with(IntDistribution(2, 3)), option="--layer-prior auto")


@pytest.mark.parametrize("method", ["rmu", "npo"])
def test_methods_without_unlearning_vectors_are_refused(method: str) -> None:
    """RMU edits a block, too, but moves activations along a random direction."""
    with pytest.raises(InputError) as caught:
        check_has_choice(
            space_with(IntDistribution(0, 3), method=method), option="--layer-prior auto"
        )
    for part in ("--layer-prior auto", f"--method {method} has none", "--method lunar"):
        assert part in str(caught.value)

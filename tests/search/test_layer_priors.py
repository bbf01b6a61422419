"""What scored layers make of a space: made up by hand (`priors`), and scored by a search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import without_ray
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from priors import prior_of
from search_results import rows_of
from shared_searches import SharedSearch

from lunar_tune.cli.layers import layers as LAYERS
from lunar_tune.cli.search import search as SEARCH
from lunar_tune.driver.space import Parameter, SearchSpace, bounds_of
from lunar_tune.driver.starting_points import choose_layers
from lunar_tune.errors import InputError
from lunar_tune.trial.layer_scores import LayerPrior
from lunar_tune.yaml_files import read_yaml

CURVE = {0: 0.1, 1: 0.7, 2: 0.9, 3: 0.2}  # over -1: gains 1.1, 1.7, 1.9, 1.2; 80 % of 1.9 is 1.52


def space_with(layer: Parameter) -> SearchSpace:
    parameters = {"layer": layer, "coefficient": FloatDistribution(0.5, 8.0)}
    points = ({"layer": 0, "coefficient": 2.0},)
    return SearchSpace("lunar", "adamw", parameters, points, "a test")


def chosen(layer: Parameter, prior: LayerPrior) -> tuple[SearchSpace, int | None, str]:
    """Return the space, the best layer, and what is said of them."""
    return choose_layers(space_with(layer), prior, origin="l.json")


def test_an_int_range_becomes_the_smallest_that_holds_the_recommended_layers() -> None:
    """Answers that mostly do not end tell little."""
    space = space_with(IntDistribution(0, 3))
    narrowed, best, text = choose_layers(space, prior_of(CURVE, [1, 2]), origin="l.json")
    assert (best, text) == (2, "1 … 2 by s1 - s2 (l.json)")
    assert list(narrowed.parameters) == list(space.parameters), "the order of the method"
    assert space.parameters["layer"] == IntDistribution(0, 3), "the space itself is left alone"
    tie = prior_of({0: 0.0, 1: 0.9, 2: 0.9, 3: 0.1}, [1, 2])
    assert chosen(IntDistribution(0, 3), tie)[1] == 1, "of equal ones the lowest is the best"
    for unfinished in (6, 7):
        text = chosen(IntDistribution(0, 3), prior_of(CURVE, [1, 2], unfinished=unfinished))[2]
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
    shortest = min(
        (run for run in runs if inside <= set(range(run[0], run[1] + 1))),
        key=lambda run: run[1] - run[0],
    )
    narrowed, best, _ = choose_layers(space, prior, origin="l")
    assert bounds_of(narrowed.parameters["layer"]) == shortest
    assert best in inside


@pytest.mark.parametrize(
    ("curve", "base_model", "reason"),
    [
        ({0: 0.66, 1: 0.66 + 1e-12, 2: 0.66, 3: 0.66}, -1.5, "all layers score the same"),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, 0.4, "no layer gains on the base model"),
        ({2: 0.9}, -1.0, "layer 2 alone was scored, and compared with none"),
    ],
)
def test_scores_that_tell_nothing_leave_the_space_as_it_is(
    curve: dict[int, float], base_model: float, reason: str
) -> None:
    prior = prior_of(curve, [max(curve)], base_model=base_model)
    same, best, text = chosen(IntDistribution(0, 3), prior)
    assert (same, best) == (space_with(IntDistribution(0, 3)), None)
    assert text == f"0 … 3, as in the space: {reason} (l.json)"


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
NAMES = ("layer", "coefficient", "learning_rate")


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
        {name: row[f"params.{name}"] for name in NAMES} for row in rows_of(tmp_path / "runs/n")
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

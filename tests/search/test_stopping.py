"""When a search knows enough, on landscapes whose optimum is known by their formula."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import optuna
import pytest
from scipy.stats import norm
from test_frontier import BOUND, RATES, SPACE, falling, search, trained

from lunar_tune.driver.stopping import Outlook, gain
from lunar_tune.metrics.goal import METRICS, Goal
from lunar_tune.study.new_questions import kept_again
from lunar_tune.study.study import Told

GOAL = Goal.read("forget_rouge1", [BOUND])
MOST = 40


def told_by(trials: list[optuna.trial.FrozenTrial]) -> list[Told]:
    return [Told(one.params, one.value or 0.0, one.constraints) for one in trials]


def ended(space: Mapping[str, Any], landscape: Any, seed: int) -> tuple[int, list[Told], Outlook]:
    """Return after how many trials a search knows enough, all that it would have gone on with."""
    told = told_by(search(space, landscape, sampler="frontier", seed=seed, count=MOST))
    outlook = Outlook(goal=GOAL, space=space, seed=seed)
    enough = [n for n in range(1, MOST) if outlook.is_enough(told[:n])]
    return enough[0], told, outlook


def best(told: list[Told]) -> float:
    return min(one.value for one in told if one.is_feasible)


def optimum(landscape: Any, **values: Any) -> float:
    """Look everywhere."""
    everywhere = (dict(zip(values, one, strict=True)) for one in product(*values.values()))
    scores = [landscape(one) for one in everywhere]
    return float(min(forget for forget, retain in scores if retain >= 0.8))


@pytest.mark.parametrize("seed", range(3))
def test_a_search_ends_when_the_best_is_found_and_not_before(seed: int) -> None:
    least = optimum(falling, layer=range(12), coefficient=np.linspace(0.5, 6, 2000))
    count, told, _ = ended(SPACE, falling, seed)
    assert 7 <= count < 30
    assert best(told[:count]) <= least + 0.01


def test_little_is_said_to_be_gained_where_little_is() -> None:
    """Of settings drawn at random, some of which found the best by chance."""
    least = optimum(falling, layer=range(12), coefficient=np.linspace(0.5, 6, 2000))
    said = []
    for seed, count in product(range(12), (6, 12)):
        told = told_by(search(SPACE, falling, sampler="random", seed=seed, count=count))
        chance = Outlook(goal=GOAL, space=SPACE, seed=seed).chance(told)
        feasible = [one.value for one in told if one.is_feasible]
        said.append((chance, min(feasible, default=1.0) - least))
    little = [regret for chance, regret in said if chance <= 0.05]
    assert sum(regret <= 0.01 for regret in little) >= 0.9 * len(little)
    much = [chance for chance, regret in said if regret > 0.05]
    assert len(much) > 6
    assert sum(chance > 0.05 for chance in much) >= 0.9 * len(much)


@pytest.mark.parametrize("seed", range(2))
def test_a_learning_rate_alone_is_settled_soon(seed: int) -> None:
    least = optimum(trained, learning_rate=np.geomspace(1e-6, 1e-2, 4000))
    count, told, _ = ended(RATES, trained, seed)
    assert count <= 20
    assert best(told[:count]) <= least + 0.01


def test_where_nothing_is_feasible_it_ends_with_the_chance_that_something_is() -> None:
    def never(setting: Mapping[str, Any]) -> tuple[float, float]:
        return falling(setting)[0], 0.7 - 0.1 * setting["coefficient"] - 0.01 * setting["layer"]

    count, told, outlook = ended(SPACE, never, 0)
    assert count == 20, "few misses say nothing"
    note = outlook.note(told[:count])
    assert note is not None
    assert note["enough"]
    assert note["chance"] <= 0.05


def test_nothing_is_below_the_least_score_and_a_list_that_was_tried_holds_nothing_more() -> None:
    settings = [{"layer": layer, "coefficient": 2.0, "ridge": 0.1} for layer in range(9)]
    zero = [Told(one, float(one["layer"] != 4), {BOUND: -0.1}) for one in settings]
    outlook = Outlook(goal=GOAL, space=SPACE, seed=0)
    assert outlook.chance(zero) == 0
    note = outlook.note(zero[:5])
    assert note is not None
    assert (note["more"], note["enough"]) == (False, False), "it takes three trials to end"
    blocks = {"layer": optuna.distributions.CategoricalDistribution([*range(9)])}
    some = [Told({"layer": one}, 0.9 - 0.05 * one, {BOUND: -0.1}) for one in range(9)]
    assert Outlook(goal=GOAL, space=blocks, seed=0).chance(some[:7]) > 0.05
    assert Outlook(goal=GOAL, space=blocks, seed=0).chance(some) == 0


def test_what_never_changed_does_not_say_that_nothing_would() -> None:
    """Nothing was forgotten yet, or nothing kept."""
    settings = [{"layer": layer, "coefficient": 0.6, "ridge": 0.1} for layer in range(12)]
    outlook = Outlook(goal=GOAL, space=SPACE, seed=0)
    assert outlook.chance([Told(one, 1.0, {BOUND: -0.2}) for one in settings]) > 0.5
    outlook = Outlook(goal=GOAL, space=SPACE, seed=0)
    assert outlook.chance([Told(one, 0.0, {BOUND: 0.3}) for one in settings]) > 0.05


def test_a_gain_is_a_hundredth_of_what_a_score_can_be_or_of_what_it_was() -> None:
    told = [Told({"layer": one}, value, {}) for one, value in enumerate((3.0, 11.0))]
    gains = {"forget_rouge1": 0.01, "deviation_score": 1.414, "forget_log_prob": 0.08}
    for metric, least in gains.items():
        assert gain(METRICS[metric], told) == pytest.approx(least, abs=1e-3)


def test_a_setting_keeps_the_floor_on_new_questions_as_often_as_was_said() -> None:
    """Both samples of questions have the same error; the setting was chosen by the first."""
    error, random = 0.03, np.random.default_rng(5)
    said, kept = [], []
    for seed in range(24):
        true: dict[tuple[float, ...], float] = {}

        def noisy(setting: Mapping[str, Any], true: Any = true) -> tuple[float, float]:
            forget, retain = falling(setting)
            true[tuple(setting.values())] = retain
            return forget, retain + random.normal(0, error)

        trials = search(SPACE, noisy, sampler="frontier", seed=seed, count=12)
        told = [
            Told(one.params, one.value or 0.0, one.constraints, bound_errors={BOUND: error})
            for one in trials
        ]
        first = min((one for one in told if one.is_feasible), key=lambda one: one.value)
        chances = kept_again(SPACE, told)
        assert chances is not None
        said.append(chances[told.index(first)])
        kept.append(norm.sf(0.8, true[tuple(first.parameters.values())], error))
    assert np.mean(said) == pytest.approx(np.mean(kept), abs=0.1)
    assert np.corrcoef(said, kept)[0, 1] > 0.5
    exact = [Told(one.parameters, one.value, one.missed) for one in told]
    assert kept_again(SPACE, exact) is None, "no error is known"
    assert kept_again(SPACE, told[:4]) is None

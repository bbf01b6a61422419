"""The default sampler, on landscapes whose optimum is known by their formula."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from lunar_tune.driver.samplers import SAMPLERS, sampler_at
from lunar_tune.driver.samplers.frontier import FIRST
from lunar_tune.study.belief import Lattice
from lunar_tune.study.study import EARLIER, Told

SPACE: Mapping[str, BaseDistribution] = {
    "layer": IntDistribution(0, 11),
    "coefficient": FloatDistribution(0.5, 6.0),
    "ridge": FloatDistribution(0.1, 0.1),
}
RATES: Mapping[str, BaseDistribution] = {"learning_rate": FloatDistribution(1e-6, 1e-2, log=True)}
BOUND = "retain_rouge1>=0.8"


def falling(setting: Mapping[str, Any]) -> tuple[float, float]:
    """Forget and retain fall along the coefficient; the deeper the faster, forget in block 8 most.

    Retain is .8 at 1.2 / steepness; there forget is least in block 8: exp(-6) = .0025.
    """
    steepness = 0.3 + 0.05 * setting["layer"]
    pull = 5 * math.exp(-(((setting["layer"] - 8) / 2.5) ** 2)) * steepness
    return math.exp(-pull * setting["coefficient"]), 1 - steepness * setting["coefficient"] / 6


def trained(setting: Mapping[str, Any]) -> tuple[float, float]:
    """Both fall along the logarithm of the rate; retain is .8 at 10^-3.6, forget .12 there."""
    decades = math.log10(setting["learning_rate"]) + 6
    return 1 / (1 + math.exp(5 * (decades - 2))), 1 - 0.2 * (decades / 2.4) ** 4


def search(
    space: Mapping[str, BaseDistribution],
    landscape: Any,
    *,
    sampler: str,
    seed: int,
    count: int,
    earlier: Sequence[Told] = (),
) -> list[optuna.trial.FrozenTrial]:
    study = optuna.create_study()
    study.set_user_attr(EARLIER, [dataclasses.asdict(one) for one in earlier])
    for one in earlier[:1]:  # a search has the best of an earlier one first
        study.enqueue_trial(dict(one.parameters))
    for number in range(count):
        study.sampler = sampler_at(SAMPLERS[sampler], seed, number)
        trial = study.ask(dict(space))
        forget, retain = landscape(trial.params)
        trial.set_constraint(BOUND, 0.8 - retain)
        study.tell(trial, forget)
    return study.get_trials()


def best(trials: list[optuna.trial.FrozenTrial]) -> float:
    return min(one.value or 0.0 for one in trials if one.constraints[BOUND] <= 0)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_block_at_the_floor(seed: int) -> None:
    trials = search(SPACE, falling, sampler="frontier", seed=seed, count=15)
    assert best(trials) < 0.0025 + 0.02
    assert best(trials) < best(search(SPACE, falling, sampler="random", seed=seed, count=15))
    settings = [tuple(one.params.values()) for one in trials]
    assert len({*settings}) == 15, "none is tried twice"
    assert all(one.params["ridge"] == 0.1 for one in trials)


def used_up(setting: Mapping[str, Any]) -> tuple[float, float]:
    """Little is left to forget from retain .92 on, nothing in the deeper blocks."""
    retain = falling(setting)[1]
    return max(0.02 * (setting["layer"] < 6), 12 * retain - 11), retain


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_is_left_to_forget_it_comes_back_from_the_floor(seed: int) -> None:
    trials = search(SPACE, used_up, sampler="frontier", seed=seed, count=12)
    assert sum(falling(one.params)[1] > 0.84 for one in trials[FIRST:]) >= 2


def steeper(setting: Mapping[str, Any]) -> tuple[float, float]:
    """Like `falling`, but each coefficient does as much as one of 1.25 times of it there."""
    return falling({**setting, "coefficient": 1.25 * setting["coefficient"]})


def told_of(trials: Sequence[optuna.trial.FrozenTrial]) -> list[Told]:
    """Return what trials told another search, its best first."""
    told = [Told(one.params, one.value or 0.0, one.constraints, search=1) for one in trials]
    return sorted(told, key=lambda one: (not one.is_feasible, one.value))


@pytest.mark.parametrize("seed", range(3))
def test_what_another_search_was_told_is_worth_its_trials(seed: int) -> None:
    """The best of the other one misses the floor here, by what the steeper functions do more."""
    earlier = told_of(search(SPACE, falling, sampler="frontier", seed=9, count=20))
    assert steeper(earlier[0].parameters)[1] < 0.8
    trials = search(SPACE, steeper, sampler="frontier", seed=seed, count=4, earlier=earlier)
    assert best(trials) < 0.0025 + 0.05
    without = search(SPACE, steeper, sampler="frontier", seed=seed, count=4)
    assert not any(one.constraints[BOUND] <= 0 and (one.value or 0) < 0.1 for one in without)


def test_another_search_that_misleads_is_found_out() -> None:
    def mirrored(setting: Mapping[str, Any]) -> tuple[float, float]:
        return falling({**setting, "layer": 11 - setting["layer"]})

    earlier = told_of(search(SPACE, mirrored, sampler="frontier", seed=9, count=20))
    trials = search(SPACE, falling, sampler="frontier", seed=0, count=15, earlier=earlier)
    assert best(trials) < 0.0025 + 0.03


def test_while_the_first_trials_run_what_other_searches_told_is_all_that_is_known() -> None:
    earlier = told_of(search(SPACE, falling, sampler="frontier", seed=9, count=20))
    study = optuna.create_study()
    study.set_user_attr(EARLIER, [dataclasses.asdict(one) for one in earlier])
    study.enqueue_trial(dict(earlier[0].parameters))
    asked = []
    for number in range(4):
        study.sampler = sampler_at(SAMPLERS["frontier"], 0, number)
        asked.append(study.ask(dict(SPACE)).params)
    assert len({tuple(one.values()) for one in asked}) == 4
    for setting in asked:  # a sixth of the space is like this
        forget, retain = falling(setting)
        assert forget < 0.45
        assert retain > 0.75


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_largest_learning_rate_that_keeps_the_floor(seed: int) -> None:
    trials = search(RATES, trained, sampler="frontier", seed=seed, count=8)
    assert best(trials) < trained({"learning_rate": 10**-3.6})[0] + 0.03


def test_where_nothing_is_feasible_it_looks_for_what_misses_least() -> None:
    def never(setting: Mapping[str, Any]) -> tuple[float, float]:
        return falling(setting)[0], 0.79 - 0.1 * setting["coefficient"] - 0.01 * setting["layer"]

    missed = [
        one.constraints[BOUND] for one in search(SPACE, never, sampler="frontier", seed=0, count=12)
    ]
    assert min(missed) == pytest.approx(0.8 - 0.79 + 0.05, abs=0.02)  # at 0 and .5
    assert missed.index(min(missed)) >= FIRST, "not by chance"


def test_a_lattice_has_every_block_and_no_more_settings_than_can_be_predicted() -> None:
    space: dict[str, BaseDistribution] = {
        "layer": IntDistribution(0, 79),
        "coefficient": FloatDistribution(0.5, 6.0),
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "rank": IntDistribution(1, 512),
    }
    lattice = Lattice.of(space)
    assert math.prod(lattice.shape) <= 20_000
    assert lattice.shape[0] == 80
    assert [(axis[0], axis[-1]) for axis in lattice.axes[1:]] == [
        (0.5, 6.0),
        (pytest.approx(1e-4), pytest.approx(1e-2)),
        (1, 512),
    ]


def test_choices_are_proposed_as_they_are_and_running_trials_count_as_seen() -> None:
    space: dict[str, BaseDistribution] = {
        "layer": CategoricalDistribution([2, 5, 9]),
        "coefficient": FloatDistribution(0.5, 6.0),
        "rank": CategoricalDistribution([4, 16]),
    }
    study = optuna.create_study()
    for number in range(16):
        study.sampler = sampler_at(SAMPLERS["frontier"], 1, number)
        trial = study.ask(space)
        assert trial.params["layer"] in (2, 5, 9)
        assert trial.params["rank"] in (4, 16)
        assert isinstance(trial.params["layer"], int)
        if number == 7:
            study.tell(trial, state=TrialState.FAIL)
        elif number < 12:  # the last four run at the same time
            forget, retain = falling(trial.params)
            trial.set_constraint(BOUND, 0.8 - retain)
            study.tell(trial, forget)
    settings = [tuple(one.params.values()) for one in study.get_trials()]
    assert len({*settings}) == 16, "neither what runs nor what failed is proposed again"

"""The default sampler: along the frontier of what is kept, by what is believed of every setting.

What it knows of unlearning: the more of a method's strength (LUNAR's coefficient, a learning rate
where there is none), the less is known of either set, so that the best strength of a layer mostly
lies where a constraint begins to be missed.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import norm
from threadpoolctl import threadpool_limits

from lunar_tune.study.belief import LITTLE_LEFT, TINY, Belief, Lattice, strength_of, values_of
from lunar_tune.study.study import Told, aimed_at

FIRST, FIRST_ALONE = 4, 2
"""Trials, far from each other, before anything is modelled; where one parameter is searched."""
FIRST_RANGES: Final = {"coefficient": (0.15, 0.7)}
"""Of a parameter's range: where something is to be seen."""
DRAWN: Final = 8  # values of a parameter, of which the farthest is taken
POSSIBLE: Final = 0.3  # least probability at which a setting counts as inside of the frontier
INSIDE: Final = 3.0  # by how much less the logarithm of a gain counts off the frontier


class FrontierSampler(optuna.samplers.BaseSampler):
    """Proposes settings by what earlier trials say; the first ones far from each other."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters of earlier trials; a first trial has none.

        Nor have the first few, unless other searches have told something.
        """
        others = _others(study, trial)
        # A trial that was killed as it was asked for lacks some.
        space = max((one.distributions for one in others), key=len, default={})
        if Told.earlier(study):
            return space
        alone = sum(not kind.single() for kind in space.values()) == 1
        enough = len(others) >= (FIRST_ALONE if alone else FIRST)
        return space if enough and Told.of(study) else {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the setting from which most is to be expected, of what has several values."""
        lattice = Lattice.of(search_space)
        if not lattice.names:
            return {}
        others = [one for one in _others(study, trial) if {*lattice.names} <= one.params.keys()]
        running = [one.params for one in others if one.state == TrialState.RUNNING]
        with threadpool_limits(1):  # of matrices so small threads make waiting
            belief = Belief(
                lattice,
                aimed_at(study),
                self._random,
                running,
            )
            score = proposed(belief)
        seen = lattice.coordinates([one.params for one in others])
        score[cdist(belief.settings, seen, "chebyshev").min(axis=1) < TINY] = -math.inf
        found = lattice.setting(int(np.argmax(score)))
        return {name: _as_kind(search_space[name], value) for name, value in found.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a value far from those of earlier trials: of some that are drawn, the farthest."""
        lattice = Lattice.of({param_name: param_distribution})
        if not lattice.names:
            return _as_kind(param_distribution, values_of(param_distribution, 1)[0])
        low, high = FIRST_RANGES.get(param_name, (0.0, 1.0))
        places = self._random.uniform(low, high, DRAWN)
        drawn = [lattice.setting(int(place * len(lattice.axes[0]))) for place in places]
        earlier = [one.params for one in _others(study, trial) if param_name in one.params]
        farthest = 0
        if earlier:
            apart = cdist(lattice.coordinates(drawn), lattice.coordinates(earlier)).min(axis=1)
            farthest = int(apart.argmax())
        return _as_kind(param_distribution, drawn[farthest][param_name])


def _others(study: optuna.Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """Return the other trials that were begun, one for each setting: of the same ones the last."""
    begun = [one for one in study.get_trials(deepcopy=False) if one.number != trial.number]
    return list({tuple(sorted(one.params.items())): one for one in begun if one.params}.values())


def proposed(belief: Belief) -> NDArray[np.float64]:
    """Return how much is to be expected of each setting of a lattice: a logarithm, to compare.

    By the expected improvement times the probability that all is kept, over the guesses of what
    running trials will tell; where nothing is feasible by that probability alone.
    """
    score = possible = belief.possible()
    least = belief.best_by_guess
    if (found := np.isfinite(least)).any():
        mean, deviation = belief.objective()
        z = (np.where(found, least, 0.0) - mean) / deviation
        gain = deviation * (z * norm.cdf(z) + norm.pdf(z))
        score = np.where(found, np.log(np.maximum(gain, 1e-300)), 0.0) + possible
    on = np.stack([_on_frontier(belief.lattice, one) for one in possible.T], axis=1)
    if found.any():  # where as little is left already, more strength gains nothing
        on |= (mean + deviation <= LITTLE_LEFT) & (possible >= math.log(POSSIBLE))
    total: NDArray[np.float64] = logsumexp(score - INSIDE * ~on, axis=1)
    return total


def _on_frontier(lattice: Lattice, possible: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say which settings have the largest or least strength that is possible, all else being equal.

    A bound on what is retained is missed beyond the one, a bound on what is forgotten before the
    other.
    """
    strength = strength_of(lattice.names)
    if strength is None:
        return np.ones(len(possible), dtype=bool)
    axis = lattice.names.index(strength)
    grid = np.moveaxis(possible.reshape(lattice.shape), axis, -1)
    inside = grid >= math.log(POSSIBLE)
    likeliest = grid == grid.max(axis=-1, keepdims=True)
    inside = np.where(inside.any(axis=-1, keepdims=True), inside, likeliest)
    places = np.arange(grid.shape[-1])
    last = np.where(inside, places, -1).max(axis=-1, keepdims=True)
    first = np.where(inside, places, len(places)).min(axis=-1, keepdims=True)
    first = np.where(first == 0, last, first)  # where the range begins nothing is missed before it
    on: NDArray[np.bool_] = np.moveaxis((places == last) | (places == first), -1, axis).ravel()
    return on


def _as_kind(kind: BaseDistribution, value: float) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return min(kind.choices, key=lambda one: abs(float(one) - value))  # type: ignore[arg-type]
    return round(value) if isinstance(kind, IntDistribution) else value

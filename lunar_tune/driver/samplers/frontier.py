"""The default sampler: Gaussian processes over a lattice, along the frontier of what is kept.

What it knows of unlearning: the more of a method's strength (LUNAR's coefficient, a learning rate
where there is none), the less is known of either set, so that the best strength of a layer mostly
lies where a constraint begins to be missed; blocks are ordered, and each has a share of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.search_space import intersection_search_space
from optuna.trial import FrozenTrial, TrialState
from scipy.spatial.distance import cdist
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel
from threadpoolctl import threadpool_limits

from lunar_tune.driver.space import LAYER

STRENGTHS: Final = ("coefficient", "learning_rate")
"""Parameters of which more means that less is known afterwards; the first one searched is it."""
FIRST: Final = 5  # trials, far from each other, before anything is modelled
FIRST_RANGES: Final = {"coefficient": (0.15, 0.7)}
"""Of a parameter's range: where something is to be seen."""
DRAWN: Final = 8  # values of a parameter, of which the farthest is taken
STRENGTH_STEPS, STEPS = 40, 15  # of a parameter's range
MOST_SETTINGS: Final = 20_000  # of a lattice; with 10,000 a suggestion takes .16 s after 100 trials
POSSIBLE: Final = 0.3  # least probability at which a setting counts as inside of the frontier
INSIDE: Final = 1.0  # by how much less the logarithm of a gain counts off the frontier
TINY: Final = 1e-9
LEAST_SPREAD: Final = 0.02  # of scores
# Least and largest length scale, in ranges of a parameter, and in blocks.
SMOOTH_BLOCKS, SMOOTH_STRENGTH, SMOOTH = (0.08, 0.5), (0.15, 1.5), (0.3, 3.0)
OWN_BLOCKS: Final = 0.7
FLOOR: Final = 0.3  # of the objectives seen so far, added before their logarithm is taken

Coordinates = NDArray[np.float64]
"""`[settings, parameters]`, each from 0 to 1."""


@dataclass(frozen=True)
class Lattice:
    """Settings of a space that may be proposed."""

    names: tuple[str, ...]
    axes: tuple[NDArray[np.float64], ...]  # values of each parameter
    logarithmic: tuple[bool, ...]

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution]) -> Lattice:
        """Return the lattice of parameters that have several values."""
        searched = {name: kind for name, kind in space.items() if not kind.single()}
        strength = strength_of(searched)
        axes = {
            name: _values(kind, STRENGTH_STEPS if name == strength else STEPS)
            for name, kind in searched.items()
        }
        while math.prod(map(len, axes.values())) > MOST_SETTINGS:
            # Every block stays as long as another parameter has values to spare.
            longest = max(
                axes, key=lambda name: (name != LAYER and len(axes[name]) > 3, len(axes[name]))
            )
            axes[longest] = _thinned(axes[longest])
        return cls(
            names=tuple(axes),
            axes=tuple(axes.values()),
            logarithmic=tuple(bool(getattr(kind, "log", False)) for kind in searched.values()),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of values of each parameter."""
        return tuple(map(len, self.axes))

    def coordinates(self, settings: Sequence[Mapping[str, Any]]) -> Coordinates:
        """Return settings, scaled."""
        columns = [
            self._scaled(i, np.array([float(one[name]) for one in settings]))
            for i, name in enumerate(self.names)
        ]
        return np.stack(columns, axis=1)

    def all(self) -> Coordinates:
        """Return the whole lattice, scaled, the last parameter first to change."""
        scaled = [self._scaled(i, axis) for i, axis in enumerate(self.axes)]
        return np.stack([one.ravel() for one in np.meshgrid(*scaled, indexing="ij")], axis=1)

    def setting(self, index: int) -> dict[str, float]:
        """Return a setting of the lattice by its place in `all`."""
        places = np.unravel_index(index, self.shape)
        return {
            name: float(axis[place])
            for name, axis, place in zip(self.names, self.axes, places, strict=True)
        }

    def _scaled(self, i: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = np.log if self.logarithmic[i] else np.asarray
        low, high = scale(self.axes[i][0]), scale(self.axes[i][-1])
        scaled: NDArray[np.float64] = (scale(values) - low) / (high - low)
        return scaled


def _values(kind: BaseDistribution, steps: int) -> NDArray[np.float64]:
    if isinstance(kind, CategoricalDistribution):
        return np.array(sorted(float(one) for one in kind.choices))  # type: ignore[arg-type]
    if isinstance(kind, FloatDistribution):
        spaced = np.geomspace if kind.log else np.linspace
        return spaced(kind.low, kind.high, steps)
    assert isinstance(kind, IntDistribution)  # noqa: S101  # Optuna has no other
    count = min(MOST_SETTINGS, kind.high - kind.low + 1)
    return np.unique(np.linspace(kind.low, kind.high, count).round())


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return about half of the values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, (len(values) + 1) // 2).round().astype(int)
    thinned: NDArray[np.float64] = values[places]
    return thinned


def strength_of(names: Any) -> str | None:
    """Return which of some parameters is the strength, if any."""
    return next((name for name in STRENGTHS if name in names), None)


class FrontierSampler(optuna.samplers.BaseSampler):
    """Proposes settings by what earlier trials say; the first ones far from each other."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters of earlier trials; a first trial has none."""
        told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not told or len(_others(study, trial)) < FIRST:
            return {}
        return intersection_search_space(told)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the setting from which most is to be expected, of what has several values."""
        lattice = Lattice.of(search_space)
        if not lattice.names:
            return {}
        told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = [one for one in _others(study, trial) if {*lattice.names} <= one.params.keys()]
        with threadpool_limits(1):  # of matrices so small threads make waiting
            found = proposed(lattice, told, others)
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
            return _as_kind(param_distribution, _values(param_distribution, 1)[0])
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


def proposed(
    lattice: Lattice, told: Sequence[FrozenTrial], begun: Sequence[FrozenTrial]
) -> dict[str, float]:
    """Return the setting from which most is to be expected; none of `begun` is proposed again."""
    known = lattice.coordinates([one.params for one in told])
    objective = np.array([one.value for one in told], dtype=float)
    names = [*told[0].constraints]
    missed = np.array([[one.constraints.get(name, 0.0) for name in names] for one in told])
    feasible = (missed <= 0).all(axis=1)
    lowest, highest = objective.min(), objective.max()
    warped = np.log((objective - lowest) / max(highest - lowest, TINY) + FLOOR)
    running = [one.params for one in begun if one.state == TrialState.RUNNING]
    open_now = lattice.coordinates(running)
    everywhere = lattice.all()
    mean, deviation = _modelled(lattice, known, warped, open_now)(everywhere)
    possible = np.zeros(len(everywhere))  # logarithm of the probability that all is kept
    for i in range(len(names)):
        amount, unsure = _modelled(lattice, known, missed[:, i], open_now)(everywhere)
        possible += norm.logcdf(-amount / unsure)
    score = possible
    if feasible.any():
        z = (warped[feasible].min() - mean) / deviation
        gain = deviation * (z * norm.cdf(z) + norm.pdf(z))
        score = np.log(np.maximum(gain, 1e-300)) + possible
    score = score - INSIDE * ~_on_frontier(lattice, possible)
    seen = lattice.coordinates([one.params for one in begun])
    score[cdist(everywhere, seen, "chebyshev").min(axis=1) < TINY] = -math.inf
    return lattice.setting(int(np.argmax(score)))


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


Model = Callable[[Coordinates], tuple[NDArray[np.float64], NDArray[np.float64]]]


def _modelled(
    lattice: Lattice, known: Coordinates, values: NDArray[np.float64], running: Coordinates
) -> Model:
    """Return a Gaussian process: mean and standard deviation at coordinates.

    Where trials are running, what is expected of them counts as seen.
    """
    middle, spread = values.mean(), max(float(values.std()), LEAST_SPREAD)
    scaled = (values - middle) / spread
    process = GaussianProcessRegressor(_kernel(lattice), alpha=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound
        process.fit(known, scaled)
    if len(running):
        expected = process.predict(running)
        known, scaled = np.concatenate([known, running]), np.concatenate([scaled, expected])
        process = GaussianProcessRegressor(process.kernel_, alpha=1e-8, optimizer=None)
        process.fit(known, scaled)
    noise = process.kernel_.k2.noise_level

    def model(at: Coordinates) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        mean, deviation = process.predict(at, return_std=True)
        deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-10))
        return mean * spread + middle, deviation * spread

    return model


def _kernel(lattice: Lattice) -> Kernel:
    """Return a kernel: what is smooth over all parameters, and a share of each block's own."""
    strength = strength_of(lattice.names)
    bounds = np.array(
        [
            SMOOTH_BLOCKS if name == LAYER else SMOOTH_STRENGTH if name == strength else SMOOTH
            for name in lattice.names
        ]
    )
    kernel: Kernel = Matern(np.sqrt(bounds.prod(axis=1)), bounds, nu=2.5)
    if LAYER in lattice.names:
        own = bounds.copy()
        place = lattice.names.index(LAYER)
        one_block = OWN_BLOCKS / (len(lattice.axes[place]) - 1)
        own[place] = one_block, one_block * (1 + 1e-4)  # fixed
        kernel += ConstantKernel(0.2, (0.05, 0.8)) * Matern(np.sqrt(own.prod(axis=1)), own, nu=2.5)
    return ConstantKernel(1.0, (0.3, 10.0)) * kernel + WhiteKernel(1e-3, (1e-5, 3e-2))


def _as_kind(kind: BaseDistribution, value: float) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return min(kind.choices, key=lambda one: abs(float(one) - value))  # type: ignore[arg-type]
    return round(value) if isinstance(kind, IntDistribution) else value

"""What trials say of settings that were not tried: Gaussian processes over a lattice.

One models the objective, one each bound (Gardner et al., ICML 2014). What they know of unlearning:
blocks are ordered, and each has a share of its own; an objective is modelled by its logarithm; by
how much a bound is missed has a trend along a method's strength.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from scipy.spatial.distance import cdist
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel
from threadpoolctl import threadpool_limits

from lunar_tune.study.rows import LAYER
from lunar_tune.study.study import EQUAL, Told

STRENGTHS: Final = ("coefficient", "learning_rate")
"""Parameters of which more means that less is known afterwards; the first one searched is it."""
STRENGTH_STEPS, STEPS = 160, 15  # of a parameter's range
MOST_SETTINGS: Final = 20_000  # of a lattice; with 10,000 a suggestion takes .16 s after 100 trials
GUESSES: Final = 32  # of what running trials will tell
DRAWS, LIKELIEST = 256, 600  # of what may be true, of so many settings
TINY: Final = 1e-9
LEAST_SPREAD, UNKNOWN_SPREAD = 0.02, 0.3  # of scores; where they hardly differ the second
# Least and largest length scale, in ranges of a parameter, and in blocks.
SMOOTH_BLOCKS, SMOOTH_STRENGTH, SMOOTH = (0.08, 0.5), (0.15, 1.5), (0.3, 3.0)
OWN_BLOCKS: Final = 0.7
ALIKE: Final = (0.7, 5.0)  # of searches, which are 1 apart: a correlation of .31 to .97
STEADY: Final = 0.1  # draws a trend to none, as a trial whose lever is the root of it
FLOOR: Final = 0.3  # of the objectives seen so far, added before their logarithm is taken
LITTLE_LEFT: Final = math.log(FLOOR + 0.01)  # such a logarithm, just above the least one seen

Coordinates = NDArray[np.float64]
"""`[settings, parameters]`, each from 0 to 1."""


@dataclass(frozen=True)
class Lattice:
    """Settings of a space, evenly apart."""

    names: tuple[str, ...]
    axes: tuple[NDArray[np.float64], ...]  # values of each parameter
    logarithmic: tuple[bool, ...]

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution]) -> Lattice:
        """Return the lattice of parameters that have several values."""
        searched = {name: kind for name, kind in space.items() if not kind.single()}
        strength = strength_of(searched)
        axes = {
            name: values_of(kind, STRENGTH_STEPS if name == strength else STEPS)
            for name, kind in searched.items()
        }
        while (
            math.prod(map(len, axes.values())) > MOST_SETTINGS and max(map(len, axes.values())) > 2
        ):
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


def values_of(kind: BaseDistribution, steps: int) -> NDArray[np.float64]:
    """Return values of a parameter, from least to largest, of a range so many."""
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


def _tamed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return amounts, cut where they are beyond all others, as a broken model's perplexity."""
    most = max(1.0, min(20 * float(np.median(np.abs(values))), 1e100))
    tamed: NDArray[np.float64] = np.clip(values, -most, most)
    return tamed


def _spread_of(values: NDArray[np.float64]) -> float:
    """Return a standard deviation; what hardly differs does not say how much it may."""
    spread = float(values.std())
    return spread if spread > LEAST_SPREAD else UNKNOWN_SPREAD


def strength_of(names: Any) -> str | None:
    """Return which of some parameters is the strength, if any."""
    return next((name for name in STRENGTHS if name in names), None)


class Belief:
    """What is believed of every setting of a lattice, of which some were told, and some run."""

    def __init__(
        self,
        lattice: Lattice,
        told: Sequence[Told],
        random: np.random.Generator,
        running: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Fit the models; `random` draws what trials that run will tell, in so many `guesses`.

        What other searches told is of functions that are like these, how much is fitted.
        """
        self.lattice, self._random = lattice, random
        own = [one for one in told if not one.search]
        self._seen = lattice.coordinates([one.parameters for one in own])
        searches = np.array([one.search for one in told])
        elsewhere = [searches == one for one in np.unique(searches) if one]
        places = lattice.coordinates([one.parameters for one in told])
        self._known = np.column_stack([places, *elsewhere])
        values = np.array([one.value for one in told], dtype=float)
        values = values.min() + _tamed(values - values.min())
        self._worst = values.max() if elsewhere else math.inf
        self.best = min((one.value for one in own if one.is_feasible), default=math.inf)
        self._low = values.min()
        self._range = float(values.max() - self._low) or max(abs(self._low), TINY)
        open_now = lattice.coordinates(running)
        names = [*told[0].missed]
        missed = np.array([[one.missed.get(name, 0.0) for name in names] for one in told])
        self._objective = self._modelled(self.warped(values), open_now)
        # Equality is a bound that nothing keeps by more than errors: it ends where a trend goes on.
        self._limits = [
            self._modelled(_tamed(one), open_now, trend=name != EQUAL)
            for name, one in zip(names, missed.T, strict=True)
        ]

    @cached_property
    def settings(self) -> Coordinates:
        """The whole lattice."""
        return self.lattice.all()

    @property
    def best_by_guess(self) -> NDArray[np.float64]:
        """Least feasible objective, warped, with what runs, in each guess.

        Where there is none the worst that is known if other searches told it, else infinity.
        """
        runs = self._objective.running
        kept = np.ones(runs.shape, dtype=bool)
        for limit in self._limits:
            kept &= limit.running <= 0
        known = min(self.best, self._worst)
        known = self.warped(known) if math.isfinite(known) else math.inf
        least: NDArray[np.float64] = np.where(kept, runs, math.inf).min(axis=0, initial=known)
        return least

    def warped(self, values: Any) -> Any:
        """Return objectives on the scale on which they are modelled: small ones far apart."""
        return np.log(np.maximum((values - self._low) / self._range + FLOOR, TINY))

    def at(self, settings: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Return the objective's median and the probability that all is kept, `[2, settings]`.

        While nothing runs.
        """
        places = self.lattice.coordinates(settings)
        mean = self._objective.at(places)[0][:, 0]
        kept = np.exp(self._possible(places)[:, 0])
        return np.stack([(np.exp(mean) - FLOOR) * self._range + self._low, kept])

    def objective(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and standard deviation of the warped objective `[settings, guesses]`."""
        return self._objective.at(self.settings)

    def possible(self) -> NDArray[np.float64]:
        """Return the logarithm of the probability that all is kept, `[settings, guesses]`."""
        return self._possible(self.settings)

    def _possible(self, places: Coordinates) -> NDArray[np.float64]:
        total = np.zeros((len(places), self._objective.guesses))
        for limit in self._limits:
            amount, unsure = limit.at(places)
            total += norm.logcdf(-amount / unsure)
        return total

    def least_drawn(self, end: float) -> NDArray[np.float64]:
        """Return the least feasible objective of settings not tried, in `DRAWS` of what may be.

        `end` is the least that there can be. Infinite where nothing is feasible.
        """
        mean, deviation = self.objective()
        score = self.possible()[:, 0]
        if math.isfinite(self.best):
            score = score + norm.logcdf((self.warped(self.best) - mean) / deviation)[:, 0]
        score[cdist(self.settings, self._seen, "chebyshev").min(axis=1) < TINY] = -math.inf
        likeliest = self.settings[np.argsort(-score)[:LIKELIEST]]
        likeliest = likeliest[: int(np.isfinite(score).sum())]
        if not len(likeliest):
            return np.full(DRAWS, math.inf)
        drawn = np.exp(self._objective.drawn(likeliest, self._random)) - FLOOR
        values = np.maximum(drawn * self._range + self._low, end)
        for limit in self._limits:
            values[limit.drawn(likeliest, self._random) > 0] = math.inf
        least: NDArray[np.float64] = values.min(axis=0)
        return least

    def _modelled(
        self, values: NDArray[np.float64], running: Coordinates, *, trend: bool = False
    ) -> Model:
        slope = np.zeros(len(self.lattice.names))
        strength = strength_of(self.lattice.names)
        if trend and strength is not None:
            place = self.lattice.names.index(strength)
            levers = self._known[:, place] - self._known[:, place].mean()
            slope[place] = levers @ values / (levers @ levers + STEADY)
        values = values - self._known[:, : len(slope)] @ slope
        middle, spread = values.mean(), _spread_of(values)
        scaled = (values - middle) / spread
        noise = WhiteKernel(1e-3, (1e-5, 3e-2))
        searches = self._known.shape[1] - len(self.lattice.names)
        process = GaussianProcessRegressor(_smooth(self.lattice, searches) + noise, alpha=1e-8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound
            process.fit(self._known, scaled)
        guessed = np.empty((0, 1))
        if len(running):
            open_now = _at_home(running, self._known.shape[1])
            expected, covariance = process.predict(open_now, return_cov=True)
            guessed = self._random.multivariate_normal(
                expected, covariance, GUESSES, method="eigh"
            ).T
            seen = np.concatenate([np.repeat(scaled[:, None], GUESSES, axis=1), guessed])
            process = GaussianProcessRegressor(process.kernel_, alpha=1e-8, optimizer=None)
            process.fit(np.concatenate([self._known, open_now]), seen)
        told = guessed * spread + middle + (running @ slope)[:, None]
        return Model(process, float(middle), spread, slope, told)


def chances_kept(
    lattice: Lattice, told: Sequence[Told], gaps: Mapping[str, tuple[float, float]]
) -> NDArray[np.float64]:
    """Return the probability that each setting told keeps all bounds on new questions.

    As many of the same kind: a score lies around what all trials say of it, whose standard errors
    are the noise, by its own standard error once more. So the luck with which a setting was chosen
    does not count. By how much more a bound is missed on questions that no fit sees is in `gaps`,
    by bound, with a standard error.
    """
    known, chances = lattice.coordinates([one.parameters for one in told]), np.ones(len(told))
    for bound in told[0].missed:
        missed = _tamed(np.array([one.missed.get(bound, 0.0) for one in told]))
        middle, spread = missed.mean(), _spread_of(missed)
        errors = np.array([one.bound_errors.get(bound, 0.0) for one in told])
        noise = np.maximum((errors / spread) ** 2, 1e-6)
        process = GaussianProcessRegressor(_smooth(lattice), alpha=noise)
        with warnings.catch_warnings(), threadpool_limits(1):  # threads make small matrices wait
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(known, (missed - middle) / spread)
            mean, deviation = process.predict(known, return_std=True)
        gap, error = gaps.get(bound, (0.0, 0.0))
        unsure = np.hypot(np.hypot(deviation * spread, errors), error)
        chances *= norm.cdf(-(mean * spread + middle + gap) / np.maximum(unsure, TINY))
    return chances


@dataclass(frozen=True)
class Model:
    """A Gaussian process of one quantity, without the noise of its observations."""

    process: GaussianProcessRegressor
    middle: float
    spread: float
    slope: NDArray[np.float64]  # of its trend, along each parameter
    running: NDArray[np.float64]
    """What trials that run will tell `[trials, guesses]`."""

    @property
    def guesses(self) -> int:
        """Number of them."""
        return int(self.running.shape[1])

    def at(self, places: Coordinates) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and standard deviation, `[settings, guesses]`."""
        mean, deviation = self.process.predict(self._at_home(places), return_std=True)
        deviation = np.sqrt(np.maximum(deviation**2 - self._noise, 1e-10))
        shape = len(places), self.guesses
        mean = mean.reshape(shape) * self.spread + self._trend(places)
        return mean, deviation.reshape(shape) * self.spread

    def drawn(self, places: Coordinates, random: np.random.Generator) -> NDArray[np.float64]:
        """Return functions that may be true, `[settings, DRAWS]`."""
        mean, covariance = self.process.predict(self._at_home(places), return_cov=True)
        within = 2e-6 - self._noise  # what a factorisation needs
        factor = np.linalg.cholesky(covariance + within * np.eye(len(places)))
        drawn = mean[:, None] + factor @ random.standard_normal((len(places), DRAWS))
        values: NDArray[np.float64] = drawn * self.spread + self._trend(places)
        return values

    def _at_home(self, places: Coordinates) -> Coordinates:
        return _at_home(places, self.process.X_train_.shape[1])

    def _trend(self, places: Coordinates) -> NDArray[np.float64]:
        trend: NDArray[np.float64] = self.middle + (places @ self.slope)[:, None]
        return trend

    @property
    def _noise(self) -> float:
        return float(self.process.kernel_.k2.noise_level)


def _at_home(places: Coordinates, width: int) -> Coordinates:
    """Return coordinates of the search itself, where those of others have so many in all."""
    return np.pad(places, ((0, 0), (0, width - places.shape[1])))


def _smooth(lattice: Lattice, searches: int = 0) -> Kernel:
    """Return a kernel: what is smooth over all parameters, and a share of each block's own.

    Another search is one apart in a dimension of its own (Swersky et al., NeurIPS 2013, in short).
    """
    strength = strength_of(lattice.names)
    bounds = np.array(
        [
            SMOOTH_BLOCKS if name == LAYER else SMOOTH_STRENGTH if name == strength else SMOOTH
            for name in lattice.names
        ]
        + [ALIKE] * searches
    )
    kernel: Kernel = Matern(np.sqrt(bounds.prod(axis=1)), bounds, nu=2.5)
    if LAYER in lattice.names:
        own = bounds.copy()
        place = lattice.names.index(LAYER)
        one_block = OWN_BLOCKS / (len(lattice.axes[place]) - 1)
        own[place] = one_block, one_block * (1 + 1e-4)  # fixed
        kernel += ConstantKernel(0.2, (0.05, 0.8)) * Matern(np.sqrt(own.prod(axis=1)), own, nu=2.5)
    return ConstantKernel(1.0, (0.3, 10.0)) * kernel

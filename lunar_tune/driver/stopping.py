"""When a search knows enough: the chance that a further trial would gain, and by how much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from optuna.distributions import BaseDistribution

from lunar_tune.metrics.goal import Goal, Metric
from lunar_tune.study.rows import LEAST_BELIEVED
from lunar_tune.study.study import Told, at_second

GAIN: Final = 0.01  # of a metric's range; what is less is none
LITTLE: Final = 0.05  # chance of a gain at which a search knows enough
IN_ROW: Final = 3  # trials that have to say so, one after the other


@dataclass(frozen=True, slots=True)
class Prospect:
    """What the trials so far say of all others."""

    chance: float  # that one gains
    least: float
    """Of the objective, feasible, in the whole space: it is higher with 95 % probability."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What more trials of a search would bring."""

    goal: Goal
    space: Mapping[str, BaseDistribution]
    seed: int
    earlier: Sequence[Told] = ()
    """What the searches were told from which this one starts."""
    _known: dict[tuple[Metric, tuple[Any, ...]], Prospect] = field(default_factory=dict, repr=False)

    def is_enough(self, told: Sequence[Told]) -> bool:
        """Say whether little is to gain by either line of the goal."""
        return self.is_settled(told) and self._says_little(told, self.second_chance)

    def is_settled(self, told: Sequence[Told]) -> bool:
        """Say whether little is to gain by the first line of the goal."""
        return self._says_little(told, self.chance)

    def is_at_second(self, told: Sequence[Told]) -> bool:
        """Say whether the next trial is for the second line: the first one is settled, and met."""
        return self.is_settled(told) and _has_second(told)

    def note(self, told: Sequence[Told]) -> dict[str, Any] | None:
        """Return what is to be kept of it as plain values; None where too little is known."""
        if len(told) < LEAST_BELIEVED:
            return None
        second = self.second_chance(told) if self.is_at_second(told) else None
        chance = self.chance(told)
        return {
            "chance": chance,
            "gain": gain(self.goal.objective, told),
            "settled": self.is_settled(told),
            "second_chance": second,
            "enough": self.is_enough(told),
            "more": max(chance, second or 0.0) > LITTLE,  # to gain, as far as is known now
        }

    def chance(self, told: Sequence[Told]) -> float:
        """Return the probability that a setting not tried gains; if none is feasible, that one is.

        By functions drawn together from what is believed, so that the chances of neighbouring
        settings are not added up. Of n trials that all miss a bound it is 1 / (n + 2) at least, by
        Laplace's rule of succession, whatever the models believe.
        """
        least = 0.0 if any(one.is_feasible for one in told) else 1 / (len(told) + 2)
        return max(least, self._prospect(self.goal.objective, told, self.earlier).chance)

    def before(self, told: Sequence[Told]) -> dict[str, float] | None:
        """Return what is kept of it with the trial that follows; None where too little is known."""
        if len(told) < LEAST_BELIEVED:
            return None
        return dataclasses.asdict(self._prospect(self.goal.objective, told, self.earlier))

    def second_chance(self, told: Sequence[Told]) -> float:
        """Return the same by the second line of the goal; 0 where that has nothing to improve."""
        if not _has_second(told):
            return 0.0
        aimed = at_second([*told, *self.earlier])
        return self._prospect(self.goal.then, aimed[: len(told)], aimed[len(told) :]).chance

    def _says_little(self, told: Sequence[Told], chance: Callable[[Sequence[Told]], float]) -> bool:
        last = [told[: len(told) - less] for less in range(IN_ROW)]
        return len(last[-1]) >= LEAST_BELIEVED and all(chance(one) <= LITTLE for one in last)

    def _prospect(self, metric: Metric, told: Sequence[Told], earlier: Sequence[Told]) -> Prospect:
        key = metric, tuple((one.value, *one.parameters.values()) for one in told)
        if key not in self._known:
            from threadpoolctl import threadpool_limits

            from lunar_tune.study.belief import Belief, Lattice  # loads scikit-learn

            lattice = Lattice.of(self.space)
            if not lattice.names:  # there is one setting, and it was tried
                return Prospect(0.0, min(one.value for one in told))
            random = np.random.default_rng([self.seed, len(told)])
            with threadpool_limits(1):
                belief = Belief(lattice, [*told, *earlier], random)
                drawn = belief.least_drawn(metric.least)
            chance = float(np.mean(drawn < belief.best - gain(metric, told)))
            least = np.quantile(np.minimum(drawn, belief.best), LITTLE, method="lower")
            self._known[key] = Prospect(chance, float(least))
        return self._known[key]


def _has_second(told: Sequence[Told]) -> bool:
    return any(one.is_feasible and one.second is not None for one in told)


def gain(metric: Metric, told: Sequence[Told]) -> float:
    """Return the least gain that counts; of a metric without ends by what was feasible so far."""
    extent = metric.high - metric.low
    values = [one.value for one in told if one.is_feasible] or [one.value for one in told]
    return GAIN * (extent if math.isfinite(extent) else max(values) - min(values))

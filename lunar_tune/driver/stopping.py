"""When a search knows enough: the chance that a further trial would gain, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from optuna.distributions import BaseDistribution

from lunar_tune.metrics.goal import Goal
from lunar_tune.study.study import Told

GAIN: Final = 0.01  # of the objective's range; what is less is none
LITTLE: Final = 0.05  # chance of a gain at which a search knows enough
IN_ROW: Final = 3  # trials that have to say so, one after the other
LEAST: Final = 5  # trials, of which something is believed


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What more trials of a search would bring."""

    goal: Goal
    space: Mapping[str, BaseDistribution]
    seed: int
    _known: dict[int, float] = field(default_factory=dict, repr=False)

    def gain(self, told: Sequence[Told]) -> float:
        """Return the least gain that counts; of an objective without ends by the values so far."""
        metric, values = self.goal.objective, [one.value for one in told]
        extent = metric.high - metric.low
        return GAIN * (extent if math.isfinite(extent) else max(values) - min(values))

    def chance(self, told: Sequence[Told]) -> float:
        """Return the probability that a setting not tried gains; if none is feasible, that one is.

        By functions drawn together from what is believed, so that the chances of neighbouring
        settings are not added up.
        """
        if len(told) not in self._known:
            from threadpoolctl import threadpool_limits

            from lunar_tune.study.belief import Belief, Lattice  # loads scikit-learn

            random = np.random.default_rng([self.seed, len(told)])
            with threadpool_limits(1):
                belief = Belief(Lattice.of(self.space), told, random)
                least = belief.least_drawn(self.goal.least)
            self._known[len(told)] = float(np.mean(least < belief.best - self.gain(told)))
        return self._known[len(told)]

    def is_enough(self, told: Sequence[Told]) -> bool:
        """Say whether trials, by number, have said one after the other that little is to gain."""
        last = [told[: len(told) - less] for less in range(IN_ROW)]
        return len(last[-1]) >= LEAST and all(self.chance(one) <= LITTLE for one in last)

    def note(self, told: Sequence[Told]) -> dict[str, Any] | None:
        """Return what is to be kept of it as plain values; None where too little is known."""
        if len(told) < LEAST:
            return None
        chance, gain = self.chance(told), self.gain(told)
        return {"chance": chance, "gain": gain, "enough": self.is_enough(told)}

"""What a search is after: a score to make as good as possible, and bounds to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunar_tune.metrics.demands import (
    Constraint,
    Objective,
    parse_constraints,
    parse_objective,
)
from lunar_tune.metrics.names import METRICS

if TYPE_CHECKING:
    from lunar_tune.config.search_config import SearchConfig

__all__ = ["Goal", "goal_of", "in_words", "score_label"]

# What is known of a trial that was stopped because it had missed the retain floor for certain.
KNOWN_AT_A_STOP = {
    "forget_rouge1",
    "forget_rougeL",
    "retain_rouge1",
    "retain_rougeL",
    "deviation_score",
}
FLOORED = "retain_rouge1"


@dataclass(frozen=True, slots=True)
class Goal:
    """A score to make as good as possible subject to bounds on others."""

    objective: Objective
    constraints: tuple[Constraint, ...]

    @classmethod
    def read(cls, objective: str, constraints: Iterable[str]) -> Goal:
        """Return a goal from text, as it is written on the command line.

        Raises:
            InputError: A metric or a bound means nothing.
        """
        return cls(parse_objective(objective), parse_constraints(constraints))

    def value(self, scores: Mapping[str, float]) -> float:
        """Return what is to be made small; NaN where it is not known."""
        value = scores.get(self.objective.metric, math.nan)
        return value if self.objective.direction == "minimize" else -value

    def violations(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each bound is missed; 0 or less where it is kept."""
        return {str(one): one.violation(scores) for one in self.constraints}

    def is_kept(self, scores: Mapping[str, float]) -> bool:
        """Say whether every bound is kept."""
        return not self.missed(scores)

    def missed(self, scores: Mapping[str, float]) -> tuple[Constraint, ...]:
        """Return the bounds that are not kept."""
        return tuple(one for one in self.constraints if one.violation(scores) > 0)

    def worst(self, seen: Iterable[Mapping[str, float]]) -> tuple[float, dict[str, float]] | None:
        """Return the value and violations of a setting that is as bad as one can be.

        Args:
            seen: Scores that there were; where a metric has no end, the worst of them counts.

        Returns:
            What `value` and `violations` would give; None where a metric has no end and nothing of
            it was seen.
        """
        scores = list(seen)
        ends = [(self.objective.metric, self.objective.direction == "minimize")]
        ends += [(one.metric, one.sense == "<=") for one in self.constraints]
        values = []
        for name, high_is_bad in ends:
            metric = METRICS[name]
            end = metric.high if high_is_bad else metric.low
            if not math.isfinite(end):
                known = [one[name] for one in scores if math.isfinite(one.get(name, math.nan))]
                if not known:
                    return None
                end = max(known) if high_is_bad else min(known)
            values.append(end)
        value = values[0] if self.objective.direction == "minimize" else -values[0]
        pairs = zip(self.constraints, values[1:], strict=True)
        return value, {str(one): one.violation({one.metric: end}) for one, end in pairs}

    @property
    def text(self) -> tuple[str, tuple[str, ...]]:
        """Objective and bounds as `read` takes them."""
        return self.objective.metric, tuple(map(str, self.constraints))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores that it takes, each once."""
        names = (self.objective.metric, *(one.metric for one in self.constraints))
        return tuple(dict.fromkeys(names))

    @property
    def shown(self) -> tuple[str, str]:
        """The two scores that pictures show: what is made good, and what else is kept."""
        first = self.objective.metric
        others = [name for name in (*self.metrics, FLOORED, "forget_rouge1") if name != first]
        return first, others[0]

    @property
    def floor(self) -> float | None:
        """Least retain ROUGE-1, if that is bounded."""
        floors = [c.bound for c in self.constraints if (c.metric, c.sense) == (FLOORED, ">=")]
        return floors[0] if floors else None

    @property
    def stoppable_floor(self) -> float | None:
        """The floor at which a trial may be stopped: where all that counts is known then."""
        return self.floor if set(self.metrics) <= KNOWN_AT_A_STOP else None

    def __str__(self) -> str:
        best = "lowest" if self.objective.direction == "minimize" else "highest"
        text = f"{best} {score_label(self.objective.metric)}"
        return text + (f" subject to {self.bounds}" if self.constraints else "")

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        return in_words(self.constraints)


def goal_of(config: SearchConfig) -> Goal:
    """Return what a search is after.

    Raises:
        InputError: A metric or a bound means nothing.
    """
    return Goal.read(config.minimise, config.constrain)


def in_words(bounds: Iterable[Constraint]) -> str:
    """Return bounds as they are written in a sentence: retain ROUGE-1 of at least 0.8."""
    return ", ".join(
        f"{score_label(one.metric)} of at {'least' if one.sense == '>=' else 'most'} {one.bound:g}"
        for one in bounds
    )


def score_label(name: str) -> str:
    """Return a metric's name as it is written in a sentence: forget ROUGE-1."""
    metric = METRICS[name]
    if metric.quantity == name:
        return name.replace("_", " ")
    quantity = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "mrr": "MRR"}.get(
        metric.quantity, metric.quantity.replace("_", " ")
    )
    return f"{metric.sets[0]} {quantity}"

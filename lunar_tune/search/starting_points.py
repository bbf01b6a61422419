"""Which settings a search tries first, and where each comes from.

Covers: a space's own points, the setting that a prior's best layer is tried with, tuned settings
of the same model; leaving out what lies outside the space, and saying so.
Does not cover: reading tuned settings (`tuned_store`), queueing points (`study`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lunar_tune.errors import InputError
from lunar_tune.search.space.space import Choice, Fixed, FloatRange, Parameter, SearchSpace
from lunar_tune.search.tuned.tuned_settings import TunedSetting

__all__ = [
    "StartingPoint",
    "StartingPoints",
    "fitting",
    "own_points",
    "tuned_points",
    "usual_point",
]

OWN = "the space's own"
# What was tuned on other data is a guess: a few of them are worth a trial each.
MOST_OF_OTHERS = 3


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A setting to try early."""

    values: Mapping[str, int | float]
    origin: str
    """Where it comes from, to show."""


@dataclass(frozen=True, slots=True)
class StartingPoints:
    """Settings to try first, in their order."""

    kept: tuple[StartingPoint, ...] = ()
    left_out: tuple[str, ...] = ()
    """Origin of those that lie outside the space, and why."""

    @property
    def values(self) -> tuple[Mapping[str, int | float], ...]:
        """The settings alone."""
        return tuple(point.values for point in self.kept)

    @property
    def text(self) -> str:
        """What they are, in one line."""
        origins = [point.origin for point in self.kept]
        counts = {origin: origins.count(origin) for origin in origins}
        named = (origin if n == 1 else f"{origin} ({n})" for origin, n in counts.items())
        text = f"{len(origins)} ({', '.join(named)})" if origins else "none"
        return text + (f"; left out: {'; '.join(self.left_out)}" if self.left_out else "")


def fitting(points: Iterable[StartingPoint], space: SearchSpace) -> StartingPoints:
    """Return the points that a space holds, each once, and say why others are left out."""
    kept: dict[tuple[tuple[str, int | float], ...], StartingPoint] = {}
    left_out = []
    for point in points:
        try:
            space.check(point.values)
        except InputError as error:
            reasons = ", ".join(error.messages or (str(error),))
            left_out.append(f"{point.origin} ({reasons})")
        else:
            kept.setdefault(tuple(sorted(point.values.items())), point)
    return StartingPoints(tuple(kept.values()), tuple(left_out))


def own_points(space: SearchSpace) -> list[StartingPoint]:
    """Return the points that the space's file names."""
    return [StartingPoint(point, OWN) for point in space.starting_points]


def tuned_points(
    settings: Sequence[TunedSetting],
    *,
    data: str,
    forget_edges: Sequence[str],
    method: str,
    variant: str,
) -> list[StartingPoint]:
    """Return what was tuned for the same method: on the same data and edges, then a few others.

    Args:
        settings: Of one model.
        data: Name of the search's data.
        forget_edges: Of the search.
        method: Of the search.
        variant: Of the method.
    """
    usable = [one for one in settings if (one.method, one.variant) == (method, variant)]
    # Stable: what is newest comes first among equals, and the rest is by key.
    usable.sort(key=lambda one: one.key)
    usable.sort(key=lambda one: one.provenance.date, reverse=True)
    wanted = (data, tuple(sorted(forget_edges)), method, variant)
    same = [one for one in usable if one.key == wanted]
    others = [one for one in usable if one.key != wanted]
    others.sort(key=lambda one: one.data != data)
    return [
        StartingPoint(one.parameters, f"tuned on {one.data} {'+'.join(one.forget_edges)}")
        for one in (*same, *others[:MOST_OF_OTHERS])
    ]


def usual_point(space: SearchSpace) -> dict[str, int | float]:
    """Return the first setting that a space names, else the middle of its ranges."""
    if space.starting_points:
        return dict(space.starting_points[0])
    return {name: _middle(kind) for name, kind in space.parameters.items()}


def _middle(kind: Parameter) -> int | float:
    """Return a value in the middle that a trial may have; of logarithms where they are sampled."""
    low, high = kind.bounds
    if isinstance(kind, Fixed):
        return kind.value
    if isinstance(kind, Choice):
        return sorted(kind.values)[(len(kind.values) - 1) // 2]
    if isinstance(kind, FloatRange):
        return math.sqrt(low) * math.sqrt(high) if kind.log else (low + high) / 2
    return (int(low) + int(high)) // 2

"""Where trials stand on axes that are not a score's, for pictures of either kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lunar_tune.study.rows import TrialRow

__all__ = ["SPREAD", "TimeAxis", "offsets", "time_axis"]

SPREAD = 0.2
"""Share of a column's width, to each side, over which trials are spread."""
_CELLS = 24  # along a column; trials within one would cover each other
_UNITS = ((3 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (300, 60, "minutes"))


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """When trials ended."""

    unit: str
    """seconds, minutes, hours or days."""
    places: Mapping[int, float]
    """Since the first trial began, by the trial's number, in the order of time."""


def time_axis(rows: Iterable[TrialRow], every: Iterable[TrialRow]) -> TimeAxis:
    """Return when trials ended; of those only whose time is known.

    Args:
        rows: That are shown.
        every: Trials, of which the first to begin is the start.
    """
    begun = min((row.started for row in every if row.started is not None), default=None)
    timed = [(row.ended, row.number) for row in rows if row.ended is not None]
    if begun is None or not timed:
        return TimeAxis("seconds", {})
    seconds = {number: (ended - begun).total_seconds() for ended, number in sorted(timed)}
    span = max(seconds.values())
    found = ((unit, name) for least, unit, name in _UNITS if span >= least)
    unit, name = next(found, (1, "seconds"))
    return TimeAxis(name, {number: value / unit for number, value in seconds.items()})


def offsets(columns: Sequence[Any], heights: Sequence[float]) -> list[float]:
    """Return by how much each trial stands beside the middle of its column.

    Args:
        columns: Of each trial.
        heights: Of each trial, on the scale that is drawn.
    """
    low, high = min(heights, default=0.0), max(heights, default=0.0)
    shared: dict[tuple[Any, int], list[int]] = defaultdict(list)
    for index, (column, height) in enumerate(zip(columns, heights, strict=True)):
        shared[column, int((height - low) / (high - low or 1.0) * _CELLS)].append(index)
    found = [0.0] * len(columns)
    for indices in shared.values():
        for place, index in enumerate(indices):
            if len(indices) > 1:
                found[index] = SPREAD * (2 * place / (len(indices) - 1) - 1)
    return found

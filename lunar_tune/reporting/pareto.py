"""Which of several points no other point beats in both of two scores.

Covers: two scores of which lower is better.
Does not cover: which scores these are; whoever has a score to make large gives its negative.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of points that none dominates, by their first score.

    A point dominates another if it is at least as good in both scores and better in one; so equal
    points stay together.

    Example:
        >>> pareto_front([(0.2, 0.2), (0.1, 0.9), (0.3, 0.3)])
        [1, 0]
    """
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (points[i], i)):
        # Points come by their first score: whoever dominates this one has been seen.
        if not front or points[place][1] < points[front[-1]][1] or _equals(points, place, front):
            front.append(place)
    return front


def _equals(points: Sequence[tuple[float, float]], place: int, front: Sequence[int]) -> bool:
    return points[place] == points[front[-1]]

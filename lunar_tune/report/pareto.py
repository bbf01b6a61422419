"""The Pareto front of points in the plane."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(
    points: Sequence[tuple[float, float]], *, lower_is_better: tuple[bool, bool]
) -> list[int]:
    """Return the indices of the points that no other beats, best first coordinate first.

    A point beats another if it is as good in both coordinates and better in one; equal points are
    all kept.

    Args:
        points: Finite coordinates.
        lower_is_better: Of each coordinate.
    """
    signs = [1.0 if low else -1.0 for low in lower_is_better]
    signed = [(signs[0] * x, signs[1] * y) for x, y in points]
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: signed[index]):
        last = signed[front[-1]] if front else None
        if last is None or signed[index][1] < last[1] or signed[index] == last:
            front.append(index)
    return front

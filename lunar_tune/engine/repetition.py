"""Tokens that repeat themselves: after how many, and from where on."""

from __future__ import annotations

from collections.abc import Sequence


def period_of(said: Sequence[int], *, longest: int, least: int) -> int:
    """Return after how many tokens an answer repeats itself at its end; 0 where it does not.

    Tokens of a period of at most `longest` have been said twice at least, and `least` in a row.
    """
    for period in range(1, min(longest, len(said) // 2) + 1):
        compared = max(least - 1, period)
        end = len(said)
        if (
            said[-1] == said[-1 - period]
            and end >= compared + period
            and (said[end - compared :] == said[end - compared - period : end - period])
        ):
            return period
    return 0


def first_repetition(said: Sequence[int], *, longest: int, least: int) -> tuple[int, int] | None:
    """Return the length of the shortest beginning that repeats itself at its end, and the period.

    It is the first one for which `period_of` gives one; None where there is none.
    """
    window = max(least - 1, longest) + longest  # more is not compared
    for end in range(len(said) + 1):
        if period := period_of(said[max(0, end - window) : end], longest=longest, least=least):
            return end, period
    return None

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
        if end >= compared + period and (
            said[end - compared :] == said[end - compared - period : end - period]
        ):
            return period
    return 0


def first_repetition(said: Sequence[int], *, longest: int, least: int) -> tuple[int, int] | None:
    """Return the length of the shortest beginning that repeats itself at its end, and the period.

    It is the first one for which `period_of` gives one; None where there is none.
    """
    equal = [0] * (longest + 1)  # by period: tokens in a row, up to here, that are repeated ones
    for place, token in enumerate(said):
        for period in range(1, min(longest, place) + 1):
            equal[period] = equal[period] + 1 if token == said[place - period] else 0
            if equal[period] >= max(least - 1, period):
                return place + 1, period
    return None

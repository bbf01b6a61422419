"""Guesses at what an answer says next: cheap, often right, never trusted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

__all__ = ["Guesser"]

# A repetition has at most so many tokens; at least so many tokens in a row must repeat.
LONGEST_PERIOD, LEAST_REPEATED = 16, 4
# Different answers to one question that are remembered, the latest ones.
REMEMBERED = 8


class Guesser:
    """Guesses from known answers.

    Args:
        answers: Tokens of the base model's answers.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        followers: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
        for answer in answers:
            for place in range(1, len(answer)):
                rest = tuple(answer[place:])
                # At an answer's beginning one token says enough, later it takes two.
                said = (-1, answer[0]) if place == 1 else tuple(answer[place - 2 : place])
                followers.setdefault(said, Counter())[rest] += 1
        self._continuations = {
            said: counts.most_common(1)[0][0] for said, counts in followers.items()
        }

        self._remembered: dict[int, deque[tuple[int, ...]]] = {}

    def remember(self, row: int, answer: Sequence[int]) -> None:
        """Note what was answered to a question: another trial may well say the same.

        Args:
            row: The question's number.
            answer: Its tokens.
        """
        latest = self._remembered.setdefault(row, deque(maxlen=REMEMBERED))
        said = tuple(answer)
        if said in latest:
            latest.remove(said)
        latest.appendleft(said)

    def guess(self, row: int, said: Sequence[int], length: int) -> list[int]:
        """Return at most `length` tokens that may come next; none where there is no guess.

        Args:
            row: The question's number.
            said: Tokens of an answer so far.
            length: How many tokens may be of use.
        """
        begun = tuple(said)
        for answer in self._remembered.get(row, ()):
            if len(answer) > len(begun) and answer[: len(begun)] == begun:
                return list(answer[len(begun) : len(begun) + length])
        if period := _period(said):
            return [said[len(said) - period + i % period] for i in range(length)]
        last = (-1, said[0]) if len(said) == 1 else tuple(said[-2:])
        return list(self._continuations.get(last, ())[:length])


def _period(said: Sequence[int]) -> int:
    """Return after how many tokens an answer repeats itself at its end; 0 where it does not."""
    for period in range(1, min(LONGEST_PERIOD, len(said) // 2) + 1):
        compared = max(LEAST_REPEATED - 1, period)
        if len(said) >= compared + period and all(
            said[-i] == said[-i - period] for i in range(1, compared + 1)
        ):
            return period
    return 0

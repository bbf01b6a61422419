"""Answers beside other answers to the same questions."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence

from lunar_tune.metrics.evaluate import AnswerRow

__all__ = ["paired"]


def paired(
    rows: Sequence[AnswerRow], others: Sequence[AnswerRow]
) -> list[tuple[AnswerRow, AnswerRow | None]]:
    """Return each row with the other answer to its question, in the order of the rows.

    Args:
        rows: Answers, with or without texts.
        others: Answers to these questions and to more or fewer; without texts they can only be told
            apart where they have numbers.
    """
    numbered = all(row.row is not None for row in (*rows, *others))

    def key(row: AnswerRow) -> tuple[Hashable, ...]:
        if numbered:
            return row.set_name, row.edge, row.row
        return row.set_name, row.edge, row.question, row.truth

    waiting: defaultdict[tuple[Hashable, ...], deque[AnswerRow]] = defaultdict(deque)
    for other in others:
        waiting[key(other)].append(other)
    return [(row, found.popleft() if (found := waiting[key(row)]) else None) for row in rows]

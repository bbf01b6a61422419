"""Answers of a trial beside the base model's, as a page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lunar_tune.metrics.evaluate import AnswerRow, paired

__all__ = ["SHOWN", "Compared", "TrialAnswers", "forgotten", "got_worse"]

SHOWN = 50
"""Answers of a set that a page shows at most; all are in the trial's own file."""


@dataclass(frozen=True, slots=True)
class TrialAnswers:
    """What an unlearned model says."""

    number: int
    """Number of the trial."""
    label: str
    """Its setting in short."""
    rows: Sequence[AnswerRow]
    full: bool = False
    """Whether they come from the full evaluation."""
    feasible: bool = True
    """Whether the trial keeps every bound."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One question with two models' answers."""

    unlearned: AnswerRow
    vanilla: AnswerRow | None
    """None where the base model's answer is not kept."""

    @property
    def loss(self) -> float:
        """By how much ROUGE-1 is lower than the base model's; 0 where that is not known."""
        return self.vanilla.rouge1 - self.unlearned.rouge1 if self.vanilla is not None else 0.0


def forgotten(rows: Sequence[AnswerRow], vanilla: Sequence[AnswerRow]) -> list[Compared]:
    """Return the questions to forget, least forgotten first."""
    compared = _compare(rows, vanilla, "forget")
    return sorted(compared, key=lambda one: -one.unlearned.rouge1)


def got_worse(rows: Sequence[AnswerRow], vanilla: Sequence[AnswerRow]) -> list[Compared] | None:
    """Return the retained questions whose ROUGE-1 fell, the greatest fall first.

    None where the base model's answer to none of them is kept.
    """
    compared = _compare(rows, vanilla, "retain")
    if compared and all(one.vanilla is None for one in compared):
        return None
    worse = [one for one in compared if one.loss > 0]
    return sorted(worse, key=lambda one: (-one.loss, one.unlearned.rouge1))


def _compare(
    rows: Sequence[AnswerRow], vanilla: Sequence[AnswerRow], set_name: str
) -> list[Compared]:
    """Put answers beside the base model's; a trial may have asked fewer questions."""
    asked = [row for row in rows if row.set_name == set_name]
    return [Compared(row, other) for row, other in paired(asked, vanilla)]

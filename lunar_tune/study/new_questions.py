"""What is to be expected of settings on new questions: how likely they keep the bounds again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Final

from optuna.distributions import BaseDistribution

from lunar_tune.metrics.evaluate import AnswerRow, paired
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.rows import LEAST_BELIEVED, TrialRow
from lunar_tune.study.study import Told

EVEN: Final = 0.5
USUAL: Final = 0.1  # standard deviation of gaps around none, before one is measured


@dataclass(frozen=True, slots=True)
class Gap:
    """The generalisation gap: ROUGE-1 of retain questions that a fit sees, less of those unseen."""

    mean: float
    error: float  # standard error
    rows: int
    unseen: float  # their ROUGE-1 in fits that leave them out

    @property
    def believed(self) -> tuple[float, float]:
        """Mean and standard deviation of what the gap may be, where gaps are as `USUAL`."""
        precision = self.error**-2 + USUAL**-2
        return self.mean * self.error**-2 / precision, precision**-0.5


def gap_of(fitted: Sequence[AnswerRow], unseen: Sequence[AnswerRow]) -> Gap | None:
    """Return the gap from answers to the same questions; None where none is in both.

    One more question, all of which is lost or won, is counted in its error: a few that are answered
    alike do not say that all are.
    """
    pairs = [(other.rouge1, row.rouge1) for row, other in paired(unseen, fitted) if other]
    if not pairs:
        return None
    lost = [before - after for before, after in pairs]
    mean, n = fmean(lost), len(lost)
    squares = 1 + sum((one - mean) ** 2 for one in lost)
    return Gap(mean, math.sqrt(squares / (n * (n + 1))), n, fmean(after for _, after in pairs))


def kept_again(
    space: Mapping[str, BaseDistribution],
    told: Sequence[Told],
    gaps: Mapping[str, Gap] | None = None,
) -> Sequence[float] | None:
    """Return the probability that each trial's setting keeps the bounds on new questions.

    `gaps` are those of bounded scores, by bound. None where too little is known, or no standard
    errors are.
    """
    if len(told) < LEAST_BELIEVED or not any(any(one.bound_errors.values()) for one in told):
        return None
    from lunar_tune.study.belief import Lattice, chances_kept  # loads scikit-learn

    lattice = Lattice.of(space)
    if not lattice.names:
        return None
    moved = {bound: gap.believed for bound, gap in (gaps or {}).items()}
    return [float(chance) for chance in chances_kept(lattice, told, moved)]


def note_of_kept_again(
    space: Mapping[str, BaseDistribution],
    told: Sequence[Told],
    ranked: Sequence[TrialRow],
    goal: Goal,
    gap: Gap | None,
) -> dict[str, Any]:
    """Return what is to be kept of it: how likely the first trial keeps the bounds, `kept_again`.

    The first one's `gap` is taken for that of all. `surer`, where the first one is likelier to miss
    them: number and probability of the next trial that is likelier to keep them, among those with
    the better objectives. Nothing where too little is known.
    """
    chances = kept_again(space, told, {str(goal.retaining): gap} if gap else {}) or []
    known = [
        (row.number, one.value, chance)
        for row in ranked
        for one, chance in zip(told, chances, strict=False)  # none is known, or all
        if one.parameters == row.parameters
    ]
    if not known:
        return {}
    likely = known[0][2]
    note: dict[str, Any] = {"kept_again": likely, "gap": dataclasses.asdict(gap) if gap else None}
    middle = median(one.value for one in told)
    surer = ((n, chance) for n, value, chance in known if chance >= EVEN and value <= middle)
    return note | {"surer": next(surer, None) if likely < EVEN else None}

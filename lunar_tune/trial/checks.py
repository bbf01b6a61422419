"""Looks at a model while its fit goes on: scores of a small sample, and when a fit is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["CHECKED_ROWS", "Check", "Watch"]

# Looks in a whole fit, and the rows of each set that one asks.
LOOKS, CHECKED_ROWS = 4, 32
# A fit is lost when retain ROUGE-1 is below this share of the floor twice in a row: once may be a
# dip from which a loss with a retain term recovers.
LOST_SHARE = 0.5
LOST_CHECKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Scores of samples of the forget and the retain set in the middle of a fit."""

    epochs: int
    """Epochs done."""
    forget_rouge1: float
    retain_rouge1: float


@dataclass(slots=True)
class Watch:
    """When to look at one fit, and what was seen."""

    n_epochs: int
    """Epochs of the fit."""
    floor: float | None
    """Least retain ROUGE-1 of a feasible trial; None never looks."""
    checks: list[Check] = field(default_factory=list)

    def is_due(self, epochs: int) -> bool:
        """Say whether to look after so many epochs; the last one is evaluated anyway."""
        if self.floor is None or epochs >= self.n_epochs:
            return False
        return epochs % math.ceil(self.n_epochs / (LOOKS + 1)) == 0

    @property
    def is_lost(self) -> bool:
        """Whether the fit has lost what was to be kept."""
        last = self.checks[-LOST_CHECKS:]
        limit = LOST_SHARE * (self.floor or 0.0)
        return len(last) == LOST_CHECKS and all(check.retain_rouge1 < limit for check in last)

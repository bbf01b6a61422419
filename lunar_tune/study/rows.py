"""One row a trial: the shape in which tables, pictures, report and MLflow see a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lunar_tune.metrics.goal import Goal

__all__ = [
    "COMPLETE",
    "FAILED",
    "HEADLINE_SCORES",
    "RUNNING",
    "TrialRow",
    "best_first",
    "best_so_far",
    "is_number",
    "nearest_first",
    "score_cells",
]

COMPLETE, FAILED, RUNNING = "complete", "failed", "running"

HEADLINE_SCORES = ("forget_rouge1", "retain_rouge1", "factual_rouge1", "deviation_score")
"""The scores that every table shows, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """What is known of one trial; scores, objective and feasibility if it is complete."""

    number: int
    state: str
    """complete, failed or running."""
    parameters: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)
    objective: float | None = None
    """What the search makes small."""
    feasible: bool | None = None
    """Whether every bound is kept."""
    retain_rows: int | None = None
    """Retain rows that the score was taken on."""
    retain_exact: bool | None = None
    """Whether these are all rows of the retain set."""
    max_new_tokens: int | None = None
    """Token budget of the answers."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """`fit`, `evaluate`, `trial`, and `suggest`, the sampler's time."""
    failure: str | None = None
    """Why the trial failed."""
    again: bool = False
    """Whether that had nothing to do with its setting, which is run again under another number."""
    losses: tuple[float, ...] = ()
    """Training loss of each epoch."""
    checks: tuple[Mapping[str, float], ...] = ()
    """Periodic evaluations: `epochs`, `forget_rouge1`, `retain_rouge1` of samples."""
    answers_digest: str | None = None
    """SHA-256 of the trial's answers file."""
    started: datetime | None = None
    ended: datetime | None = None
    """In local time: when it was asked for, and when its result was told."""

    @property
    def counts(self) -> bool:
        """Whether it has ended and is one of the trials that the search was to have."""
        return self.state != RUNNING and not self.again

    @property
    def label(self) -> str:
        """The setting in short, for example `L14 c2.0 lr3e-3`."""
        short = {"layer": "L", "coefficient": "c", "learning_rate": "lr"}
        return " ".join(
            f"{short.get(name, name)}{_brief(value)}" for name, value in self.parameters.items()
        )

    def flat(self) -> dict[str, Any]:
        """Return the row with the stable column names of `trials.parquet`."""
        placed = {*HEADLINE_SCORES, "retain_rows"}
        return {
            "number": self.number,
            "state": self.state,
            **{f"params.{name}": value for name, value in self.parameters.items()},
            **{name: self.scores.get(name) for name in HEADLINE_SCORES},
            "objective": self.objective,
            "feasible": self.feasible,
            "retain_rows": self.retain_rows,
            "retain_exact": self.retain_exact,
            "max_new_tokens": self.max_new_tokens,
            "seconds": self.seconds.get("trial"),
            **{f"seconds.{name}": value for name, value in self.seconds.items() if name != "trial"},
            **{name: value for name, value in self.scores.items() if name not in placed},
            "started": self.started,
            "ended": self.ended,
            "failure": self.failure,
            "again": self.again,
            "answers_digest": self.answers_digest,
        }


def score_cells(scores: Mapping[str, float]) -> list[str]:
    """Return the headline scores as cells of a table on the screen, a dash where there is none."""
    return [f"{scores[name]:.3f}" if name in scores else "-" for name in HEADLINE_SCORES]


def is_number(value: Any) -> bool:
    """Say whether a parameter's value has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _brief(value: Any) -> str:
    """Return a number in few characters: 14, 2.0, 7.44, 3e-3, 3.1e-3."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value == 0 or 0.1 <= abs(value) < 1000:
        text = f"{value:.2f}"
        return text[:-1] if text.endswith("0") else text
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def best_first(rows: list[TrialRow]) -> list[TrialRow]:
    """Return the feasible trials, lowest objective first, higher retain ROUGE-1 on a tie."""
    feasible = [row for row in rows if row.state == COMPLETE and row.feasible]
    return sorted(
        feasible, key=lambda row: (row.objective, -row.scores["retain_rouge1"], row.number)
    )


def nearest_first(rows: Iterable[TrialRow], goal: Goal) -> list[TrialRow]:
    """Return the completed trials, least missed bounds first; of several the best."""

    def missed(row: TrialRow) -> tuple[float, float, int]:
        by_how_much = sum(max(0.0, one) for one in goal.violations(row.scores).values())
        value = goal.value(row.scores)
        return by_how_much, math.inf if math.isnan(value) else value, row.number

    return sorted((row for row in rows if row.state == COMPLETE), key=missed)


def best_so_far(rows: Iterable[TrialRow]) -> list[tuple[TrialRow, TrialRow]]:
    """Return each trial with the best feasible one up to it, from the first feasible one on."""
    pairs: list[tuple[TrialRow, TrialRow]] = []
    best: list[TrialRow] = []
    for row in rows:
        best = best_first([*best, row])[:1]
        pairs += [(row, one) for one in best]
    return pairs

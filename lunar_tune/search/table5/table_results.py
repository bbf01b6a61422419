"""From a cell's study to what the table of methods says of it, and from nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lunar_tune.metrics.goal import Goal
from lunar_tune.report.methods_table import (
    FEASIBLE,
    INFEASIBLE,
    REFUSED,
    UNFINISHED,
    CellResult,
    Tolerance,
)
from lunar_tune.search.table5.table_cells import Cell
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first, nearest_first
from lunar_tune.study.study import StoredStudy

__all__ = ["is_finished", "result_of"]

# How much worse than the best a trial may be to count as good, in units of the objective.
AS_GOOD = 0.05
STRENGTHS = ("learning_rate", "ridge")


def is_finished(stored: StoredStudy | None, num_trials: int) -> bool:
    """Say whether a study has run so many trials to its end."""
    return stored is not None and stored.has_ended(num_trials)


def result_of(cell: Cell, stored: StoredStudy | None, num_trials: int) -> CellResult:
    """Return what a cell's study says.

    Args:
        cell: The cell.
        stored: Its study; None where there is none yet.
        num_trials: Trials that a finished cell has.
    """
    if stored is None:
        return _result(cell, REFUSED)
    if not is_finished(stored, num_trials):
        refused = stored.notes.get("refused")
        if refused is not None:
            return _result(cell, REFUSED, reason=refused, rows=stored.rows)
        ended = sum(row.state == COMPLETE for row in stored.rows)
        reason = f"{ended} of {num_trials} trials{_failures(stored.rows)}"
        return _result(cell, UNFINISHED, reason=reason, rows=stored.rows)
    complete = [row for row in stored.rows if row.state == COMPLETE]
    goal = Goal.read(*stored.notes["goal"])
    confirmed = stored.notes.get("confirmed")
    if confirmed is None:
        nearest = next(iter(nearest_first(complete, goal)), None)
        reason = "" if complete else _failures(stored.rows).removeprefix("; ")
        return _result(cell, INFEASIBLE, reason=reason, row=nearest, rows=stored.rows)
    row = next(row for row in complete if row.number == confirmed["number"])
    return _result(
        cell,
        FEASIBLE,
        row=row,
        scores=confirmed["scores"],
        rows=stored.rows,
        tolerance=_tolerance(complete),
    )


def _result(
    cell: Cell,
    state: str,
    *,
    reason: str = "",
    row: TrialRow | None = None,
    scores: dict[str, float] | None = None,
    rows: Sequence[TrialRow] = (),
    tolerance: Tolerance | None = None,
) -> CellResult:
    complete = [one for one in rows if one.state == COMPLETE]
    return CellResult(
        model=cell.model,
        data=cell.data,
        method=cell.method,
        variant=cell.variant,
        seed=cell.seed,
        state=state,
        reason=reason,
        parameters=row.parameters if row is not None else None,
        scores=scores or (row.scores if row is not None else None),
        n_trials=len(complete),
        n_feasible=sum(bool(one.feasible) for one in complete),
        seconds=sum(
            one.seconds.get("trial", 0.0) + one.seconds.get("suggest", 0.0) for one in rows
        ),
        tolerance=tolerance,
    )


def _failures(rows: Sequence[TrialRow]) -> str:
    """Return why most trials failed that did."""
    failures = Counter(row.failure for row in rows if row.state == FAILED)
    return f"; {failures.total()} failed: {failures.most_common(1)[0][0]}" if failures else ""


def _tolerance(complete: Sequence[TrialRow]) -> Tolerance | None:
    """Return between which values of its strength a method does nearly as well as at its best."""
    feasible = best_first(list(complete))
    name = next((name for name in STRENGTHS if feasible and name in feasible[0].parameters), None)
    if name is None:
        return None
    limit = (feasible[0].objective or 0.0) + AS_GOOD
    values = [
        row.parameters[name]
        for row in feasible
        if row.objective is not None and row.objective <= limit
    ]
    return Tolerance(name, min(values), max(values))

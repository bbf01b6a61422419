"""The cells of the table of methods: every model with every data set, method and seed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.config.search_config import LONGEST_NAME, SearchConfig
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import safe_name
from lunar_tune.methods.contract import METHODS
from lunar_tune.metrics.goal import Goal
from lunar_tune.models.catalog import resolve_model
from lunar_tune.report.methods_table import (
    FEASIBLE,
    INFEASIBLE,
    REFUSED,
    UNFINISHED,
    CellResult,
    Tolerance,
)
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first, nearest_first
from lunar_tune.study.study import StoredStudy

__all__ = ["Cell", "cells_of", "check_names", "result_of"]

# How much worse than the best a trial may be to count as good, in units of the objective.
AS_GOOD = 0.05
STRENGTHS = ("learning_rate", "ridge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One study of the table."""

    model: str
    data: str
    """`NAME` or `NAME:EDGE+EDGE`; empty for the model's own data."""
    method: str
    variant: str
    seed: int
    several_seeds: bool = False
    """Whether it is one of several that differ in their seed."""

    @property
    def name(self) -> str:
        """The search's name and folder."""
        model, data = _short(self.model), _short(self.data or "own")
        seed = f"-seed{self.seed}" if self.seed else ""
        text = f"{model}-{data}-{self.method}-{self.variant}{seed}"
        name = safe_name(text)
        if name == text and len(name) <= LONGEST_NAME:
            return name
        # Characters were left out, or are too many: other text may look the same.
        return f"{name[: LONGEST_NAME - 8]}-{_digest(text)}"

    def has(self, text: str) -> bool:
        """Say whether the method has the parameter or setting of a text `NAME=…`."""
        return _name_of(text) in METHODS[self.method].names_in_use(self.variant)

    def config(self, shared: SearchConfig) -> SearchConfig:
        """Return the cell's search.

        What one method has and another has not is fixed or narrowed where there is such a thing.
        """
        name, _, edges = self.data.partition(":")
        variant = f"{METHODS[self.method].variant_setting}={self.variant}"
        return dataclasses.replace(
            shared,
            model=self.model,
            data=name or shared.data,
            forget_edge=tuple(edges.split("+")) if edges else shared.forget_edge,
            method=self.method,
            fix=(variant, *filter(self.has, shared.fix)),
            range=tuple(filter(self.has, shared.range)),
            seed=self.seed,
            name=self.name,
            resume=self.name,
        )


def check_names(cells: Sequence[Cell], shared: SearchConfig) -> None:
    """Check that what is fixed or narrowed has a meaning with one of the methods at least.

    Raises:
        InputError: Something has none.
    """
    known = set[str]().union(*(METHODS[one.method].names_in_use(one.variant) for one in cells))
    problems = Problems()
    for option, texts in (("--fix", shared.fix), ("--range", shared.range)):
        unknown = [text for text in texts if _name_of(text) not in known]
        if unknown:
            problems.add(
                f"{option} {', '.join(unknown)}: no method of the table has it. There are: "
                f"{', '.join(sorted(known))}."
            )
    problems.raise_if_any()


def _name_of(assignment: str) -> str:
    return assignment.partition("=")[0].strip().replace("-", "_")


def cells_of(
    models: Sequence[str],
    data: Sequence[str],
    methods: Sequence[str],
    *,
    seed: int = 0,
    seeds: int = 1,
) -> list[Cell]:
    """Return all cells, model by model, so that what is kept of a model is used while it is fresh.

    Args:
        models: As `--model` takes them.
        data: `NAME` or `NAME:EDGE+EDGE`; none for each model's own.
        methods: `NAME` or `NAME:VARIANT`.
        seed: Of the first study of a cell.
        seeds: Studies of a cell.

    Raises:
        InputError: Something means nothing or is named twice; all of it is said.
    """
    problems, variants = Problems(), []
    if seeds < 1:
        problems.add(f"--seeds {seeds}: at least 1.")
    for flag, names in (("--model", models), ("--data", data), ("--method", methods)):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            problems.add(f"{flag}: {', '.join(twice)} is named twice.")
    for model in models:
        with problems.collect():
            resolve_model(model)
    for name in filter(None, (one.partition(":")[0] for one in data)):
        with problems.collect():
            resolve_data(name, kind="records")
    for text in methods:
        with problems.collect():
            method, _, variant = text.partition(":")
            known = METHODS[method].variants
            if variant and variant not in known:
                raise InputError(f"--method {text}: {method} has {', '.join(known)}.")
            variants.append((method, variant or known[0]))
    if len(set(variants)) < len(variants):
        problems.add("--method: a method and variant are named twice.")
    problems.raise_if_any()
    return [
        Cell(
            model=model,
            data=one,
            method=method,
            variant=variant,
            seed=number,
            several_seeds=seeds > 1,
        )
        for model, one, (method, variant), number in itertools.product(
            models, data or [""], variants, range(seed, seed + seeds)
        )
    ]


def _short(text: str) -> str:
    """Return a name for folders; of a path its last part and a digest, for others may share it."""
    return f"{Path(text).stem}-{_digest(text)}" if "/" in text else text.replace(":", "-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def result_of(cell: Cell, stored: StoredStudy | None, num_trials: int) -> CellResult:
    """Return what a cell's study says; a finished one has so many trials."""
    rows = stored.rows if stored is not None else ()
    notes = stored.notes if stored is not None else {}
    complete = [row for row in rows if row.state == COMPLETE]
    failures = Counter(row.failure for row in rows if row.state == FAILED)
    failed = f"{failures.total()} failed: {failures.most_common(1)[0][0]}" if failures else ""
    row = scores = tolerance = None
    if stored is None:
        state, reason = REFUSED, ""
    elif not stored.has_ended(num_trials) and notes.get("refused") is not None:
        state, reason = REFUSED, notes["refused"]
    elif not stored.has_ended(num_trials):
        ended = f"{len(complete)} of {num_trials} trials"
        state, reason = UNFINISHED, f"{ended}; {failed}" if failed else ended
    elif (confirmed := notes.get("confirmed")) is None:
        state, reason = INFEASIBLE, "" if complete else failed
        row = next(iter(nearest_first(complete, Goal.read(*notes["goal"]))), None)
        scores = row.scores if row is not None else None
    else:
        state, reason = FEASIBLE, ""
        row = next(row for row in complete if row.number == confirmed["number"])
        scores, tolerance = confirmed["scores"], _tolerance(complete)
    return CellResult(
        model=cell.model,
        data=cell.data,
        method=cell.method,
        variant=cell.variant,
        seed=cell.seed,
        state=state,
        reason=reason,
        parameters=row.parameters if row is not None else None,
        scores=scores,
        n_trials=len(complete),
        n_feasible=sum(bool(one.feasible) for one in complete),
        seconds=sum(
            one.seconds.get("trial", 0.0) + one.seconds.get("suggest", 0.0) for one in rows
        ),
        tolerance=tolerance,
    )


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

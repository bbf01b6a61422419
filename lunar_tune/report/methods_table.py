"""The table of methods: its cells, what their studies say, and its files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tabulate import tabulate

from lunar_tune.config.search_config import LONGEST_NAME, SearchConfig
from lunar_tune.files import safe_name, write_atomically
from lunar_tune.methods.contract import METHODS
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.rows import (
    COMPLETE,
    FAILED,
    HEADLINE_SCORES,
    TrialRow,
    best_first,
    nearest_first,
    score_cells,
)
from lunar_tune.study.study import StoredStudy

__all__ = ["Cell", "CellResult", "print_methods_table", "result_of", "write_methods_table"]

FEASIBLE, INFEASIBLE, UNFINISHED, REFUSED = "feasible", "infeasible", "unfinished", "not run"
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

    def has(self, assignment: str) -> bool:
        """Say whether the method has the parameter or setting of a text `NAME=…`."""
        name = assignment.partition("=")[0].strip().replace("-", "_")
        return name in METHODS[self.method].names_in_use(self.variant)

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


def _short(text: str) -> str:
    """Return a name for folders; of a path its last part and a digest, for others may share it."""
    return f"{Path(text).stem}-{_digest(text)}" if "/" in text else text.replace(":", "-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What a cell's study says."""

    cell: Cell
    state: str
    """feasible, infeasible, unfinished or not run."""
    reason: str = ""
    """Why it was not run, or how far it is."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The tuned setting; of an infeasible cell the one that misses least."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores of that setting: confirmed in full where feasible, else as searched."""
    n_trials: int = 0
    """Completed."""
    n_feasible: int = 0
    seconds: float = 0.0
    """Time of all trials and suggestions."""
    tolerance: tuple[float, float] | None = None
    """How sharp the optimum is: the least and greatest learning rate (closed form: ridge) that stay
    feasible and within 0.05 of the best as searched."""

    @property
    def is_finished(self) -> bool:
        """Whether the search has ended by itself."""
        return self.state in {FEASIBLE, INFEASIBLE}


def result_of(cell: Cell, stored: StoredStudy | None, num_trials: int) -> CellResult:
    """Return what a cell's study says; a finished one has so many trials."""
    if stored is None:
        return CellResult(cell=cell, state=REFUSED)
    rows, notes = stored.rows, stored.notes
    complete = [row for row in rows if row.state == COMPLETE]
    failures = Counter(row.failure for row in rows if row.state == FAILED)
    failed = f"{failures.total()} failed: {failures.most_common(1)[0][0]}" if failures else ""
    read = CellResult(
        cell=cell,
        state=UNFINISHED,
        n_trials=len(complete),
        n_feasible=sum(bool(row.feasible) for row in complete),
        seconds=sum(row.seconds.get(part, 0.0) for row in rows for part in ("trial", "suggest")),
    )
    if not stored.has_ended(num_trials):
        if (refused := notes.get("refused")) is not None:
            return dataclasses.replace(read, state=REFUSED, reason=refused)
        ended = f"{len(complete)} of {num_trials} trials"
        return dataclasses.replace(read, reason=f"{ended}; {failed}" if failed else ended)
    if (confirmed := notes.get("confirmed")) is not None:
        return dataclasses.replace(
            read,
            state=FEASIBLE,
            parameters=rows[confirmed["number"]].parameters,
            scores=confirmed["scores"],
            tolerance=_tolerance(complete),
        )
    if not complete:
        return dataclasses.replace(read, state=INFEASIBLE, reason=failed)
    nearest = nearest_first(complete, Goal.read(*notes["goal"]))[0]
    return dataclasses.replace(
        read, state=INFEASIBLE, parameters=nearest.parameters, scores=nearest.scores
    )


def _tolerance(complete: Sequence[TrialRow]) -> tuple[float, float] | None:
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
    return min(values), max(values)


def write_methods_table(results: Sequence[CellResult], folder: Path) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.tex`; return their paths.

    Markdown and LaTeX have a row a cell, with mean and standard deviation over seeds; CSV has a
    row for each seed.
    """
    texts = {
        "table.md": _table(results, "github", italic="*{}*") + "\n" + _NOTES,
        "table.csv": _csv(results),
        "table.tex": _table(results, "latex_booktabs", italic="{}") + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]


def print_methods_table(console: Console, results: Sequence[CellResult]) -> None:
    """Show the cells of every seed."""
    several = len({one.cell.seed for one in results}) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "data", "method", ""):
        table.add_column(column)
    for column in ("forget", "retain", "factual", "deviation"):
        table.add_column(column, justify="right")
    for one in results:
        cell, seed = one.cell, f" seed {one.cell.seed}" if several else ""
        table.add_row(
            escape(cell.model),
            escape(cell.data or "own"),
            f"{cell.method} ({cell.variant}){seed}",
            one.state,
            *score_cells(one.scores),
        )
    console.print(table)


_NOTES = """
ROUGE-1 recall (R1) and deviation score of the tuned setting, from a full evaluation of the
confirmed best. *trials*: completed, and in brackets feasible. *time*: of all trials of the cell.
*as good*: the least and the greatest learning rate (closed form: ridge) among trials that are
feasible and within 0.05 of the best as searched, and their ratio: how little it matters to hit it.
A row in *italics* has no feasible setting; it shows the trial that misses the bounds least, as
searched.
"""


def _table(results: Sequence[CellResult], form: str, *, italic: str) -> str:
    """Return the readable table in one of tabulate's forms."""
    groups: dict[Cell, list[CellResult]] = {}
    for one in results:
        groups.setdefault(dataclasses.replace(one.cell, seed=0), []).append(one)
    rows = [_row(group, italic) for group in groups.values()]
    if all(len(group) == 1 for group in groups.values()):
        rows = [{key: text for key, text in row.items() if key != "seeds"} for row in rows]
    if form == "github":
        rows = [{key: text.replace("|", "\\|") for key, text in row.items()} for row in rows]
    table: str = tabulate(rows, "keys", tablefmt=form, disable_numparse=True)
    return table


def _row(seeds: Sequence[CellResult], italic: str) -> dict[str, str]:
    """Return one row of the readable tables, by column; the setting is the best seed's."""

    def goodness(one: CellResult) -> tuple[int, float, int]:
        order = [FEASIBLE, INFEASIBLE, UNFINISHED, REFUSED].index(one.state)
        return order, one.scores.get("deviation_score", math.inf), one.cell.seed

    best = min(seeds, key=goodness)
    cell, alike = best.cell, [one for one in seeds if one.state == best.state]
    method = cell.method
    if cell.variant != METHODS[cell.method].variants[0]:
        method += f" ({cell.variant})"
    setting = ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in best.parameters.items()
    )
    scores = [
        _spread([one.scores[name] for one in alike if name in one.scores])
        for name in HEADLINE_SCORES
    ]
    if best.state != FEASIBLE:
        said = best.state + (f": {' '.join(best.reason.split())}" if best.reason else "")
        setting = f"{italic.format(said)} {setting}".rstrip()
        scores = [italic.format(score) if score else "" for score in scores]
    as_good = ""
    if best.tolerance is not None:
        low, high = best.tolerance
        as_good = f"{low:.2g} … {high:.2g} (x{high / low:.2g})"
    feasible = sum(one.n_feasible for one in seeds)
    return {
        "model": cell.model,
        "data": cell.data,
        "method": method,
        "tuned setting": setting,
        **dict(zip(("forget R1", "retain R1", "factual R1", "deviation"), scores, strict=True)),
        "trials": f"{sum(one.n_trials for one in seeds)} ({feasible})",
        "time (s)": f"{sum(one.seconds for one in seeds):.1f}",
        "as good (within .05)": as_good,
        "seeds": f"{len(alike)} of {len(seeds)}" if len(alike) < len(seeds) else str(len(seeds)),
    }


def _spread(values: Sequence[float]) -> str:
    """Return a mean, with its standard deviation where there are several values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def _csv(results: Sequence[CellResult]) -> str:
    names = dict.fromkeys(name for one in results for name in one.parameters)
    rows = []
    for one in results:
        low, high = one.tolerance or (None, None)
        rows.append(
            {
                **dataclasses.asdict(one.cell),
                "state": one.state,
                "reason": one.reason,
                **{name: one.parameters.get(name) for name in names},
                **{name: one.scores.get(name) for name in HEADLINE_SCORES},
                "trials": one.n_trials,
                "feasible_trials": one.n_feasible,
                "seconds": round(one.seconds, 3),
                "tolerance_low": low,
                "tolerance_high": high,
            }
        )
    import pandas as pd

    table: str = pd.DataFrame(rows, dtype=object).to_csv(index=False)
    return table

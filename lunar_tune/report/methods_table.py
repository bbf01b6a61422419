"""The table of methods: of each method, model and data set the tuned setting and its scores."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lunar_tune.files import write_atomically
from lunar_tune.methods.contract import METHODS
from lunar_tune.study.rows import HEADLINE_SCORES

__all__ = ["CellResult", "Tolerance", "write_methods_table"]

FEASIBLE, INFEASIBLE, UNFINISHED, REFUSED = "feasible", "infeasible", "unfinished", "not run"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How sharp an optimum is: the values of a parameter that do nearly as well."""

    name: str
    """learning_rate, or ridge."""
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.2g} … {self.high:.2g} (x{self.high / self.low:.2g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What one study says."""

    model: str
    data: str
    """With the edges to forget."""
    method: str
    variant: str
    seed: int
    state: str
    """feasible, infeasible, unfinished or not run."""
    reason: str = ""
    """Why it was not run, or how far it is."""
    parameters: Mapping[str, Any] | None = None
    """The tuned setting; of an infeasible cell the one that misses least."""
    scores: Mapping[str, float] | None = None
    """Scores of that setting: confirmed in full where feasible, else as searched."""
    n_trials: int = 0
    """Completed."""
    n_feasible: int = 0
    seconds: float = 0.0
    """Time of all trials and suggestions."""
    tolerance: Tolerance | None = None
    """Values that stay feasible and within 0.05 of the best as searched."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it shares with the same cell of another seed."""
        return self.model, self.data, self.method, self.variant


def write_methods_table(results: Sequence[CellResult], folder: Path) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.tex`; return their paths.

    Markdown and LaTeX have a row a cell, with mean and standard deviation over seeds; CSV has a
    row for each seed.
    """
    groups: dict[tuple[str, str, str, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault(result.key, []).append(result)
    cells = list(groups.values())
    texts = {
        "table.md": _table(cells, "github", italic="*{}*") + "\n" + _NOTES,
        "table.csv": _csv(results),
        "table.tex": _table(cells, "latex_booktabs", italic="{}") + "\n",
    }
    paths = [folder / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text.encode())
    return paths


_HEADER = [
    "model",
    "data",
    "method",
    "tuned setting",
    "forget R1",
    "retain R1",
    "factual R1",
    "deviation",
    "trials",
    "time (s)",
    "as good (within .05)",
]
_NOTES = """
ROUGE-1 recall (R1) and deviation score of the tuned setting, from a full evaluation of the
confirmed best. *trials*: completed, and in brackets feasible. *time*: of all trials of the cell.
*as good*: the least and the greatest learning rate (closed form: ridge) among trials that are
feasible and within 0.05 of the best as searched, and their ratio: how little it matters to hit it.
A row in *italics* has no feasible setting; it shows the trial that misses the bounds least, as
searched.
"""


def _table(groups: Sequence[Sequence[CellResult]], form: str, *, italic: str) -> str:
    """Return the readable table in one of tabulate's forms."""
    header = [*_HEADER, *(["seeds"] if any(len(cells) > 1 for cells in groups) else [])]
    rows = [_row(cells, italic)[: len(header)] for cells in groups]
    if form == "github":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    text: str = tabulate(rows, header, tablefmt=form, disable_numparse=True)
    return text


def _row(cells: Sequence[CellResult], italic: str) -> list[str]:
    """Return one row of the readable tables; the setting is the best seed's."""
    best = min(cells, key=_goodness)
    alike = [cell for cell in cells if cell.state == best.state]
    scores = [_spread([c.scores.get(name) for c in alike if c.scores]) for name in HEADLINE_SCORES]
    setting = _setting(best.parameters)
    if best.state != FEASIBLE:
        said = best.state + (f": {' '.join(best.reason.split())}" if best.reason else "")
        setting = italic.format(said) + (f" {setting}" if setting else "")
        scores = [italic.format(score) if score else "" for score in scores]
    feasible = sum(cell.n_feasible for cell in cells)
    return [
        best.model,
        best.data,
        best.method if best.variant == _usual(best) else f"{best.method} ({best.variant})",
        setting,
        *scores,
        f"{sum(cell.n_trials for cell in cells)} ({feasible})",
        f"{sum(cell.seconds for cell in cells):.1f}",
        str(best.tolerance or ""),
        str(len(cells)) if len(alike) == len(cells) else f"{len(alike)} of {len(cells)}",
    ]


def _usual(cell: CellResult) -> str:
    """Return the variant that needs no name."""
    return METHODS[cell.method].variants[0]


def _goodness(cell: CellResult) -> tuple[int, float, int]:
    """Order cells of one method: feasible ones first, then by deviation, then by seed."""
    order = [FEASIBLE, INFEASIBLE, UNFINISHED, REFUSED].index(cell.state)
    return order, (cell.scores or {}).get("deviation_score", math.inf), cell.seed


def _spread(values: Sequence[float | None]) -> str:
    """Return a mean, with its standard deviation where there are several values."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.3f}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):.3f}"


def _setting(parameters: Mapping[str, Any] | None) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in (parameters or {}).items()
    )


def _csv(results: Sequence[CellResult]) -> str:
    names = dict.fromkeys(name for r in results for name in r.parameters or {})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fixed = ("model", "data", "method", "variant", "seed", "state", "reason")
    counted = ("trials", "feasible_trials", "seconds", "tolerance_low", "tolerance_high")
    writer.writerow([*fixed, *names, *HEADLINE_SCORES, *counted])
    for one in results:
        tolerance = one.tolerance
        writer.writerow(
            [
                *(getattr(one, name) for name in fixed),
                *((one.parameters or {}).get(name, "") for name in names),
                *((one.scores or {}).get(name, "") for name in HEADLINE_SCORES),
                one.n_trials,
                one.n_feasible,
                round(one.seconds, 3),
                "" if tolerance is None else tolerance.low,
                "" if tolerance is None else tolerance.high,
            ]
        )
    return buffer.getvalue()

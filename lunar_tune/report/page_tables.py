"""The tables of a search's page as columns and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lunar_tune.metrics.goal import score_label
from lunar_tune.report.report import Report
from lunar_tune.study.rows import COMPLETE, HEADLINE_SCORES, TrialRow, is_number

__all__ = [
    "Cell",
    "Column",
    "Line",
    "Table",
    "estimates_note",
    "scores_table",
    "searches_table",
    "trials_table",
]

_NOT_MEASURED = "–"  # noqa: RUF001 an en dash


@dataclass(frozen=True, slots=True)
class Column:
    """What stands over a column."""

    title: str
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows."""

    text: str
    order: float | None = None
    """What a numeric column is sorted by; None comes last either way."""
    link: str | None = None
    """Where a click leads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row of a table."""

    cells: Sequence[Cell]
    number: int | None = None
    """Number of a trial."""
    kind: str = ""
    """feasible, infeasible, failed, again (failed and run again) or running."""
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows."""

    columns: Sequence[Column]
    lines: Sequence[Line]

    def count(self, kind: str) -> int:
        """Return how many trials are of a kind."""
        return sum(line.kind == kind for line in self.lines)


def trials_table(report: Report) -> Table:
    """Return a row a trial, by number."""
    rows = report.rows
    parameters = list(dict.fromkeys(name for row in rows for name in row.parameters))
    scores = _scores(report)
    columns = [
        Column("trial"),
        Column("state", numeric=False),
        *(Column(n.replace("_", " "), numeric=_are_numbers(rows, n)) for n in parameters),
        *(Column(_title(name)) for name in scores),
        Column("feasible", numeric=False),
        Column("time (s)"),
        Column("failure", numeric=False),
    ]
    return Table(columns, [_line(report, row, parameters, scores) for row in rows])


def estimates_note(report: Report) -> str:
    """Say what the sign of an estimate means; empty where there is none."""
    estimated = [row for row in report.rows if row.retain_exact is False]
    reasons = []
    if any(not report.was_stopped(row) for row in estimated):
        reasons.append(f"from a sample of the questions to keep ({report.asked_retain_rows})")
    if any(report.was_stopped(row) for row in estimated):
        reasons.append(
            "from fewer questions to keep where a trial was stopped because it had missed the "
            "bound for certain"
        )
    return f"≈ {', or '.join(reasons)}." if reasons else ""


def scores_table(report: Report) -> Table:
    """Return the base model's scores and the confirmed best trial's."""
    names = _scores(report)
    columns = [Column("model", numeric=False), *(Column(_title(name)) for name in names)]
    lines = [
        Line(cells=[Cell(who), *(_number(scores.get(name)) for name in names)])
        for who, scores in report.compared.items()
    ]
    return Table(columns, lines)


def searches_table(searches: Sequence[tuple[str, str, Report]]) -> Table:
    """Return a row a search: its best setting, confirmed, beside the base model.

    Args:
        searches: Anchor on the page, name and report of each.
    """
    columns = [
        *(Column(title, numeric=False) for title in ("search", "what", "best setting")),
        *(Column(_title(name)) for name in HEADLINE_SCORES),
        *(Column(f"base model {_title(name)}") for name in HEADLINE_SCORES[:2]),
        *(Column(title) for title in ("trials", "feasible", "time (s)")),
    ]
    lines = [Line(cells=_search_cells(*search)) for search in searches]
    return Table(columns, lines)


def _search_cells(anchor: str, name: str, report: Report) -> list[Cell]:
    confirmed = report.confirmed or {}
    feasible = sum(row.feasible is True for row in report.rows)
    counted = sum(not row.again for row in report.rows)
    seconds = sum(row.seconds.get("trial", 0.0) for row in report.rows)
    return [
        Cell(name, link=f"#{anchor}"),
        Cell(report.title),
        Cell(report.best.label if report.best is not None else "none confirmed"),
        *(_number(confirmed.get(score)) for score in HEADLINE_SCORES),
        *(_number(report.baseline.get(score)) for score in HEADLINE_SCORES[:2]),
        Cell(str(counted), counted),
        Cell(str(feasible), feasible),
        Cell(f"{seconds:.1f}", seconds),
    ]


def _line(report: Report, row: TrialRow, parameters: Sequence[str], scores: Sequence[str]) -> Line:
    is_best = report.best is not None and row.number == report.best.number
    seconds = row.seconds.get("trial")
    cells = [
        Cell(f"{row.number}{' ★' if is_best else ''}", row.number),
        Cell(f"{row.state}, runs again" if row.again else row.state),
        *(_number(row.parameters.get(name)) for name in parameters),
        *(_number(row.scores.get(name), estimate=_is_estimate(row, name)) for name in scores),
        Cell({True: "yes", False: "no", None: ""}[row.feasible]),
        Cell("" if seconds is None else f"{seconds:.1f}", seconds),
        Cell(row.failure or ""),
    ]
    kind = "again" if row.again else row.state
    if row.state == COMPLETE:
        kind = "feasible" if row.feasible else "infeasible"
    return Line(cells=cells, number=row.number, kind=kind, is_best=is_best)


def _is_estimate(row: TrialRow, score: str) -> bool:
    """Say whether a score comes from a part of the retain set."""
    return row.retain_exact is False and score in {"retain_rouge1", "deviation_score"}


def _scores(report: Report) -> list[str]:
    return list(dict.fromkeys((*HEADLINE_SCORES, *report.goal.metrics)))


def _title(score: str) -> str:
    return score_label(score) + (" (%)" if score == "deviation_score" else "")


def _number(value: Any, *, estimate: bool = False) -> Cell:
    """Return a value with four digits that count, and what it is sorted by."""
    if value is None:
        return Cell(_NOT_MEASURED)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(str(value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return Cell(f"≈ {text}" if estimate else text, value)


def _are_numbers(rows: Sequence[TrialRow], name: str) -> bool:
    return all(is_number(row.parameters[name]) for row in rows if name in row.parameters)

"""The table of methods, cell by cell: what is missing is run, what is there is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.report.methods_table import (
    FEASIBLE,
    INFEASIBLE,
    CellResult,
    write_methods_table,
)
from lunar_tune.search.backends.choice import shared_session
from lunar_tune.search.plan import SearchPlan, plan_search
from lunar_tune.search.prerequisite import finetuning_fact
from lunar_tune.search.resume import BusySearchError, alone, check_unchanged
from lunar_tune.search.run import run_search
from lunar_tune.search.samplers import open_study
from lunar_tune.search.session import EXIT_FOUND, EXIT_INFEASIBLE, EXIT_INTERRUPTED
from lunar_tune.search.table5.table_cells import Cell
from lunar_tune.search.table5.table_results import is_finished, result_of
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import score_cells
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.runs import RunContent
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.sync import Tracker

__all__ = ["TableRun"]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A cell that has been checked."""

    cell: Cell
    plan: SearchPlan

    @property
    def folder(self) -> Folder:
        return Folder((self.plan.config.output / self.cell.name).resolve())

    def stored(self) -> StoredStudy | None:
        return StoredStudy.read(self.folder.journal)

    @property
    def num_trials(self) -> int:
        return self.plan.config.num_trials


class TableRun:
    """A table whose cells are checked.

    Args:
        cells: Its cells, in the order of the table.
        shared: What all searches have in common.
        console: Where to show what happens.
    """

    def __init__(self, cells: Sequence[Cell], shared: SearchConfig, console: Console) -> None:
        """Check everything that needs no weights, of every cell.

        Raises:
            InputError: Something is wrong, or a cell's study was made with other settings; all of
                it is said at once.
        """
        self._shared, self._console = shared, console
        self._planned: list[_Planned] = []
        problems = Problems()
        for cell in cells:
            with problems.collect():
                planned = _Planned(cell, plan_search(cell.config(shared)))
                self._planned.append(planned)
                _check_signature(planned)
        problems.raise_if_any()

    def results(self) -> list[CellResult]:
        """Return what the studies say."""
        return [result_of(one.cell, one.stored(), one.num_trials) for one in self._planned]

    def write(self) -> list[Path]:
        """Write the table from the studies; return its files."""
        return write_methods_table(self.results(), self._shared.output)

    def missing(self) -> int:
        """Return how many cells are not finished."""
        return sum(not is_finished(one.stored(), one.num_trials) for one in self._planned)

    def show_plan(self) -> None:
        """Show which cells there are and what is missing of them."""
        for one in self._planned:
            stored = one.stored()
            n_rows = len(stored.rows) if stored is not None else 0
            done = is_finished(stored, one.num_trials)
            state = "finished" if done else f"{n_rows} of {one.num_trials} trials"
            self._console.print(f"{escape(one.cell.name)}: {state}", highlight=False)
        self._console.print("all that needs no weights has been checked; nothing was run")

    def run(self) -> int:
        """Run what is missing; return the exit code.

        An interruption ends the table after the cell's own search has been ended; what is finished
        is kept.
        """
        with self._alone():
            return self._run_missing()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process works on the same table; a dead one holds no lock."""
        self._shared.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._shared.output / ".table.lock", timeout=0):
                yield
        except Timeout as error:
            raise InputError(
                f"--output {self._shared.output}: another process works on this table. Wait for "
                "it, or give another folder."
            ) from error

    def _run_missing(self) -> int:
        missing, total = self.missing(), len(self._planned)
        self._console.print(f"{total} cells, {total - missing} finished, {missing} to run")
        code = EXIT_FOUND
        if missing:
            with shared_session(self._shared):
                code = self._run_cells()
        results = self.results()
        files = write_methods_table(results, self._shared.output)
        if code != EXIT_INTERRUPTED:
            self._track(results, files)
        self._show(results, files)
        if code == EXIT_INTERRUPTED:
            return code
        states = {result.state for result in results}
        return EXIT_FOUND if states <= {FEASIBLE, INFEASIBLE} else EXIT_INFEASIBLE

    def _run_cells(self) -> int:
        for place, planned in enumerate(self._planned, 1):
            if is_finished(planned.stored(), planned.num_trials):
                continue
            title = f"cell {place}/{len(self._planned)}: {planned.cell.name}"
            self._console.rule(f"[bold]{escape(title)}[/bold]", align="left")
            for label, text in finetuning_fact(planned.plan.config, planned.plan.spec).items():
                self._console.print(f"{label} {text}", highlight=False, soft_wrap=True)
            if self._run(planned) == EXIT_INTERRUPTED:
                return EXIT_INTERRUPTED
            self.write()
        return EXIT_FOUND

    def _run(self, planned: _Planned) -> int:
        """Run or go on with one cell; one that cannot be run says why and ends no other."""
        try:
            return run_search(
                planned.plan,
                self._console,
                given={},
                arguments=(),
                brief=True,
            )
        except InputError as error:  # all else, a full disk for example, is every cell's affair
            self._console.print(f"[yellow]not run:[/yellow] {escape(str(error))}", soft_wrap=True)
            if isinstance(error, BusySearchError):
                return EXIT_INFEASIBLE
            planned.folder.path.mkdir(parents=True, exist_ok=True)
            with alone(planned.folder):
                self._refuse(planned, error)
            return EXIT_INFEASIBLE

    def _refuse(self, planned: _Planned, error: InputError) -> None:
        """Keep with a cell's study why it could not be run."""
        study = open_study(
            planned.folder.journal,
            name=planned.folder.name,
            space=planned.plan.space,
            config=planned.plan.config,
        )
        study.note("refused", str(error))

    def _track(self, results: Sequence[CellResult], files: Sequence[Path]) -> None:
        """Keep the table in MLflow: the files, and every cell's scores as metrics."""
        uri = self._shared.tracking_uri or default_tracking_uri(self._shared.output)
        name = f"table {self._shared.output.name}"
        try:
            tracker = Tracker(uri, EXPERIMENT, name)
        except InputError as error:
            self._console.print(f"[yellow]not in MLflow:[/yellow] {escape(str(error))}")
            return
        now = datetime.now()
        scores = {
            f"{planned.cell.name}.{metric}": value
            for planned, result in zip(self._planned, results, strict=True)
            for metric, value in (result.scores or {}).items()
        }
        places = {file.relative_to(self._shared.output).as_posix(): file for file in files}
        tracker.write(
            RunContent(
                name=name, status="FINISHED", started=now, ended=now, numbers=scores, files=places
            )
        )

    def _show(self, results: Sequence[CellResult], files: Sequence[Path]) -> None:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("model", "data", "method", "", "forget", "retain", "factual", "deviation"):
            numeric = column in {"forget", "retain", "factual", "deviation"}
            table.add_column(column, justify="right" if numeric else "left")
        for result in results:
            seed = f" seed {result.seed}" if self._seeds() else ""
            table.add_row(
                escape(result.model),
                escape(result.data or "own"),
                f"{result.method} ({result.variant}){seed}",
                result.state,
                *score_cells(result.scores or {}),
            )
        self._console.print(table)
        self._console.print(f"written to {', '.join(map(str, files))}", highlight=False)

    def _seeds(self) -> bool:
        return any(one.cell.several_seeds for one in self._planned)


def _check_signature(planned: _Planned) -> None:
    """Refuse a study that was made with other settings: its trials do not compare."""
    try:
        check_unchanged(planned.plan, planned.folder)
    except InputError as error:
        raise InputError(
            f"{error} For the table: give another --output, or delete the folder to search that "
            "cell anew."
        ) from error

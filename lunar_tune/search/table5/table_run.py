"""The table of methods, cell by cell: what is missing is run, what is there is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.report.methods_table import (
    FEASIBLE,
    INFEASIBLE,
    CellResult,
    write_methods_table,
)
from lunar_tune.search.backends.ray.cluster import ray_session
from lunar_tune.search.plan import SearchPlan, plan_search
from lunar_tune.search.prerequisite import finetuning_fact
from lunar_tune.search.resume import BusySearchError, alone, check_unchanged
from lunar_tune.search.run import run_search
from lunar_tune.search.samplers import open_study
from lunar_tune.search.session import EXIT_FOUND, EXIT_INFEASIBLE, EXIT_INTERRUPTED
from lunar_tune.search.table5.table_cells import Cell, result_of
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

    @property
    def num_trials(self) -> int:
        return self.plan.config.num_trials

    @property
    def is_finished(self) -> bool:
        stored = StoredStudy.read(self.folder.journal)
        return stored is not None and stored.has_ended(self.num_trials)


class TableRun:
    """A table whose cells are checked, in the order of the table."""

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
                try:
                    check_unchanged(planned.plan, planned.folder)
                except InputError as error:
                    raise InputError(
                        f"{error} For the table: give another --output, or delete the folder to "
                        "search that cell anew."
                    ) from error
        problems.raise_if_any()

    def _results(self) -> list[CellResult]:
        return [
            result_of(one.cell, StoredStudy.read(one.folder.journal), one.num_trials)
            for one in self._planned
        ]

    def write(self) -> list[Path]:
        """Write the table from the studies; return its files."""
        return write_methods_table(self._results(), self._shared.output)

    def show_plan(self) -> None:
        """Show which cells there are and what is missing of them."""
        for one in self._planned:
            stored = StoredStudy.read(one.folder.journal)
            n_rows = len(stored.rows) if stored is not None else 0
            state = "finished" if one.is_finished else f"{n_rows} of {one.num_trials} trials"
            self._console.print(f"{escape(one.cell.name)}: {state}")
        self._console.print("all that needs no weights has been checked; nothing was run")

    def run(self) -> int:
        """Run what is missing; return the exit code.

        An interruption ends the table after the cell's own search has been ended; what is finished
        is kept.
        """
        self._shared.output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._shared.output / ".table.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"--output {self._shared.output}: another process works on this table. Wait for "
                "it, or give another folder."
            ) from error
        with lock:  # a process that dies holds it no more
            missing = [one for one in self._planned if not one.is_finished]
            n_cells = len(self._planned)
            self._console.print(
                f"{n_cells} cells, {n_cells - len(missing)} finished, {len(missing)} to run"
            )
            interrupted = bool(missing) and self._run_cells(missing)
            results = self._results()
            files = write_methods_table(results, self._shared.output)
            if not interrupted:
                self._track(results, files)
            self._show(results, files)
        if interrupted:
            return EXIT_INTERRUPTED
        states = {result.state for result in results}
        return EXIT_FOUND if states <= {FEASIBLE, INFEASIBLE} else EXIT_INFEASIBLE

    def _run_cells(self, missing: Sequence[_Planned]) -> bool:
        """Run cells; return whether the user has ended the table meanwhile."""
        with nullcontext() if self._shared.in_process else ray_session(self._shared):
            for one in missing:
                place = f"{self._planned.index(one) + 1}/{len(self._planned)}"
                title = f"cell {place}: {one.cell.name}"
                self._console.rule(f"[bold]{escape(title)}[/bold]", align="left")
                for label, text in finetuning_fact(one.plan).items():
                    self._console.print(f"{label} {text}", soft_wrap=True)
                if self._run(one) == EXIT_INTERRUPTED:
                    return True
                self.write()
        return False

    def _run(self, planned: _Planned) -> int:
        """Run or go on with one cell; one that cannot be run says why and ends no other."""
        plan, folder = planned.plan, planned.folder
        try:
            return run_search(plan, self._console, given={}, arguments=(), brief=True)
        except InputError as error:  # all else, a full disk for example, is every cell's affair
            self._console.print(f"[yellow]not run:[/yellow] {escape(str(error))}", soft_wrap=True)
            if not isinstance(error, BusySearchError):
                folder.path.mkdir(parents=True, exist_ok=True)
                with alone(folder):
                    study = open_study(
                        folder.journal, name=folder.name, space=plan.space, config=plan.config
                    )
                    study.note("refused", str(error))
            return EXIT_INFEASIBLE

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
                name=name, status="FINISHED", started=now, ended=now, metrics=scores, files=places
            )
        )

    def _show(self, results: Sequence[CellResult], files: Sequence[Path]) -> None:
        several = any(one.cell.several_seeds for one in self._planned)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("model", "data", "method", "", "forget", "retain", "factual", "deviation"):
            numeric = column in {"forget", "retain", "factual", "deviation"}
            table.add_column(column, justify="right" if numeric else "left")
        for result in results:
            seed = f" seed {result.seed}" if several else ""
            table.add_row(
                escape(result.model),
                escape(result.data or "own"),
                f"{result.method} ({result.variant}){seed}",
                result.state,
                *score_cells(result.scores or {}),
            )
        self._console.print(table)
        self._console.print(f"written to {', '.join(map(str, files))}")

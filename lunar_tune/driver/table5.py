"""The table of methods, cell by cell: what is missing is run, what is there is read."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from lunar_tune.config.fields import options_again
from lunar_tune.config.options import EXPERIMENT, SearchConfig
from lunar_tune.data.data_catalog import pairs_kind, resolve_data
from lunar_tune.display import say
from lunar_tune.driver.backends.cluster import ray_session
from lunar_tune.driver.persistence import BusySearchError, alone, check_unchanged
from lunar_tune.driver.plan import SearchPlan, plan_search
from lunar_tune.driver.prerequisite import finetuning_fact
from lunar_tune.driver.run import run_search
from lunar_tune.driver.samplers import open_study
from lunar_tune.driver.session import EXIT_FOUND, EXIT_INFEASIBLE
from lunar_tune.errors import InputError, Problems
from lunar_tune.methods.contract import METHODS
from lunar_tune.metrics.goal import is_score
from lunar_tune.models.catalog import resolve_model
from lunar_tune.report.methods_table import (
    FINISHED,
    Cell,
    data_and_edges,
    print_methods_table,
    read_table,
    write_methods_table,
)
from lunar_tune.signals import EXIT_INTERRUPTED
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import EARLIER, OWN_DATA, StoredConfig
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.address import default_tracking_uri
from lunar_tune.tracking.runs import RunContent
from lunar_tune.tracking.sync import Tracker

if TYPE_CHECKING:
    import pandas as pd


def cells_of(
    models: list[str],
    data: list[str],
    methods: Sequence[str],
    *,
    edge: str | None = None,
    seed: int = 0,
    seeds: int = 1,
) -> list[Cell]:
    """Return all cells, model by model, so that what is kept of a model is used while it is fresh.

    Data and `edge` are as in `data_and_edges`, none for each model's own; methods `NAME` or
    `NAME:VARIANT`. `seed` is that of the first of `seeds` studies of a cell. An InputError lists
    all that means nothing or is named twice.
    """
    problems, variants = Problems(), []
    for model in models:
        with problems.collect():
            resolve_model(model)
    for name in filter(None, (data_and_edges(one, edge)[0] for one in data)):
        with problems.collect():
            resolve_data(name, kind=pairs_kind(name))
    for text in methods:
        with problems.collect():
            method, _, variant = text.partition(":")
            known = METHODS[method].variants
            if variant and variant not in known:
                raise InputError(f"--method {text}: {method} has {', '.join(known)}.")
            variants.append((method, variant or known[0]))
    given = {"--model": models, "--data": data, "--method": [":".join(one) for one in variants]}
    for flag, names in given.items():
        for twice in sorted({name for name in names if names.count(name) > 1}):
            problems.add(f"{flag}: {twice} is named twice.")
    problems.raise_if_any()
    return [
        Cell(model=model, data=one, method=method, variant=variant, seed=number)
        for model, one, (method, variant), number in itertools.product(
            models, data or [""], variants, range(seed, seed + seeds)
        )
    ]


def check_names(cells: Sequence[Cell], shared: SearchConfig) -> None:
    """Raise an InputError if what is fixed or narrowed has a meaning with none of the methods."""
    known = set[str]().union(*(METHODS[one.method].names_in_use(one.variant) for one in cells))
    problems = Problems()
    for option, texts in (("--fix", shared.fix), ("--range", shared.range)):
        unknown = [text for text in texts if not any(cell.has(text) for cell in cells)]
        if unknown:
            problems.add(
                f"{option} {', '.join(unknown)}: no method of the table has it. There are: "
                f"{', '.join(sorted(known))}."
            )
    problems.raise_if_any()


class TableRun:
    """A table whose cells are checked, in the order of the table."""

    def __init__(self, cells: Sequence[Cell], shared: SearchConfig, console: Console) -> None:
        """Check everything that needs no weights, of every cell, or raise an InputError."""
        self._shared, self._console = shared, console
        self._plans: dict[Cell, SearchPlan] = {}
        problems = Problems()
        for cell in cells:
            with problems.collect():
                plan = plan_search(self._config(cell))
                self._plans[cell] = plan
                try:
                    check_unchanged(plan, self._folder(cell))
                except InputError as error:
                    raise InputError(
                        f"{error} For the table: give another --output, or delete the folder to "
                        "search that cell anew."
                    ) from error
        problems.raise_if_any()

    def _folder(self, cell: Cell) -> Folder:
        return Folder((self._shared.output / cell.name).resolve())

    def _config(self, cell: Cell) -> SearchConfig:
        """Return a cell's search; one that has begun keeps what an earlier version took it for."""
        config, stored = cell.config(self._shared), StoredConfig.begun(self._folder(cell))
        if stored is None:
            return config
        kept = OWN_DATA if config.data is None else ()
        left_open = [name for name in kept if getattr(config, name) is None]
        for name, origin in stored.origins.items():
            if origin == EARLIER and getattr(config, name) == getattr(SearchConfig, name):
                left_open.append(name)
        values = {name: getattr(stored.search, name) for name in left_open}
        begun = dataclasses.replace(config, **values)
        if EARLIER in stored.origins.values():
            flags = shlex.join(options_again(begun, left_open))
            say(self._console, f"{cell.name}: as it was begun, with {flags}")
        return begun

    def _table(self) -> pd.DataFrame:
        studies = {cell: StoredStudy.read(self._folder(cell).journal) for cell in self._plans}
        return read_table(studies, self._shared.num_trials)

    def write(self) -> list[Path]:
        """Write the table from the studies; return its files."""
        return write_methods_table(self._table(), self._shared.output)

    def show_plan(self) -> None:
        """Show which cells there are and what is missing of them."""
        table = self._table()
        done = f"of {self._shared.num_trials} trials completed"
        for cell, state, trials in zip(self._plans, table["state"], table["trials"], strict=True):
            said = "finished" if state in FINISHED else f"{trials} {done}"
            self._console.print(f"{escape(cell.name)}: {said}")
        self._console.print("all that needs no weights has been checked; nothing was run")

    def run(self) -> int:
        """Run what is missing, unless the user interrupts a cell; return the exit code."""
        output, count = self._shared.output, len(self._plans)
        output.mkdir(parents=True, exist_ok=True)
        with alone(Folder(output), "table", "--output"):
            states = self._table()["state"]
            missing = [c for c, one in zip(self._plans, states, strict=True) if one not in FINISHED]
            self._console.print(
                f"{count} cells, {count - len(missing)} finished, {len(missing)} to run"
            )
            interrupted = bool(missing) and self._run_cells(missing)
            table = self._table()
            files = write_methods_table(table, output)
            if not interrupted:
                self._track(table, files)
            print_methods_table(self._console, table)
            say(self._console, f"written to {', '.join(map(str, files))}")
        if interrupted:
            return EXIT_INTERRUPTED
        return EXIT_FOUND if table["state"].isin(FINISHED).all() else EXIT_INFEASIBLE

    def _run_cells(self, missing: Sequence[Cell]) -> bool:
        """Run cells; return whether the user has ended the table meanwhile."""
        with nullcontext() if self._shared.in_process else ray_session(self._shared):
            for place, (cell, plan) in enumerate(self._plans.items(), 1):
                if cell not in missing:
                    continue
                title = f"cell {place}/{len(self._plans)}: {cell.name}"
                self._console.rule(f"[bold]{escape(title)}[/bold]", align="left")
                if self._run(plan, self._folder(cell)) == EXIT_INTERRUPTED:
                    return True
                self.write()
        return False

    def _run(self, plan: SearchPlan, folder: Folder) -> int:
        """Run or go on with one cell; one that cannot be run says why and ends no other."""
        try:
            for label, text in {**plan.spec.lost_letters, **finetuning_fact(plan)}.items():
                say(self._console, f"{label.strip()}: {text}")
            stored = StoredConfig.begun(folder)
            given = stored.origins if stored is not None else {}
            return run_search(plan, self._console, given=given, arguments=None)[0]
        except InputError as error:  # all else, a full disk for example, is every cell's affair
            self._console.print(
                f"[yellow]the cell was not run:[/yellow] {escape(str(error))}", soft_wrap=True
            )
            if not isinstance(error, BusySearchError):
                folder.path.mkdir(parents=True, exist_ok=True)
                with alone(folder):
                    study = open_study(folder, plan.space, plan.config)
                    study.note("refused", str(error))
            return EXIT_INFEASIBLE

    def _track(self, table: pd.DataFrame, files: Sequence[Path]) -> None:
        """Keep the table in MLflow: the files, and every cell's scores as metrics."""
        uri = self._shared.tracking_uri or default_tracking_uri(self._shared.output)
        name, now = f"table {self._shared.output.name}", datetime.now()
        try:
            tracker = Tracker(uri, EXPERIMENT, name)
        except InputError as error:
            self._console.print(
                f"[yellow]the table is not in MLflow:[/yellow] {escape(str(error))}"
            )
            return
        scores = table[[column for column in table if is_score(column)]]
        numbers = {
            f"{cell.name}.{metric}": score
            for cell, (_, of_cell) in zip(self._plans, scores.iterrows(), strict=True)
            for metric, score in of_cell.dropna().items()
        }
        places = {file.name: file for file in files}
        tracker.write(
            RunContent(
                name=name, status="FINISHED", started=now, ended=now, metrics=numbers, files=places
            )
        )

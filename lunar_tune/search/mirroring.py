"""A search's way into MLflow, trial by trial and at its end.

Covers: what is written when; a store that fails, which no trial waits for, and which is caught up
with; the runs that an earlier process has left.
Does not cover: how a run is written (`trial_runs`); the truth, which the study has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.lineage import read_lineage
from lunar_tune.report.report import Report
from lunar_tune.report.results import load_search
from lunar_tune.search.descriptions import run_note, run_parameters, space_document
from lunar_tune.search.plan import SearchPlan
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import RUNNING, TrialRow
from lunar_tune.study.study import Study
from lunar_tune.tracking.trial_runs import SearchTracker, shown_scores

__all__ = ["SearchMirror"]

PATIENCE, SHORT_PATIENCE, SECONDS_BETWEEN = 60.0, 5.0, 2.0
"""Seconds for which a store is waited for at the end, at an interruption, and between tries."""


class SearchMirror:
    """Mirrors a search under way.

    Args:
        tracker: Writes its runs.
        plan: Of the search.
        folder: Of the search.
        study: That has the truth.
    """

    def __init__(
        self, tracker: SearchTracker, plan: SearchPlan, folder: Folder, study: Study
    ) -> None:
        self._tracker, self._plan, self._folder, self._study = tracker, plan, folder, study

    def describe(
        self, document: str, resolved: Mapping[str, Any], vanilla: Mapping[str, float]
    ) -> None:
        """Describe the search on its run, and put right what an earlier process has left.

        Args:
            document: `config.yaml`.
            resolved: What that says beside options.
            vanilla: The unmodified model's scores.
        """
        spec, data = self._plan.spec, self._plan.spec.data
        splits = {"forget": data.forget, "retain": data.retain, "factual": data.factual}
        lineage = read_lineage(spec.model.checkpoint)
        inputs = {name: (records, resolved["digests"][name]) for name, records in splits.items()}
        self._tracker.vanilla = shown_scores(vanilla)
        scores = {f"vanilla_{name}": value for name, value in self._tracker.vanilla.items()}
        with self._tracker.tolerating():
            self._tracker.describe(
                parameters=run_parameters(self._plan),
                tags=spec.tags | (lineage.tags() if lineage is not None else {}),
                texts={"config.yaml": document, "space.yaml": space_document(self._plan)},
                data=inputs,
            )
            self._tracker.log_metrics({**scores, "num_trials": self._plan.config.num_trials})
            self._tracker.write_note(run_note(load_search(self._folder.path).report))
        if self._tracker.continued:
            self._reconcile()

    def start(self, row: TrialRow) -> None:
        """Open a trial's run."""
        if self._tracker.is_away:
            return
        with self._tracker.tolerating():
            name = f"{self._plan.spec.method.name} {row.label}"
            self._tracker.start(row, name=name, tags=self._plan.spec.tags)

    def end(self, row: TrialRow) -> None:
        """Write a trial's outcome."""
        if self._tracker.is_away:
            return
        if row.number not in self._tracker.running():
            self.start(row)
        if row.number not in self._tracker.running():
            return  # the store fails still
        with self._tracker.tolerating():
            self._tracker.end(row, self._folder.answers(row.number))
            metric = goal_of(self._plan.config).objective.metric
            self._tracker.progress(self._study.rows(), metric)

    def end_open(self) -> None:
        """Write the outcome of every trial whose run is open; all of them have ended."""
        for number in self._tracker.running():
            self.end(self._study.row(number))

    def found(self, row: TrialRow, scores: Mapping[str, float], *, feasible: bool) -> None:
        """Write the best setting and its scores in full."""
        with self._tracker.tolerating():
            self._tracker.conclude(row, scores, feasible=feasible)
            self._tracker.log_files([self._folder.best], root=self._folder.path)

    def finish(
        self,
        report: Report,
        files: Sequence[Path],
        *,
        status: str,
        waiting: Callable[[], None],
    ) -> bool:
        """Write the rest and close the search's run; say whether MLflow has all of it.

        A store that is away is waited for, since nothing else is left to be done.

        Args:
            report: Of the search.
            files: To be kept with its run.
            status: `FINISHED`, or `KILLED` after an interruption, which waits a shorter time.
            waiting: Called when a store is waited for.
        """
        patience = time.monotonic() + (SHORT_PATIENCE if status == "KILLED" else PATIENCE)
        while True:
            self._finish(report, files, status)
            if not self._tracker.is_away:
                ended = {row.number for row in report.rows if row.state != RUNNING}
                return ended <= self._tracker.mirrored
            if time.monotonic() > patience:
                return False
            waiting()
            time.sleep(SECONDS_BETWEEN)

    def _finish(self, report: Report, files: Sequence[Path], status: str) -> None:
        self._reconcile()
        with self._tracker.tolerating():
            if report.best is None:
                self._tracker.conclude(None, None, feasible=False)
            self._tracker.confirm(report.best, report.confirmed or {})
            self._tracker.write_note(run_note(report))
            self._tracker.log_files(files, root=self._folder.path)
        with self._tracker.tolerating():
            self._tracker.close(status=status)

    def _reconcile(self) -> None:
        """Mirror every trial that has ended and has no run that says so."""
        rows = [row for row in self._study.rows() if row.state != RUNNING]
        self._tracker.ask_again()
        if self._tracker.continued or self._tracker.has_failed:
            with self._tracker.tolerating():
                self._tracker.take_up(rows)
        for row in rows:
            if row.number not in self._tracker.mirrored:
                self.end(row)

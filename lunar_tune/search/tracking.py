"""The MLflow mirror of a search: a parent run, a child run for each trial and for nothing else.

Covers: runs written from the driver, from rows that the study already has.
Does not cover: the truth; everything here can be written again from study and answers. The store
and the run itself (`tracked_run`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lunar_tune.reporting.rows import COMPLETE, TrialRow
from lunar_tune.reporting.tables import read_answers
from lunar_tune.search.tracked_run import (
    EXPERIMENT,
    PARENT,
    TrackedRun,
    default_tracking_uri,
    without_password,
)

__all__ = ["EXPERIMENT", "SearchTracker", "default_tracking_uri", "without_password"]


class SearchTracker(TrackedRun):
    """Mirrors one search: a run, and a child of it for each trial; see `TrackedRun`."""

    def __init__(self, uri: str, *, output: Path, name: str, resume: bool = False) -> None:
        super().__init__(uri, output=output, name=name)
        self.mirrored: set[int] = set()
        self._children: dict[int, str] = {}
        if resume:
            with self.tolerating():
                self._end_earlier(name)

    def start(self, row: TrialRow, *, name: str, tags: Mapping[str, str]) -> None:
        """Open a trial's run."""
        tags = {**tags, PARENT: self.run_id, "trial": str(row.number)}
        child = self._client.create_run(self.experiment_id, run_name=name, tags=tags)
        self._children[row.number] = child.info.run_id
        self._log(child.info.run_id, parameters=row.parameters)

    def end(self, row: TrialRow, answers: Path | None) -> None:
        """Write a trial's outcome and close its run."""
        run_id = self._children[row.number]
        tags = {"state": row.state}
        if row.feasible is not None:
            tags["feasible"] = str(row.feasible).lower()
        if row.failure is not None:
            tags["failure"] = row.failure[:5000]
        metrics: dict[str, float] = {
            **row.scores,
            **{f"seconds_{name}": value for name, value in row.seconds.items()},
        }
        if row.feasible is not None:
            metrics["feasible"] = float(row.feasible)
        self._log(run_id, metrics=metrics, tags=tags, curves=_curves(row))
        if answers is not None and answers.is_file():
            self._log_answers(run_id, answers)
        self._client.set_terminated(run_id, "FINISHED" if row.state == COMPLETE else "FAILED")
        del self._children[row.number]
        self.mirrored.add(row.number)

    def running(self) -> list[int]:
        """Return the numbers of trials whose runs are open."""
        return list(self._children)

    def close(self, *, status: str) -> None:
        """Close what is still open: `FINISHED`, `FAILED` or `KILLED`."""
        for run_id in self._children.values():
            self._client.set_terminated(run_id, "KILLED")
        self._children.clear()
        super().close(status=status)

    def _end_earlier(self, name: str) -> None:
        """Close the runs of a search of that name that was killed and is gone on with."""
        running = "attributes.status = 'RUNNING'"
        where = f"{running} and attributes.run_name = '{name}'"
        for parent in self._client.search_runs([self.experiment_id], where):
            if parent.info.run_id == self.run_id:
                continue
            children = f"{running} and tags.`{PARENT}` = '{parent.info.run_id}'"
            for run in [*self._client.search_runs([self.experiment_id], children), parent]:
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _log_answers(self, run_id: str, answers: Path) -> None:
        rows, _ = read_answers(answers)
        columns: dict[str, Sequence[Any]] = {
            "set": [row.set_name for row in rows],
            "edge": [row.edge for row in rows],
            "question": [row.question for row in rows],
            "truth": [row.truth for row in rows],
            "answer": [row.answer for row in rows],
            "rouge1": [row.rouge1 for row in rows],
        }
        if not any(columns["question"]):  # with --no-text they are not known here either
            columns = {name: columns[name] for name in ("set", "edge", "rouge1")}
        self._client.log_table(run_id, columns, "answers.json")


def _curves(row: TrialRow) -> dict[str, list[tuple[int, float]]]:
    """Return what was seen of a trial's fit by epoch."""
    curves = {"loss": list(enumerate(row.losses, 1))}
    for name in ("forget_rouge1", "retain_rouge1"):
        curves[f"check_{name}"] = [(int(check["epochs"]), check[name]) for check in row.checks]
    return curves

"""The MLflow mirror of a search: a parent run, a child run for each trial and for nothing else.

Covers: runs written from the driver, from rows that the study already has; what a child says (few
metrics, under the names of the study), the search's progress and use of the machine on the parent.
Does not cover: the truth; everything here can be written again from study and answers. The store
and the run itself (`tracked_run`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.secrets import without_secrets
from lunar_tune.study.rows import COMPLETE, RUNNING, TrialRow, best_so_far, is_number
from lunar_tune.study.tables import read_answers
from lunar_tune.tracking.store import PARENT, child_runs, few_retries
from lunar_tune.tracking.tracked_run import EXPERIMENT, TrackedRun

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

__all__ = ["EXPERIMENT", "SearchTracker", "shown_scores"]

logger = logging.getLogger(__name__)
PROGRESS = "best_feasible"
UNMODIFIED, AS_SEARCHED, IN_FULL = range(3)
"""Steps of the metrics `stage_…`: the model before, the trial, and the confirmed best in full."""
_BEST = "confirmed_best"
_ANSWERS = "answers.json"


class SearchTracker(TrackedRun):
    """Mirrors one search: a run, and a child of it for each trial; see `TrackedRun`."""

    def __init__(
        self,
        uri: str,
        *,
        output: Path,
        name: str,
        experiment: str = EXPERIMENT,
        earlier: str | None = None,
    ) -> None:
        super().__init__(
            uri,
            output=output,
            name=name,
            experiment=experiment,
            earlier=earlier,
            own={"search": name},
        )
        self.vanilla: Mapping[str, float] = {}
        """The unmodified model's scores, from which every trial's stages begin."""
        self.mirrored: set[int] = set()
        self._children: dict[int, str] = {}
        self._runs: dict[int, str] = {}
        self._called_best: set[int] = set()
        self._n_progress = 0
        self._monitor: SystemMetricsMonitor | None = None

    def start(self, row: TrialRow, *, name: str, tags: Mapping[str, str]) -> None:
        """Open a trial's run."""
        tags = {**tags, **self._own, "trial": str(row.number), PARENT: self.run_id, **self._origin}
        child = self._client.create_run(self.experiment_id, run_name=name, tags=tags)
        self._children[row.number] = self._runs[row.number] = child.info.run_id
        self._log(child.info.run_id, parameters=row.parameters)
        if self._inputs:
            self._client.log_inputs(child.info.run_id, self._inputs)

    def end(self, row: TrialRow, answers: Path | None) -> None:
        """Write a trial's outcome and close its run."""
        run_id = self._children[row.number]
        tags = {"state": row.state}
        if row.feasible is not None:
            tags["feasible"] = str(row.feasible).lower()
        if row.failure is not None:
            tags["failure"] = row.failure[:5000]
        self._log(run_id, metrics=_metrics(row), tags=tags, curves=self._curves(row))
        if answers is not None and answers.is_file():
            self._log_answers(run_id, answers)
        self._client.set_terminated(run_id, _status(row))
        del self._children[row.number]
        self.mirrored.add(row.number)

    def progress(self, rows: Sequence[TrialRow], metric: str) -> None:
        """Write the best feasible score after each trial, as far as it is not there yet.

        Args:
            rows: All trials so far.
            metric: What the search makes as good as possible.
        """
        points = _best_so_far(rows, metric)
        self._log(self.run_id, curves={PROGRESS: points[self._n_progress :]})
        self._n_progress = len(points)

    def conclude(
        self, row: TrialRow | None, scores: Mapping[str, float] | None, *, feasible: bool
    ) -> None:
        """Write the search's outcome on the parent so that searches compare as trials do.

        Args:
            row: The confirmed best trial; None where nothing feasible was found.
            scores: Its scores in the full evaluation.
            feasible: Whether these keep every bound; scores on held-out questions may not.
        """
        # A search that goes on may find a better one, and MLflow lets no parameter change.
        setting = {"trial": row.number, **row.parameters} if row is not None else {}
        self._log(
            self.run_id,
            metrics={
                "feasible": float(feasible),
                **_prefixed("best", shown_scores(scores or {})),
                **_prefixed("best", {k: v for k, v in setting.items() if is_number(v)}),
            },
            tags={
                "feasible": str(feasible).lower(),
                **_prefixed("best", {k: str(v) for k, v in setting.items() if not is_number(v)}),
            },
        )

    def confirm(self, row: TrialRow | None, scores: Mapping[str, float]) -> None:
        """Write the scores in full on the run of the best trial, as far as they are not there.

        What another trial's run says of its own full evaluation stays, for it is true.

        Args:
            row: The confirmed best trial; None where there is none.
            scores: Its scores in the full evaluation.
        """
        number = row.number if row is not None else None
        for other in self._called_best - {number}:
            self._log(self._runs[other], tags={_BEST: "false"})
        self._called_best &= {number}
        if number is None or number not in self._runs:
            return
        run = self._client.get_run(self._runs[number])
        full = _prefixed("full", shown_scores(scores))
        stages = _prefixed("stage", _rouge(scores))
        known = run.data.metrics.items()
        self._log(
            run.info.run_id,
            metrics=dict(full.items() - known),
            curves={name: [(IN_FULL, value)] for name, value in stages.items() - known},
            tags={_BEST: "true"},
        )
        self._called_best.add(number)

    def monitor(self) -> None:
        """Begin to record the use of the machine, which ends with the run."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        try:
            self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri)
            self._monitor.start()
        except Exception as error:  # of drivers and their libraries: anything, and none of it ours
            reason = without_secrets(str(error))
            logger.warning("--system-metrics: cannot be recorded, the search goes on: %s", reason)

    def take_up(self, rows: Sequence[TrialRow]) -> None:
        """Look through the runs of trials that an earlier process has left, or a store that failed.

        A run that says what the study says is done with, when it has what an earlier version did
        not write; one that does not is to be ended again (`running`), and what is no trial's run,
        or a second one, is deleted.

        Args:
            rows: All trials of the study; none of them is running.
        """
        found: dict[int, list[Run]] = {}
        for run in child_runs(self._client, self.experiment_id, self.run_id):
            trial = run.data.tags.get("trial", "")
            if trial.isdecimal():  # else a user's own
                found.setdefault(int(trial), []).append(run)
        known = {row.number: row for row in rows}
        for number, runs in found.items():
            row = known.get(number)
            if row is not None:
                runs.sort(key=lambda run, row=row: not _says(run, row))  # type: ignore[misc]
                kept = runs.pop(0)
                self._children.pop(number, None)
                self._runs[number] = kept.info.run_id
                if kept.data.tags.get(_BEST) == "true":
                    self._called_best.add(number)
                self._complete(kept, row)
                if _says(kept, row):
                    self.mirrored.add(number)
                else:
                    self._log(kept.info.run_id, parameters=row.parameters)
                    self._children[number] = kept.info.run_id
            for run in runs:
                self._client.delete_run(run.info.run_id)
        self._n_progress = len(self._client.get_metric_history(self.run_id, PROGRESS))

    def running(self) -> list[int]:
        """Return the numbers of trials whose runs are open."""
        return list(self._children)

    def close(self, *, status: str) -> None:
        """Close what is still open: `FINISHED`, `FAILED` or `KILLED`."""
        for run_id in self._children.values():
            self._client.set_terminated(run_id, "KILLED")
        self._children.clear()
        if self._monitor is not None:
            with few_retries():  # it asks the store once more
                self._monitor.finish()
            self._monitor = None
        super().close(status=status)

    def _complete(self, run: Run, row: TrialRow) -> None:
        """Write what a trial's run does not have because an earlier version did not write it."""
        metrics, curves = {}, {}
        if _says(run, row):  # else it is ended again, with all of them
            known = run.data.metrics
            metrics = {name: one for name, one in _metrics(row).items() if name not in known}
            curves = {name: one for name, one in self._curves(row).items() if name not in known}
        tags = dict(self._own.items() - run.data.tags.items())
        if tags or any(map(math.isfinite, metrics.values())) or any(curves.values()):
            self._log(run.info.run_id, metrics=metrics, curves=curves, tags=tags)
        if self._inputs and not (run.inputs and run.inputs.dataset_inputs):
            self._client.log_inputs(run.info.run_id, self._inputs)

    def _curves(self, row: TrialRow) -> dict[str, list[tuple[int, float]]]:
        """Return what there is of a trial by epoch, and its ROUGE scores by stage."""
        curves = {"loss": list(enumerate(row.losses, 1))}
        for name in ("forget_rouge1", "retain_rouge1"):
            curves[f"check_{name}"] = [(int(check["epochs"]), check[name]) for check in row.checks]
        for name, score in _rouge(row.scores).items():
            before = [(UNMODIFIED, self.vanilla[name])] if name in self.vanilla else []
            curves[f"stage_{name}"] = [*before, (AS_SEARCHED, score)]
        return curves

    def _log_answers(self, run_id: str, answers: Path) -> None:
        if any(one.path == _ANSWERS for one in self._client.list_artifacts(run_id)):
            return  # MLflow would append to it
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
        self._client.log_table(run_id, columns, _ANSWERS)


def shown_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores without counts of rows, which are no axes to compare by."""
    return {name: value for name, value in scores.items() if not name.endswith("_rows")}


def _metrics(row: TrialRow) -> dict[str, float]:
    """Return the numbers of a trial's run."""
    metrics = shown_scores(row.scores)
    if row.feasible is not None:
        metrics["feasible"] = float(row.feasible)
    if row.retain_exact is not None:
        metrics["retain_exact"] = float(row.retain_exact)
        if not row.retain_exact and row.retain_rows is not None:
            metrics["retain_rows"] = float(row.retain_rows)
    if "trial" in row.seconds:
        metrics["seconds"] = row.seconds["trial"]
    for name, value in row.parameters.items() if row.scores else ():
        if name.endswith("learning_rate") and is_number(value) and value > 0:
            metrics[f"log10_{name}"] = math.log10(value)  # MLflow's axes are linear
    return metrics


def _rouge(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if "_rouge" in name}


def _status(row: TrialRow) -> str:
    return "FINISHED" if row.state == COMPLETE else "FAILED"


def _says(run: Run, row: TrialRow) -> bool:
    """Say whether a run is ended and says nothing of its trial but what the study says.

    All that there was to be said is written before the end.
    """
    told = (run.info.status, run.data.tags.get("state"))
    known = run.data.metrics
    return told == (_status(row), row.state) and all(
        known.get(name, value) == value
        for name, value in _metrics(row).items()
        if math.isfinite(value)
    )


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _best_so_far(rows: Sequence[TrialRow], metric: str) -> list[tuple[int, float]]:
    """Return the best feasible score after each trial by the highest trial number so far."""
    ended = sorted(
        (row for row in rows if row.state != RUNNING and row.ended is not None),
        key=lambda row: (row.ended or datetime.min, row.number),
    )
    numbers = [row.number for row in ended]
    steps = dict(zip(numbers, accumulate(numbers, max), strict=True))
    return [(steps[row.number], best.scores[metric]) for row, best in best_so_far(ended)]

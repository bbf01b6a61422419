"""MLflow's runs of a search, made to say what its study and its answers say.

A parent run for the search, a child run for each trial that has ended, and nothing else.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.study.answers import read_answers
from lunar_tune.study.rows import COMPLETE, RUNNING, TrialRow, best_so_far, is_number
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.runs import Columns, Curve, RunContent, bring
from lunar_tune.tracking.store import (
    find_experiment,
    kept_uri,
    open_experiment,
    opened_store,
    with_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

__all__ = ["Tracker", "completed_runs", "shown_scores", "sync"]

SEARCH, TRIAL_OF = "lunar_tune.search", "lunar_tune.trial_of"
"""Tags that tell a search's run, and those of its trials, by the identity that its study keeps."""
_MOST_RUNS, _LONGEST_TAG = 50_000, 5000  # that MLflow gives at once, and takes
_AWAY = 30.0
"""Seconds for which a store that has failed is left alone: trials do not wait for it."""
logger = logging.getLogger(__name__)


class Tracker:
    """Writes runs of what is computed; a store that fails is warned of once and ends nothing.

    `name` says in errors what is computed; the experiment is made if missing.

    Raises:
        InputError: The store cannot do what will be asked of it.
    """

    def __init__(self, uri: str, experiment: str, name: str) -> None:
        self.uri, self.experiment = with_password(uri, name), experiment
        self._away_until = 0.0  # it has never failed
        self._has_all = False
        with opened_store(self.uri) as client:
            open_experiment(client, experiment)

    def place(self, before: Mapping[str, Any] | None) -> dict[str, str]:
        """Return what a search notes of its place in MLflow, with the identity that it had."""
        identity = (before or {}).get("id") or uuid.uuid4().hex
        return {"id": identity, "uri": kept_uri(self.uri), "experiment": self.experiment}

    def search(
        self,
        search: StoredSearch,
        *,
        note: str | None = None,
        status: str | None = None,
        trial: int | None = None,
    ) -> bool:
        """Write a search's runs, and say whether MLflow has all of them; see `sync`.

        A trial's number says that nothing else is new; all is looked at where MLflow lacks more.
        """
        if status == "RUNNING" and time.monotonic() < self._away_until:
            return False
        trial = trial if self._has_all else None
        self._has_all = self._tolerating(
            lambda client: sync(search, client, note=note, status=status, trial=trial)
        )
        return self._has_all

    def write(self, content: RunContent) -> bool:
        """Write one run that is over, and say whether MLflow has it."""
        return self._tolerating(
            lambda client: bring(client, find_experiment(client, self.experiment), (), content)
        )

    def _tolerating(self, writing: Callable[[MlflowClient], Run]) -> bool:
        try:
            with opened_store(self.uri) as client:
                writing(client)
        except InputError as error:
            if not self._away_until:
                first_line = str(error).partition("\n")[0]
                logger.warning("MLflow is not written, the work goes on: %s", first_line)
            self._away_until = time.monotonic() + _AWAY
            return False
        return True


def sync(
    search: StoredSearch,
    client: MlflowClient,
    *,
    note: str | None = None,
    status: str | None = None,
    trial: int | None = None,
) -> Run:
    """Make MLflow's runs say what a search's study says; what is right is not written again.

    It is for the process that holds the search's lock. The page of the search's run gets a note in
    Markdown, and keeps the one that it has where there is none. Without a status the run takes the
    one with which the study says that the search ended. With a trial's number only the search's run
    and that trial's are looked at.

    Raises:
        MlflowException: The store cannot be used; `opened_store` makes an `InputError` of it.
    """
    experiment, found, by_trial = _runs_of(client, search, trial)
    parent = bring(client, experiment, found, _search_content(search, note, status))
    for row in search.rows:
        if row.state != RUNNING and trial in (None, row.number):
            content = _trial_content(search, row, parent.info.run_id)
            bring(client, experiment, by_trial.pop(str(row.number), []), content)
    for run in itertools.chain.from_iterable(by_trial.values()):  # of no trial that has ended
        client.delete_run(run.info.run_id)
    return parent


def completed_runs(client: MlflowClient, search: StoredSearch) -> tuple[Run | None, list[Run]]:
    """Return the runs of a search and of its completed trials, by number, as far as there are."""
    _, found, by_trial = _runs_of(client, search)
    completed = [str(row.number) for row in search.rows if row.state == COMPLETE]
    return next(iter(found), None), [by_trial[one][0] for one in completed if one in by_trial]


def shown_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores without counts of rows, which are no axes to compare by."""
    return {name: value for name, value in scores.items() if not name.endswith("_rows")}


def _runs_of(
    client: MlflowClient, search: StoredSearch, trial: int | None = None
) -> tuple[Experiment, list[Run], dict[str, list[Run]]]:
    """Return the experiment, the runs that claim to be the search's, and those by trial."""
    one = "" if trial is None else f" and tags.trial = '{trial}'"
    place = search.study.notes["mlflow"]
    experiment = find_experiment(client, place["experiment"])
    parents, trials = (
        client.search_runs(
            [experiment.experiment_id],
            f"tags.`{tag}` = '{place['id']}'{more}",
            max_results=_MOST_RUNS,
        )
        for tag, more in ((SEARCH, ""), (TRIAL_OF, one))
    )
    by_trial: dict[str, list[Run]] = defaultdict(list)
    for run in trials:
        by_trial[run.data.tags.get("trial", "")].append(run)
    return experiment, list(parents), by_trial


def _search_content(search: StoredSearch, note: str | None, status: str | None) -> RunContent:
    """Return what the search's run says."""
    notes, folder = search.study.notes, search.folder
    about, best, scores = notes["description"], search.best, search.confirmed or {}
    status = status or notes.get("status", "KILLED")
    numbers = _prefixed("baseline", shown_scores(search.baseline))
    numbers["num_trials"] = about["num_trials"]
    tags = {SEARCH: notes["mlflow"]["id"], "search": folder.name, **notes["tags"]}
    tags |= about["origin"] | about["lineage"]
    if best is not None or status != "RUNNING":
        feasible = best is not None and search.goal.is_kept(scores)
        # A search that goes on may find a better one, and MLflow lets no parameter change.
        setting = {} if best is None else {"trial": best.number, **best.parameters}
        shown = shown_scores(scores) | {k: v for k, v in setting.items() if is_number(v)}
        words = {k: str(v) for k, v in setting.items() if not is_number(v)}
        numbers |= {"feasible": feasible, **_prefixed("best", shown)}
        tags |= {"feasible": str(feasible).lower(), **_prefixed("best", words)}
    if note is not None:
        tags["mlflow.note.content"] = note[:_LONGEST_TAG]
    starts = [row.started for row in search.rows if row.started is not None]
    ends = [row.ended for row in search.rows if row.ended is not None]
    files = [folder.config, folder.best, folder.path / "report.md", folder.path / "page.html"]
    files += sorted(folder.pictures.rglob("*"))
    return RunContent(
        name=folder.name,
        status=status,
        started=min(starts, default=datetime.now()),
        ended=max(ends, default=datetime.now()),
        parameters=about["parameters"],
        tags=tags,
        numbers=numbers,
        curves={"best_feasible": _progress(search)},
        data=about["data"],
        files={one.relative_to(folder.path).as_posix(): one for one in files if one.is_file()},
    )


def _progress(search: StoredSearch) -> Curve:
    """Return the best feasible score after each trial, by how many ended before it."""
    ended = [row for row in search.rows if row.state != RUNNING and row.ended is not None]
    ended.sort(key=lambda row: (row.ended, row.number))
    places = {row.number: place for place, row in enumerate(ended)}
    metric = search.goal.objective.name
    return [(places[row.number], best.scores[metric]) for row, best in best_so_far(ended)]


def _trial_content(search: StoredSearch, row: TrialRow, parent: str) -> RunContent:
    """Return what a trial's run says."""
    notes, answers = search.study.notes, search.folder.answers(row.number)
    is_best = row == search.best
    tags = {
        **notes["tags"],
        **notes["description"]["origin"],
        TRIAL_OF: notes["mlflow"]["id"],
        "mlflow.parentRunId": parent,
        "search": search.folder.name,
        "trial": str(row.number),
        "state": row.state,
        "confirmed_best": str(is_best).lower(),
    }
    if row.feasible is not None:
        tags["feasible"] = str(row.feasible).lower()
    if row.failure is not None:
        tags["failure"] = row.failure[:_LONGEST_TAG]
    full = (search.confirmed or {}) if is_best else {}
    table = (row.answers_digest or "", lambda: _answers(answers))
    started = row.started or datetime.now()
    return RunContent(
        name=f"{notes['tags']['method']} {row.label}",
        status="FINISHED" if row.state == COMPLETE else "FAILED",
        started=started,
        ended=row.ended or started,
        parameters=row.parameters,
        tags=tags,
        numbers=_numbers(row, full),
        curves=_curves(row, search.baseline, full),
        data=notes["description"]["data"],
        tables={"answers.json": table} if answers.is_file() else {},
    )


def _numbers(row: TrialRow, full: Mapping[str, float]) -> dict[str, float]:
    """Return a trial's metrics of one value; MLflow's comparison opens with the first, a score."""
    numbers = {**shown_scores(row.scores), **_prefixed("full", shown_scores(full))}
    if row.feasible is not None:
        numbers["feasible"] = row.feasible
    if row.retain_exact is not None:
        numbers["retain_exact"] = row.retain_exact
        if not row.retain_exact and row.retain_rows is not None:
            numbers["retain_rows"] = row.retain_rows
    if "trial" in row.seconds:
        numbers["seconds"] = row.seconds["trial"]
    for name, value in row.parameters.items() if row.scores else ():
        if name.endswith("learning_rate") and is_number(value) and value > 0:
            numbers[f"log10_{name}"] = math.log10(value)  # MLflow's axes are linear
    return numbers


def _curves(
    row: TrialRow, base: Mapping[str, float], full: Mapping[str, float]
) -> dict[str, Curve]:
    """Return a trial's metrics by epoch, and its ROUGE scores by stage.

    Stages are the base model, the trial as searched, and its confirmation.
    """
    curves: dict[str, Curve] = {"loss": list(enumerate(row.losses, 1))}
    for name in ("forget_rouge1", "retain_rouge1"):
        curves[f"check_{name}"] = [(int(check["epochs"]), check[name]) for check in row.checks]
    for name in (one for one in shown_scores(row.scores) if "_rouge" in one):
        stages = enumerate((base, row.scores, full))
        curves[f"stage_{name}"] = [(step, said[name]) for step, said in stages if name in said]
    return curves


def _answers(path: Path) -> Columns:
    """Return a trial's answers as columns; texts only where they were kept."""
    rows = read_answers(path)
    texts = ("question", "truth", "answer") if any(row.question for row in rows) else ()
    columns = {name: [getattr(row, name) for row in rows] for name in ("edge", *texts, "rouge1")}
    return {"set": [row.set_name for row in rows], **columns}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in values.items()}

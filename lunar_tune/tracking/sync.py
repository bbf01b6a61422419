"""MLflow's runs of a search, made to say what its study and its answers say.

A parent run for the search, a child run for each trial that has ended, and nothing else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.study.answers import read_answers
from lunar_tune.study.rows import COMPLETE, RUNNING, TrialRow, best_so_far, is_number
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.runs import Curves, RunContent, add_points, bring
from lunar_tune.tracking.store import NOTE, find_experiment, place_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["completed_runs", "shown_scores", "sync"]

SEARCH, TRIAL_OF = "lunar_tune.search", "lunar_tune.trial_of"
"""Tags that tell a search's run, and those of its trials, by the identity that its study keeps."""
PARENT = "mlflow.parentRunId"
PROGRESS = "best_feasible"
BASE, AS_SEARCHED, CONFIRMED = range(3)
"""Steps of the metrics `stage_…`: the base model, the trial, and its confirmation."""
_PAGE, _LONGEST_TAG = 1000, 5000


def sync(
    search: StoredSearch,
    client: MlflowClient,
    *,
    only: Collection[int] | None = None,
    note: str | None = None,
    status: str | None = None,
) -> Run:
    """Make MLflow's runs say what a search's study says; what is right is not written again.

    It is for the process that holds the search's lock.

    Args:
        search: As it stands on disk.
        client: Of the store.
        only: Trials that have ended since the last time; None looks at everything.
        note: Markdown for the page of the search's run; None leaves what is there.
        status: Of the search's run; None takes that with which the study says it ended.

    Returns:
        The search's run.

    Raises:
        InputError: The study does not say where the runs are.
        MlflowException: The store cannot be used.
    """
    place = place_of(search)
    experiment = str(find_experiment(client, place["experiment"]).experiment_id)
    found = list(_tagged(client, experiment, SEARCH, place["id"]))
    if only is not None and found:
        parent = found[0]
        add_points(client, parent, {PROGRESS: _progress(search, only)})
    else:
        parent = bring(client, experiment, found, _search_content(search, note, status))
    trials = [row for row in search.rows if row.state != RUNNING]
    if only is None:
        runs = _by_trial(_tagged(client, experiment, TRIAL_OF, place["id"]))
    else:
        trials = [row for row in trials if row.number in only]
        numbers = [str(row.number) for row in trials]
        runs = {n: list(_tagged(client, experiment, TRIAL_OF, place["id"], n)) for n in numbers}
    for row in trials:
        content = _trial_content(search, row, parent.info.run_id)
        bring(client, experiment, runs.pop(str(row.number), []), content)
    for run in (one for left in runs.values() for one in left):  # of no trial that has ended
        client.delete_run(run.info.run_id)
    return parent


def completed_runs(client: MlflowClient, search: StoredSearch) -> tuple[Run | None, list[Run]]:
    """Return the runs of a search and of its completed trials, by number, as far as there are."""
    place = place_of(search)
    experiment = str(find_experiment(client, place["experiment"]).experiment_id)
    parent = next(_tagged(client, experiment, SEARCH, place["id"]), None)
    runs = _by_trial(_tagged(client, experiment, TRIAL_OF, place["id"]))
    completed = [row.number for row in search.rows if row.state == COMPLETE]
    return parent, [run for number in completed for run in runs.get(str(number), [])[:1]]


def shown_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores without counts of rows, which are no axes to compare by."""
    return {name: value for name, value in scores.items() if not name.endswith("_rows")}


def _tagged(
    client: MlflowClient, experiment: str, tag: str, value: str, trial: str | None = None
) -> Iterator[Run]:
    """Yield the runs with a tag, and of a trial where one is named, page by page."""
    where = f"tags.`{tag}` = '{value}'" + (f" and tags.trial = '{trial}'" if trial else "")
    token: str | None = None
    while True:
        page = client.search_runs([experiment], where, max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _by_trial(runs: Iterator[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.data.tags.get("trial", "")].append(run)
    return found


def _search_content(search: StoredSearch, note: str | None, status: str | None) -> RunContent:
    """Return what the search's run says."""
    notes, folder = search.study.notes, search.folder
    about, best, scores = notes.get("description", {}), search.best, search.confirmed
    status = status or notes.get("status", "KILLED")
    curves = _numbers(_prefixed("vanilla", shown_scores(search.vanilla)))
    curves |= _numbers({"num_trials": about.get("num_trials", len(search.rows))})
    curves[PROGRESS] = _progress(search)
    tags = {SEARCH: place_of(search)["id"], "search": folder.name, **notes["tags"]}
    tags |= about.get("origin", {}) | about.get("lineage", {})
    if best is not None or status != "RUNNING":
        feasible = best is not None and search.goal.is_kept(scores or {})
        # A search that goes on may find a better one, and MLflow lets no parameter change.
        setting = {} if best is None else {"trial": best.number, **best.parameters}
        shown = {**shown_scores(scores or {}), **{k: v for k, v in setting.items() if is_number(v)}}
        curves |= _numbers({"feasible": float(feasible), **_prefixed("best", shown)})
        words = {k: str(v) for k, v in setting.items() if not is_number(v)}
        tags |= {"feasible": str(feasible).lower(), **_prefixed("best", words)}
    if note is not None:
        tags[NOTE] = note[:_LONGEST_TAG]
    starts = [row.started for row in search.rows if row.started is not None]
    ends = [row.ended for row in search.rows if row.ended is not None]
    now = datetime.now()
    files = [folder.config, folder.best, folder.path / "report.md", folder.path / "page.html"]
    files += sorted(folder.pictures.rglob("*")) if folder.pictures.is_dir() else []
    return RunContent(
        name=folder.name,
        status=status,
        started=min(starts, default=now),
        ended=max(ends, default=now),
        parameters=about.get("parameters", {}),
        tags=tags,
        curves=curves,
        data=about.get("data", {}),
        files={one.relative_to(folder.path).as_posix(): one for one in files if one.is_file()},
    )


def _trial_content(search: StoredSearch, row: TrialRow, parent: str) -> RunContent:
    """Return what a trial's run says."""
    notes, answers = search.study.notes, search.folder.answers(row.number)
    about, best = notes.get("description", {}), search.best
    is_best = best is not None and best.number == row.number
    tags = {
        **notes["tags"],
        **about.get("origin", {}),
        TRIAL_OF: place_of(search)["id"],
        PARENT: parent,
        "search": search.folder.name,
        "trial": str(row.number),
        "state": row.state,
        "confirmed_best": str(is_best).lower(),
    }
    if row.feasible is not None:
        tags["feasible"] = str(row.feasible).lower()
    if row.failure is not None:
        tags["failure"] = row.failure[:_LONGEST_TAG]
    tables = {"answers.json": (row.answers_digest or "", lambda: _answers(answers))}
    started = row.started or datetime.now()
    return RunContent(
        name=f"{notes['tags'].get('method', 'trial')} {row.label}",
        status="FINISHED" if row.state == COMPLETE else "FAILED",
        started=started,
        ended=row.ended or started,
        parameters=row.parameters,
        tags=tags,
        curves=_curves(row, search.vanilla, (search.confirmed or {}) if is_best else {}),
        data=about.get("data", {}),
        tables=tables if answers.is_file() else {},
    )


def _curves(row: TrialRow, base: Mapping[str, float], full: Mapping[str, float]) -> Curves:
    """Return a trial's numbers: what it has one of, by epoch, and its ROUGE scores by stage."""
    numbers = {**shown_scores(row.scores), **_prefixed("full", shown_scores(full))}
    if row.feasible is not None:
        numbers["feasible"] = float(row.feasible)
    if row.retain_exact is not None:
        numbers["retain_exact"] = float(row.retain_exact)
        if not row.retain_exact and row.retain_rows is not None:
            numbers["retain_rows"] = float(row.retain_rows)
    if "trial" in row.seconds:
        numbers["seconds"] = row.seconds["trial"]
    for name, value in row.parameters.items() if row.scores else ():
        if name.endswith("learning_rate") and is_number(value) and value > 0:
            numbers[f"log10_{name}"] = math.log10(value)  # MLflow's axes are linear
    curves = _numbers(numbers)  # MLflow's comparison opens with the first, a score
    curves["loss"] = list(enumerate(row.losses, 1))
    for name in ("forget_rouge1", "retain_rouge1"):
        curves[f"check_{name}"] = [(int(check["epochs"]), check[name]) for check in row.checks]
    for name in (one for one in shown_scores(row.scores) if "_rouge" in one):
        stages = ((BASE, base), (AS_SEARCHED, row.scores), (CONFIRMED, full))
        curves[f"stage_{name}"] = [(step, said[name]) for step, said in stages if name in said]
    return curves


def _progress(search: StoredSearch, only: Collection[int] | None = None) -> list[tuple[int, float]]:
    """Return the best feasible score after each trial, by how many ended before it.

    Args:
        search: The search.
        only: Trials whose points are wanted; None is all.
    """
    ended = [row for row in search.rows if row.state != RUNNING and row.ended is not None]
    ended.sort(key=lambda row: (row.ended, row.number))
    places = {row.number: place for place, row in enumerate(ended)}
    metric = search.goal.objective.metric
    return [
        (places[row.number], best.scores[metric])
        for row, best in best_so_far(ended)
        if only is None or row.number in only
    ]


def _answers(path: Path) -> Mapping[str, Sequence[Any]]:
    """Return a trial's answers as columns; texts only where they were kept."""
    rows = read_answers(path)
    texts = ("question", "truth", "answer") if any(row.question for row in rows) else ()
    columns = {name: [getattr(row, name) for row in rows] for name in ("edge", *texts, "rouge1")}
    return {"set": [row.set_name for row in rows], **columns}


def _numbers(values: Mapping[str, float]) -> Curves:
    """Return single numbers as curves of one point."""
    return {name: [(0, float(value))] for name, value in values.items()}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in values.items()}

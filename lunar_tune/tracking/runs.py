"""MLflow's runs as values: what those of a search and a trial say, and writing what is missing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lunar_tune.metrics.goal import METRICS
from lunar_tune.signals import uninterrupted
from lunar_tune.study.folder import read_answers
from lunar_tune.study.rows import COMPLETE, RUNNING, TrialRow, best_so_far, is_number
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.places import FOLDER, Place

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

SEARCH, TRIAL_OF = "lunar_tune.search", "lunar_tune.trial_of"
"""Tags that tell a search's run, and those of its trials, by the identity that its study keeps."""
DIGEST = "lunar_tune.digest"  # tag of a run that is written whole: `RunContent.digest`
_LONGEST_TAG = 5000  # that MLflow takes
Curve = Sequence[tuple[int, float]]  # a metric's steps and values


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """All that a run says."""

    name: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    started: datetime
    ended: datetime
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str | None] = field(default_factory=dict)  # None: it must not have it
    metrics: Mapping[str, float | Curve] = field(default_factory=dict)
    data: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # digest and rows by name
    files: Mapping[str, Path] = field(default_factory=dict)  # artifacts by their place
    tables: Mapping[str, Path | Mapping[str, Any]] = field(default_factory=dict)
    """Columns and data as pandas splits them, or a file of answers, by the table's place."""

    @cached_property
    def points(self) -> dict[str, Curve]:
        """Every metric as a curve, without what is no finite number: not every store takes it."""
        points: dict[str, Curve] = {}
        for name, said in self.metrics.items():
            curve = [(0, said)] if isinstance(said, int | float) else said
            if finite := [(step, value) for step, value in curve if math.isfinite(value)]:
                points[name] = finite
        return points

    @cached_property
    def digest(self) -> str:
        """What a store does not show in its list of runs: SHA-256 of data and artifacts, points."""
        files = {}
        for at, one in {**self.files, **self.tables}.items():
            content = one.read_bytes() if isinstance(one, Path) else json.dumps(one).encode()
            files[at] = hashlib.sha256(content).hexdigest()
        data = hashlib.sha256(json.dumps([self.data, files]).encode()).hexdigest()
        return f"{data} {sum(map(len, self.points.values()))}"

    def is_in(self, run: Run) -> bool:
        """Say whether a run, as a store lists it, says all of it."""
        metrics = {name: max(curve)[1] for name, curve in self.points.items()}
        return (
            run.info.status == self.status
            and run.data.tags.get(DIGEST) == self.digest
            and all(run.data.tags.get(name) == text for name, text in self.tags.items())
            and metrics.items() <= run.data.metrics.items()
        )


@uninterrupted()
def bring(
    client: MlflowClient, experiment: Experiment, runs: Sequence[Run], content: RunContent
) -> Run:
    """Let a store have one run of a content; nothing is written that it has.

    Of `runs`, those that claim to be it, all but one are deleted. An interruption waits until the
    run is whole; after a kill it is written again, for its digest is written last.
    """
    from mlflow.entities import Param, RunTag

    ranked = sorted(runs, key=content.is_in, reverse=True)
    for other in ranked[1:]:
        client.delete_run(other.info.run_id)
    if ranked and content.is_in(ranked[0]):
        return ranked[0]
    tags = {name: text for name, text in content.tags.items() if text is not None}
    if content.tables:
        shown = [{"path": place, "type": "table"} for place in content.tables]
        tags["mlflow.loggedArtifacts"] = json.dumps(shown)
    run = next(iter(ranked), None) or client.create_run(
        str(experiment.experiment_id),
        start_time=_milliseconds(content.started),
        tags=tags,
        run_name=content.name,
    )
    run_id, known = run.info.run_id, run.data.params  # MLflow lets no parameter change
    if run.info.run_name != content.name:  # of a folder that was renamed
        client.update_run(run_id, name=content.name)
    if run.info.status != content.status and content.status == "RUNNING":
        client.update_run(run_id, status=content.status)
    elif run.info.status != content.status:
        client.set_terminated(run_id, content.status, end_time=_milliseconds(content.ended))
    for name in (content.tags.keys() - tags.keys()) & run.data.tags.keys():
        client.delete_tag(run_id, name)
    new = {name: value for name, value in content.parameters.items() if name not in known}
    client.log_batch(
        run_id,
        metrics=_metrics(run, content.points),
        params=[Param(name, str(value)) for name, value in new.items()],
        tags=[RunTag(name, text) for name, text in tags.items()],
    )
    if run.data.tags.get(DIGEST, "").split(" ")[0] != content.digest.split(" ")[0]:
        _keep(client, run, content)
    client.set_tag(run_id, DIGEST, content.digest)
    return run


def _metrics(run: Run, points: Mapping[str, Curve]) -> list[Metric]:
    """Return points of metrics; a store leaves out one that it has, and shows a step's latest.

    The time of a point is that of the run, so that it is the same however often it is written; but
    the present where the store shows a value that the run never had.
    """
    from mlflow.entities import Metric

    metrics = []
    for name, curve in points.items():
        shown = run.data.metrics.get(name)
        is_wrong = shown is not None and shown not in {value for _, value in curve}
        at = int(time.time() * 1000) if is_wrong else run.info.start_time
        metrics += [Metric(name, value, at, step) for step, value in curve]
    return metrics


def artifacts_of(client: MlflowClient, run: Run) -> ArtifactRepository:
    """Return where a run's artifacts are now; a client keeps the places that it has seen."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    place: str = run.info.artifact_uri
    return get_artifact_repository(place, tracking_uri=client.tracking_uri)


def _keep(client: MlflowClient, run: Run, content: RunContent) -> None:
    """Write data sets and artifacts; twice is the same as once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    inputs = []
    for name, (digest, rows) in content.data.items():
        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="code",
            source=json.dumps({"tags": {"lunar_tune.split": name}}),
            profile=json.dumps({"rows": rows}),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
    if inputs:
        client.log_inputs(run.info.run_id, inputs)
    try:
        artifacts = artifacts_of(client, run)
        for place, file in content.files.items():
            artifacts.log_artifact(str(file), place.rpartition("/")[0] or None)
        with TemporaryDirectory() as folder:
            for place, table in content.tables.items():
                # As MLflow's `log_table` writes it, which would append to one that is there.
                columns = _answers(table) if isinstance(table, Path) else table
                file = Path(folder) / place
                file.write_text(json.dumps(columns, ensure_ascii=False), encoding="utf-8")
                artifacts.log_artifact(str(file))
    except Exception as error:  # of an artifact store's library: anything
        raise MlflowException(f"an artifact cannot be written: {error}") from error


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def shown_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores without counts of rows, which are no axes to compare by."""
    return {name: value for name, value in scores.items() if not name.endswith("_rows")}


def search_content(
    search: StoredSearch, uri: str, note: str | None, status: str | None
) -> RunContent:
    """Return what the search's run says in the store at a URI."""
    notes, folder = search.study.notes, search.folder
    about, best, scores = notes["description"], search.best, search.confirmed or {}
    status = status or notes.get("status", "KILLED")
    numbers = _prefixed("baseline", shown_scores(search.baseline))
    numbers["num_trials"] = about["num_trials"]
    tags = {SEARCH: notes["mlflow"]["id"], "search": folder.name, **notes["tags"]}
    tags |= notes["mlflow"]["origin"] | about["lineage"]
    tags[FOLDER] = Place.of(folder.path, uri).tag
    if best is not None or status != "RUNNING":
        feasible = best is not None and search.goal.is_kept(scores)
        # A search that goes on may find a better one, and MLflow lets no parameter change.
        found = {} if best is None else {"trial": best.number, **best.parameters}
        found = {name: value for name, value in found.items() if is_number(value)}
        numbers |= {"feasible": feasible, **_prefixed("best", found | shown_scores(scores))}
    if status != "RUNNING" and (outlook := notes.get("outlook")) is not None:
        numbers["chance_of_gain"] = outlook["chance"]
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
        metrics={**numbers, "best_feasible": _progress(search)},
        data=about["data"],
        files={one.relative_to(folder.path).as_posix(): one for one in files if one.is_file()},
    )


def _progress(search: StoredSearch) -> Curve:
    """Return the best feasible score after each trial, by how many ended before it."""
    ended = [row for row in search.rows if row.state != RUNNING and row.ended is not None]
    ended.sort(key=lambda row: (row.ended, row.number))
    metric, pairs = search.goal.objective.name, best_so_far(ended)
    first = len(ended) - len(pairs)  # the first feasible one
    return [(step, best.scores[metric]) for step, (_, best) in enumerate(pairs, first)]


def trial_content(search: StoredSearch, row: TrialRow, parent: str) -> RunContent:
    """Return what a trial's run says."""
    notes, answers = search.study.notes, search.folder.answers(row.number)
    is_best = row == search.best
    tags: dict[str, str | None] = {
        **notes["tags"],
        **notes["mlflow"]["origin"],
        TRIAL_OF: notes["mlflow"]["id"],
        "mlflow.parentRunId": parent,
        "search": search.folder.name,
        "trial": str(row.number),
        "best": "true" if is_best else None,
    }
    if row.failure is not None:
        tags["failure"] = row.failure[:_LONGEST_TAG]
    started = row.started or datetime.now()
    return RunContent(
        name=row.label,
        status="FINISHED" if row.state == COMPLETE else "FAILED",
        started=started,
        ended=row.ended or started,
        parameters=row.parameters,
        tags=tags,
        metrics=_trial_metrics(search, row, (search.confirmed or {}) if is_best else {}),
        data=notes["description"]["data"],
        tables={"answers.json": answers} if search.has_its_answers(row.number) else {},
    )


def _trial_metrics(
    search: StoredSearch, row: TrialRow, full: Mapping[str, float]
) -> dict[str, float | Curve]:
    """Return a trial's metrics, of which `goal` is for sorting: the feasible trials come first.

    Curves are by epoch, and of ROUGE by stage: base model, trial as searched, its confirmation.
    """
    scores = shown_scores(row.scores)
    metrics: dict[str, float | Curve] = {**scores, **_prefixed("full", shown_scores(full))}
    if row.feasible is not None:
        metrics |= {"feasible": row.feasible, "goal": search.goal.penalised(row.scores)}
    if row.retain_exact is not None:
        metrics["retain_exact"] = row.retain_exact
    if row.retain_exact is False and row.retain_rows is not None:
        metrics["retain_rows"] = row.retain_rows
    if "trial" in row.seconds:
        metrics["seconds"] = row.seconds["trial"]
    for name, value in row.parameters.items() if row.scores else ():
        if name.endswith("learning_rate") and is_number(value) and value > 0:
            metrics[f"log10_{name}"] = math.log10(value)  # MLflow's axes are linear
    metrics["loss"] = list(enumerate(row.losses, 1))
    for name in ("forget_rouge1", "retain_rouge1"):
        metrics[f"check_{name}"] = [(int(check["epochs"]), check[name]) for check in row.checks]
    for name in (one for one in scores if "_rouge" in one and one in METRICS):
        stages = enumerate((search.baseline, row.scores, full))
        metrics[f"stage_{name}"] = [(step, said[name]) for step, said in stages if name in said]
    return metrics


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _answers(path: Path) -> dict[str, Any]:
    """Return a trial's answers as a table for JSON; texts only where they were kept."""
    rows = read_answers(path)
    texts = ("question", "truth", "answer") if any(row.question for row in rows) else ()
    names = ("set_name", "edge", *texts, "rouge1")
    data = [[getattr(row, name) for name in names] for row in rows]
    return {"columns": ["set", *names[1:]], "data": data}

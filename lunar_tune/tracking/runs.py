"""One MLflow run as a value, and writing what a store does not have of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

__all__ = ["Columns", "Curves", "RunContent", "add_points", "bring"]

DIGEST = "lunar_tune.digest"
"""Tag of a run that is written whole: what was written."""
Columns = Mapping[str, Sequence[Any]]
Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContent:
    """All that a run says."""

    name: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    started: datetime
    ended: datetime
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags that identify the run among them."""
    curves: Curves = field(default_factory=dict)
    """Metrics as step and value; a single number is a curve of one point at step 0."""
    data: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Digest and number of rows of each data set, by name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Artifacts by their place."""
    tables: Mapping[str, tuple[str, Callable[[], Columns]]] = field(default_factory=dict)
    """Tables by their place: digest, and the columns when they are needed."""

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each curve."""
        return {name: max(points)[1] for name, points in _finite(self.curves).items()}

    @property
    def digest(self) -> str:
        """SHA-256 of what a store does not show in its list of runs."""
        files = {
            at: hashlib.sha256(file.read_bytes()).hexdigest() for at, file in self.files.items()
        }
        tables = {at: digest for at, (digest, _) in self.tables.items()}
        parts = [self.parameters, self.curves, self.data, files, tables]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def is_in(self, run: Run, digest: str) -> bool:
        """Say whether a run says all of it.

        Args:
            run: With what the store shows of it.
            digest: Of the content.
        """
        return (
            run.info.status == self.status
            and run.data.tags.get(DIGEST) == digest
            and self.tags.items() <= run.data.tags.items()
            and self.metrics.items() <= run.data.metrics.items()
        )


def bring(
    client: MlflowClient, experiment_id: str, runs: Sequence[Run], content: RunContent
) -> Run:
    """Let a store have one run of a content; nothing is written where it has.

    A run is ended as soon as it is made, and its digest is written last: an interruption leaves
    no run open, and one that is not whole is written again.

    Args:
        client: Of the store.
        experiment_id: Of the run.
        runs: Those that claim to be it; all but one are deleted.
        content: What it says.
    """
    digest = content.digest
    candidates = sorted(runs, key=lambda one: not content.is_in(one, digest))
    for other in candidates[1:]:
        client.delete_run(other.info.run_id)
    if candidates and content.is_in(candidates[0], digest):
        return candidates[0]
    run = next(iter(candidates), None) or client.create_run(
        experiment_id,
        start_time=_milliseconds(content.started),
        tags=dict(content.tags),
        run_name=content.name,
    )
    if run.info.status != content.status and content.status == "RUNNING":
        client.update_run(run.info.run_id, status=content.status)
    elif run.info.status != content.status:
        ended = _milliseconds(content.ended)
        client.set_terminated(run.info.run_id, content.status, end_time=ended)
    _fill(client, run, content)
    client.set_tag(run.info.run_id, DIGEST, digest)
    return run


def add_points(client: MlflowClient, run: Run, curves: Curves) -> None:
    """Write metrics; a store leaves out a point that it has, and shows the latest of a step.

    The time of a point is that of the run, so that it is the same however often it is written; but
    the present where the store shows a value that the run never had.
    """
    from mlflow.entities import Metric

    points = []
    for name, curve in _finite(curves).items():
        shown = run.data.metrics.get(name)
        is_wrong = shown is not None and shown not in {value for _, value in curve}
        at = int(time.time() * 1000) if is_wrong else run.info.start_time
        points += [Metric(name, value, at, step) for step, value in curve]
    client.log_batch(run.info.run_id, metrics=points)


def _fill(client: MlflowClient, run: Run, content: RunContent) -> None:
    """Write parameters, tags, metrics, data sets and artifacts; twice is the same as once."""
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    run_id, known = run.info.run_id, run.data.params  # MLflow lets no parameter change
    new = {name: value for name, value in content.parameters.items() if name not in known}
    tags = dict(content.tags)
    if content.tables:
        shown = [{"path": place, "type": "table"} for place in content.tables]
        tags["mlflow.loggedArtifacts"] = json.dumps(shown)
    client.log_batch(
        run_id,
        params=[Param(name, str(value)) for name, value in new.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    add_points(client, run, content.curves)
    if content.data:
        client.log_inputs(run_id, [_input(name, *one) for name, one in content.data.items()])
    try:
        for place, file in content.files.items():
            folder = place.rpartition("/")[0]
            client.log_artifact(run_id, str(file), folder or None)
        for place, (_, columns) in content.tables.items():
            client.log_text(run_id, _table(columns()), place)
    except Exception as error:  # of an artifact store's library: anything
        raise MlflowException(f"an artifact cannot be written: {error}") from error


def _finite(curves: Curves) -> Curves:
    """Return curves without what is no finite number, which not every store takes."""
    kept = {name: [one for one in curve if math.isfinite(one[1])] for name, curve in curves.items()}
    return {name: curve for name, curve in kept.items() if curve}


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _table(columns: Columns) -> str:
    """Return a table as MLflow's `log_table` writes it, which would append to one that is there."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False)


def _input(name: str, digest: str, rows: int) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name,
        digest=digest[:36],
        source_type="code",
        source=json.dumps({"tags": {"lunar_tune.split": name}}),
        profile=json.dumps({"rows": rows}),
    )
    return DatasetInput(dataset=dataset, tags=[InputTag(key="mlflow.data.context", value=name)])

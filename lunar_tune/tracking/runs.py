"""One MLflow run as a value, and writing what a store does not have of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Experiment, Metric, Run

__all__ = ["Columns", "Curve", "RunContent", "bring"]

DIGEST = "lunar_tune.digest"
"""Tag of a run that is written whole: `RunContent.digest`."""
Columns = Mapping[str, Sequence[Any]]
Curve = Sequence[tuple[int, float]]
"""A metric's steps and values."""


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
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Metrics of one value."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    data: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Digest and number of rows of each data set, by name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Artifacts by their place."""
    tables: Mapping[str, tuple[str, Callable[[], Columns]]] = field(default_factory=dict)
    """Tables by their place: digest, and the columns when they are needed."""

    @property
    def points(self) -> dict[str, Curve]:
        """Every metric as a curve, without what is no finite number: not every store takes it."""
        curves = {**{name: [(0, value)] for name, value in self.numbers.items()}, **self.curves}
        finite = {
            name: [(step, value) for step, value in curve if math.isfinite(value)]
            for name, curve in curves.items()
        }
        return {name: curve for name, curve in finite.items() if curve}

    @property
    def digest(self) -> str:
        """What a store does not show in its list of runs: SHA-256 of data and artifacts, points."""
        files = {
            at: hashlib.sha256(file.read_bytes()).hexdigest() for at, file in self.files.items()
        }
        tables = {at: digest for at, (digest, _) in self.tables.items()}
        kept = hashlib.sha256(json.dumps([self.data, files, tables]).encode()).hexdigest()
        return f"{kept} {sum(map(len, self.points.values()))}"

    def is_in(self, run: Run, digest: str) -> bool:
        """Say whether a run, as a store lists it, says all of it."""
        metrics = {name: max(curve)[1] for name, curve in self.points.items()}
        return (
            run.info.status == self.status
            and run.data.tags.get(DIGEST) == digest
            and self.tags.items() <= run.data.tags.items()
            and metrics.items() <= run.data.metrics.items()
        )


def bring(
    client: MlflowClient, experiment: Experiment, runs: Sequence[Run], content: RunContent
) -> Run:
    """Let a store have one run of a content; nothing is written that it has.

    Of `runs`, those that claim to be it, all but one are deleted. A run is ended as soon as it is
    made, and its digest is written last: an interruption leaves no run open, and one that is not
    whole is written again.
    """
    from mlflow.entities import Param, RunTag

    digest = content.digest
    ranked = sorted(runs, key=lambda one: not content.is_in(one, digest))
    for other in ranked[1:]:
        client.delete_run(other.info.run_id)
    if ranked and content.is_in(ranked[0], digest):
        return ranked[0]
    run = next(iter(ranked), None) or client.create_run(
        str(experiment.experiment_id),
        start_time=_milliseconds(content.started),
        tags=dict(content.tags),
        run_name=content.name,
    )
    run_id, known = run.info.run_id, run.data.params  # MLflow lets no parameter change
    if run.info.status != content.status and content.status == "RUNNING":
        client.update_run(run_id, status=content.status)
    elif run.info.status != content.status:
        client.set_terminated(run_id, content.status, end_time=_milliseconds(content.ended))
    new = {name: value for name, value in content.parameters.items() if name not in known}
    client.log_batch(
        run_id,
        metrics=_metrics(run, content.points),
        params=[Param(name, str(value)) for name, value in new.items()],
        tags=[RunTag(name, value) for name, value in content.tags.items()],
    )
    if run.data.tags.get(DIGEST, "").split(" ")[0] != digest.split(" ")[0]:
        _keep(client, run_id, content)
    client.set_tag(run_id, DIGEST, digest)
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


def _keep(client: MlflowClient, run_id: str, content: RunContent) -> None:
    """Write data sets and artifacts; twice is the same as once."""
    from mlflow.exceptions import MlflowException

    if content.data:
        client.log_inputs(run_id, [_input(name, *one) for name, one in content.data.items()])
    try:
        for place, file in content.files.items():
            client.log_artifact(run_id, str(file), place.rpartition("/")[0] or None)
        for place, (_, columns) in content.tables.items():
            # As MLflow's `log_table` writes it, which would append to one that is there.
            rows = list(zip(*(made := columns()).values(), strict=True))
            document = {"columns": list(made), "data": rows}
            client.log_text(run_id, json.dumps(document, ensure_ascii=False), place)
    except Exception as error:  # of an artifact store's library: anything
        raise MlflowException(f"an artifact cannot be written: {error}") from error
    if content.tables:
        shown = [{"path": place, "type": "table"} for place in content.tables]
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(shown))


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


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

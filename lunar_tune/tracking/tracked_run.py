"""One MLflow run, from opening its store to closing it.

Covers: runs written from the driver with MlflowClient (MLflow 3.17); a store that fails later and
does not end what is tracked.
Does not cover: a search's trials (`trial_runs`), addresses and opening (`store`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.config.search_config import EXPERIMENT
from lunar_tune.secrets import without_secrets
from lunar_tune.tracking.run_origin import origin_tags
from lunar_tune.tracking.store import (
    few_retries,
    kept_uri,
    store_lock,
    usable_store,
    with_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

    from lunar_tune.data.records import Record

__all__ = ["EXPERIMENT", "NOTE", "TrackedRun"]

NOTE = "mlflow.note.content"
_EXPERIMENT_TAGS = {
    # Without it the UI asks whether the runs are of an agent or of a model.
    "mlflow.experimentKind": "custom_model_development",
    NOTE: "Searches of lunar-tune: a parent run for each search, a child run for each trial. "
    "`python -m lunar_tune.compare` opens the comparison of a search's trials.",
}
logger = logging.getLogger(__name__)
_AWAY = 30.0
"""Seconds for which a store that has failed is left alone: trials do not wait for it."""
_ADVICE = (
    "Start the server, correct --tracking-uri, or leave that out for a sqlite file in the output "
    "folder."
)


class TrackedRun:
    """A run that is being written.

    Args:
        uri: Tracking URI.
        output: Folder for the artifacts of a default store, and of its lock.
        name: The run's name.
        experiment: The experiment that it belongs to; made if missing.
        earlier: Id of the run that is gone on with, if the store has it still.
        own: Tags of the run that tell it from others.
    """

    def __init__(
        self,
        uri: str,
        *,
        output: Path,
        name: str,
        experiment: str = EXPERIMENT,
        earlier: str | None = None,
        own: Mapping[str, str] | None = None,
    ) -> None:
        """Open the store, make the experiment and the run.

        Raises:
            InputError: The store cannot be opened, or its address has lost its password.
        """
        os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the parent
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # for each trial
        from mlflow import MlflowClient

        # What it retries is told once, by whoever asked for it.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        output.mkdir(parents=True, exist_ok=True)
        self.uri = uri = with_password(uri, name)
        self.has_failed = False
        self._away_until = -math.inf
        self._origin = origin_tags()
        self._own = dict(own or {})
        self._inputs: list[DatasetInput] = []
        with usable_store(uri, _ADVICE), store_lock(uri, output):
            self._client: MlflowClient = MlflowClient(tracking_uri=uri)
            run = self._taken_up(earlier)
            self.continued = run is not None
            if run is None:
                run = self._client.create_run(
                    self._experiment(experiment, output),
                    run_name=name,
                    tags=self._origin | self._own,
                )
        self.experiment_id: str = run.info.experiment_id
        self.run_id: str = run.info.run_id

    def describe(
        self,
        *,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        texts: Mapping[str, str],
        data: Mapping[str, tuple[Sequence[Record], str]],
    ) -> None:
        """Record what the run is.

        Args:
            parameters: Shown as parameters.
            tags: For filtering.
            texts: Artifacts by file name.
            data: Records and digest of each split, by name.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._inputs = [
            DatasetInput(
                dataset=Dataset(
                    name=name,
                    digest=digest[:36],
                    source_type="code",
                    source=json.dumps({"tags": {"lunar_tune.split": name}}),
                    profile=json.dumps({"rows": len(records)}),
                ),
                tags=[InputTag(key="mlflow.data.context", value=name)],
            )
            for name, (records, digest) in data.items()
        ]
        known = self._client.get_run(self.run_id).data.params if self.continued else {}
        new = {name: value for name, value in parameters.items() if name not in known}
        self._log(self.run_id, parameters=new, tags={**tags, **self._own})
        self._client.log_inputs(self.run_id, self._inputs)
        for file_name, text in texts.items():
            self._client.log_text(self.run_id, text, file_name)

    @property
    def address(self) -> dict[str, str]:
        """Where the run is, as it may be kept: store, experiment and run."""
        return {
            "uri": kept_uri(self.uri),
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
        }

    def write_note(self, text: str) -> None:
        """Describe the run in Markdown, on the page that it opens with."""
        self._log(self.run_id, tags={NOTE: text})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Record numbers of the run itself."""
        self._log(self.run_id, metrics=metrics, step=step)

    def log_files(self, files: Iterable[Path], *, root: Path) -> None:
        """Keep files as artifacts, in the folders that they have below `root`."""
        for file in files:
            place = file.parent.relative_to(root).as_posix()
            self._client.log_artifact(self.run_id, str(file), None if place == "." else place)

    def log_table(self, columns: Mapping[str, Sequence[Any]], file_name: str) -> None:
        """Keep a table as an artifact."""
        self._client.log_table(self.run_id, dict(columns), file_name)

    @contextmanager
    def tolerating(self) -> Iterator[None]:
        """Inside, a store that fails is warned of once, given up soon, and ends nothing else."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with few_retries():
                yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            self._away_until = time.monotonic() + _AWAY
            if not self.has_failed:
                first_line = without_secrets(str(error).partition("\n")[0])
                logger.warning("MLflow cannot be written, the work goes on: %s", first_line)
            self.has_failed = True

    @property
    def is_away(self) -> bool:
        """Whether the store has failed just now: whoever can wait does not ask it again yet."""
        return time.monotonic() < self._away_until

    def ask_again(self) -> None:
        """Let the store be asked now, whatever it did just now."""
        self._away_until = -math.inf

    def close(self, *, status: str) -> None:
        """Close the run: `FINISHED`, `FAILED` or `KILLED`."""
        self._client.set_terminated(self.run_id, status)

    def _taken_up(self, run_id: str | None) -> Run | None:
        """Open a run again; None where the store does not have it."""
        from mlflow.entities import LifecycleStage
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run

    def _experiment(self, name: str, output: Path) -> str:
        existing = self._client.get_experiment_by_name(name)
        if existing is not None:
            return str(existing.experiment_id)
        # MLflow would put artifacts of a sqlite store into the current folder.
        local = self.uri.startswith("sqlite:")
        location = (output / "mlartifacts").resolve().as_uri() if local else None
        return str(
            self._client.create_experiment(
                name, artifact_location=location, tags=dict(_EXPERIMENT_TAGS)
            )
        )

    def _log(
        self,
        run_id: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
        step: int = 0,
    ) -> None:
        """Write at once; what is no finite number is left out, for not every store takes it."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, step) for name, value in (metrics or {}).items()]
        for name, values in (curves or {}).items():
            points += [Metric(name, value, now, place) for place, value in values]
        self._client.log_batch(
            run_id,
            metrics=[point for point in points if math.isfinite(point.value)],
            params=[Param(name, str(value)) for name, value in (parameters or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

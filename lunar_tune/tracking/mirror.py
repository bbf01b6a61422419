"""Where MLflow has a search: the store, the search's run and its trials' runs, found again.

Covers: the study's note of it, a store that was moved with its folder, a store that has lost runs.
Does not cover: writing runs (`trial_runs`), showing them (`ui`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunar_tune.errors import InputError
from lunar_tune.secrets import without_password
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.store import (
    child_runs,
    default_tracking_uri,
    sqlite_file,
    store_lock,
    usable_store,
    with_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Mirror", "find_mirror", "opened_store"]

_ADVICE = "Start the server, or name another address with --tracking-uri."


@dataclass(frozen=True, slots=True)
class Mirror:
    """A search as MLflow has it."""

    search: str
    """The search's name, to show."""
    uri: str
    """Tracking URI of the store."""
    experiment_id: str
    run_id: str
    """The search's own run."""
    metrics: tuple[str, ...] = ("forget_rouge1", "retain_rouge1")
    """The scores to show, first what the search makes good."""
    low_is_good: bool = True
    """Whether that is made low."""

    def trials(self, client: MlflowClient) -> list[Run]:
        """Return the runs of the trials that have scores, by their number.

        Args:
            client: Of the store.

        Raises:
            InputError: The store does not know the search, or no trial has ended.
            MlflowException: The store cannot be asked.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        try:
            search = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            raise InputError(
                f"{self.search}: {without_password(self.uri)} has no run {self.run_id}; it was "
                "deleted, or this is another store (--tracking-uri names one). --static FILE "
                "compares the trials without MLflow."
            ) from error
        children = list(child_runs(client, self.experiment_id, self.run_id))
        runs = [run for run in children if run.info.status == "FINISHED"]
        if not runs:
            raise InputError(f"{self.search}: {_without_scores(search, children)}")
        runs.sort(key=lambda run: int(run.data.tags["trial"]))
        return runs


def _without_scores(search: Run, trials: Sequence[Run]) -> str:
    """Say why no trial of a search has scores."""
    failed = [run.data.tags for run in trials if run.info.status == "FAILED"]
    reasons = Counter(tags.get("failure", "no reason").partition("\n")[0] for tags in failed)
    why = ""
    if reasons:
        n_trials = len(trials)
        failures = f"all {n_trials}" if len(failed) == n_trials else f"{len(failed)} of {n_trials}"
        reason = reasons.most_common(1)[0][0].rstrip(".")
        why = f"{failures} trials failed, most often with: {reason}"
    if search.info.status == "RUNNING":
        return f"MLflow has no trial with scores yet{why and f'; {why}'}."
    return (
        f"there is nothing to compare: {why or 'no trial was completed'}. search.log in its folder "
        "says more, and --static FILE writes a page without MLflow."
    )


def find_mirror(results: StoredSearch, uri: str | None = None) -> Mirror:
    """Return where MLflow has a search.

    Args:
        results: The search.
        uri: Tracking URI; None takes the one that the search was written to.

    Raises:
        InputError: The search has not kept where, or there is no such store.
    """
    name, goal = results.folder.name, results.goal
    note = results.study.notes.get("mlflow")
    if note is None:
        raise InputError(
            f"{name}: does not say where its MLflow runs are; it was searched with an earlier "
            "version. --static FILE compares the trials without MLflow."
        )
    if uri is not None and _is_missing(uri):
        raise InputError(f"--tracking-uri {uri}: there is no such file.")
    return Mirror(
        search=name,
        uri=with_password(uri or _store(results, note["uri"]), name),
        experiment_id=note["experiment_id"],
        run_id=note["run_id"],
        metrics=tuple(dict.fromkeys((*goal.metrics, "forget_rouge1", "retain_rouge1"))),
        low_is_good=goal.objective.direction == "minimize",
    )


def _store(results: StoredSearch, noted: str) -> str:
    """Return the store's URI: where it was, or beside the search if that was moved with it."""
    if not _is_missing(noted):
        return noted
    beside = default_tracking_uri(results.folder.path.parent)
    if not _is_missing(beside):
        return beside
    raise InputError(
        f"{results.folder.name}: its MLflow store {noted} is gone; name it with --tracking-uri if "
        "it was moved. --static FILE compares the trials without MLflow."
    )


def _is_missing(uri: str) -> bool:
    """Say whether a store is a file that is not there, which MLflow would make."""
    file = sqlite_file(uri)
    return file is not None and not file.is_file()


@contextmanager
def opened_store(uri: str) -> Iterator[MlflowClient]:
    """Give a client of a store that there is.

    Raises:
        InputError: It cannot be reached, or fails inside.
    """
    from mlflow import MlflowClient

    with usable_store(uri, _ADVICE):
        with store_lock(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        yield client

"""Where MLflow has a search: the store, the search's run and its trials' runs, found again.

Covers: the study's note of it, a store that was moved with its folder, a store that has lost runs.
Does not cover: writing runs (`tracking`), showing them (`mlflow_ui`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lunar_tune.errors import InputError
from lunar_tune.search.results import SearchResults
from lunar_tune.search.tracked_run import (
    PARENT,
    default_tracking_uri,
    few_retries,
    without_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Mirror", "find_mirror", "opened_store"]

_SQLITE = "sqlite:///"
_PAGE = 1000


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

    def trials(self, client: MlflowClient) -> list[str]:
        """Return the run ids of the trials that have scores, by their number.

        Args:
            client: Of the store.

        Raises:
            InputError: The store does not know the search, or no trial has ended.
        """
        from mlflow.exceptions import MlflowException

        try:
            client.get_run(self.run_id)
        except MlflowException as error:
            raise InputError(
                f"{self.search}: {without_password(self.uri)} has no run {self.run_id}; it was "
                "deleted, or this is another store (--tracking-uri names one). --static FILE "
                "compares the trials without MLflow."
            ) from error
        runs = self._children(client)
        if not runs:
            raise InputError(f"{self.search}: MLflow has no trial with scores yet.")
        return [run.info.run_id for run in runs]

    def _children(self, client: MlflowClient) -> list[Run]:
        where = f"tags.`{PARENT}` = '{self.run_id}' and attributes.status = 'FINISHED'"
        found: list[Run] = []
        token: str | None = None
        while True:
            page = client.search_runs(
                [self.experiment_id], where, max_results=_PAGE, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda run: int(run.data.tags["trial"]))


def find_mirror(results: SearchResults, uri: str | None = None) -> Mirror:
    """Return where MLflow has a search.

    Args:
        results: The search.
        uri: Tracking URI; None takes the one that the search was written to.

    Raises:
        InputError: The search has not kept where, or its store is gone.
    """
    name = results.folder.name
    note = results.study.notes.get("mlflow")
    if note is None:
        raise InputError(
            f"{name}: does not say where its MLflow runs are; it was searched with an earlier "
            "version. --static FILE compares the trials without MLflow."
        )
    return Mirror(
        search=name,
        uri=uri or _store(results, note["uri"]),
        experiment_id=note["experiment_id"],
        run_id=note["run_id"],
    )


def _store(results: SearchResults, noted: str) -> str:
    """Return the store's URI: where it was, or beside the search if that was moved with it."""
    if "***@" in noted:
        given = os.environ.get("MLFLOW_TRACKING_URI")
        if given is not None and without_password(given) == noted:
            return given
        raise InputError(
            f"{results.folder.name}: its store {noted} wants a password, which is not kept; give "
            "the whole address with --tracking-uri or in MLFLOW_TRACKING_URI."
        )
    if not noted.startswith(_SQLITE) or Path(noted.removeprefix(_SQLITE)).is_file():
        return noted
    beside = default_tracking_uri(results.folder.path.parent)
    if Path(beside.removeprefix(_SQLITE)).is_file():
        return beside
    raise InputError(
        f"{results.folder.name}: its MLflow store {noted} is gone; name it with --tracking-uri if "
        "it was moved. --static FILE compares the trials without MLflow."
    )


@contextmanager
def opened_store(uri: str) -> Iterator[MlflowClient]:
    """Give a client of a store that there is.

    Raises:
        InputError: It cannot be reached, or fails inside.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # After the import, which sets them to INFO. What fails is raised as well, and told once.
    for library in ("alembic", "mlflow"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), few_retries():
            warnings.simplefilter("ignore")  # MLflow's notes on opening a store
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise InputError(
            f"the MLflow store {without_password(uri)} cannot be used: {error}. Start the server, "
            "or name another address with --tracking-uri."
        ) from error

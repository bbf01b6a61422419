"""MLflow's store: its address, opening it, and the runs below a run.

Covers: the sqlite store that is taken by default; an address as it is kept, and one that was kept
without its password; one that is opened under a lock, because three processes that opened a new
sqlite store at once died in its migration; a store that cannot be used.
Does not cover: what is written (`tracked_run`) and read (`mirror`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from lunar_tune.errors import InputError
from lunar_tune.secrets import is_masked, without_password, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "PARENT",
    "child_runs",
    "default_tracking_uri",
    "few_retries",
    "kept_uri",
    "sqlite_file",
    "store_lock",
    "usable_store",
    "with_password",
]

PARENT = "mlflow.parentRunId"
_SQLITE = "sqlite:///"
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_PAGE = 1000


def default_tracking_uri(output: Path) -> str:
    """Return the URI of the sqlite store that all searches of an output folder share."""
    return f"{_SQLITE}{(output / 'mlflow.db').resolve()}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def kept_uri(uri: str) -> str:
    """Return a tracking URI as it may be kept: without its password, the same from any folder."""
    file = sqlite_file(uri)
    return without_password(uri) if file is None else f"{_SQLITE}{file.resolve()}"


def with_password(kept: str, search: str) -> str:
    """Return an address that was kept as one that can be used.

    Args:
        kept: From `kept_uri`.
        search: Who kept it, to show.

    Raises:
        InputError: It wants a password, and `MLFLOW_TRACKING_URI` is another address.
    """
    if not is_masked(kept):
        return kept
    given = os.environ.get(_URI_VARIABLE)
    if given is not None and without_password(given) == kept:
        return given
    raise InputError(
        f"{search}: its store {kept} wants a password, which is not kept; give the whole address "
        f"with --tracking-uri or in {_URI_VARIABLE}."
    )


@contextmanager
def few_retries() -> Iterator[None]:
    """Inside, a server that does not answer is given up after seconds instead of four minutes.

    What the user has set for MLflow is left alone.
    """
    mine = {name: value for name, value in _PATIENCE.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextmanager
def usable_store(uri: str, advice: str) -> Iterator[None]:
    """Inside, a store is opened and used, and MLflow says nothing of its own about it.

    Args:
        uri: Tracking URI.
        advice: What to do where it cannot be used.

    Raises:
        InputError: It cannot be reached, or fails inside.
    """
    import mlflow  # noqa: F401 its import sets loggers to INFO
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # What fails is raised as well, and told once.
    for library in ("alembic", "mlflow"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    connections = logging.getLogger("urllib3.connectionpool")
    level = connections.level
    try:
        connections.setLevel(logging.ERROR)  # a warning for each attempt
        with warnings.catch_warnings(), few_retries():
            warnings.simplefilter("ignore")  # MLflow's notes on opening a store
            yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        # MLflow names the address as it was given.
        reason = without_secrets(str(error)).rstrip(".")
        raise InputError(
            f"the MLflow store {without_password(uri)} cannot be used: {reason}. {advice}"
        ) from error
    finally:
        connections.setLevel(level)


@contextmanager
def store_lock(uri: str, output: Path | None = None) -> Iterator[None]:
    """Inside, no other process of lunar-tune opens a store.

    Args:
        uri: Tracking URI; the lock of a sqlite store lies beside its file.
        output: Where the lock of a server is; None takes none.
    """
    file = sqlite_file(uri)
    folder = output if file is None else file.parent
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if folder is None or not os.access(folder, os.W_OK):  # where nobody makes a store anew
        yield
        return
    with filelock.FileLock(folder / ".mlflow.lock"):
        yield


def child_runs(client: MlflowClient, experiment_id: str, run_id: str) -> Iterator[Run]:
    """Yield the runs below a run, page by page."""
    token: str | None = None
    where = f"tags.`{PARENT}` = '{run_id}'"
    while True:
        page = client.search_runs([experiment_id], where, max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return

"""MLflow's store: its address, opening it, its experiment."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import url2pathname

from filelock import FileLock

from lunar_tune.errors import InputError
from lunar_tune.files import check_writable
from lunar_tune.secrets import is_masked, without_password, without_secrets
from lunar_tune.study.stored_search import StoredSearch

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

_SQLITE, _URI_VARIABLE = "sqlite:///", "MLFLOW_TRACKING_URI"
ARTIFACTS = "mlartifacts"  # the folder of a sqlite store's artifacts, beside it
_ADDRESSES = (  # where a store of MLflow 3 keeps addresses of artifacts, by table and column
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_EXPERIMENT_TAGS = {
    # Without it the UI asks whether the runs are of an agent or of a model.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Searches of lunar-tune: a parent run for each search, a child run for "
    "each trial. *Views* has lists with their scores; `lunar-tune compare` adds charts.",
}


def default_tracking_uri(output: Path) -> str:
    """Return the URI of the sqlite store that all searches of an output folder share."""
    return f"{_SQLITE}{(output / 'mlflow.db').resolve()}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for any other store."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def kept_uri(uri: str) -> str:
    """Return a tracking URI as it may be kept: without its password, the same from any folder."""
    file = sqlite_file(uri)
    return without_password(uri) if file is None else f"{_SQLITE}{file.resolve()}"


def with_password(kept: str, search: str) -> str:
    """Return a usable address, from one that `kept_uri` has masked, or raise an InputError."""
    if not is_masked(kept):
        return kept
    if (given := of_environment(kept)) is not None:
        return given
    raise InputError(
        f"{search}: the store {kept} needs a password, which is not kept; give the whole address "
        f"with --tracking-uri or in {_URI_VARIABLE}."
    )


def of_environment(kept: str) -> str | None:
    """Return the address in MLflow's own variable if it names the same store, else None."""
    own = os.environ.get(_URI_VARIABLE)
    return own if own is not None and without_password(own) == kept else None


def store_of(search: StoredSearch, given: str | None = None) -> str:
    """Return the URI of a search's store, or raise an InputError.

    It is the one beside where the folder is now, or one that is `given` or that the environment
    names: an address in a folder may be a stranger's, who would be told passwords.
    """
    kept = None
    with suppress(InputError):  # a configuration that cannot be read permits nothing
        kept = search.config.permissions.get("tracking_uri")
    uri = given or (of_environment(kept) if kept is not None else None)
    if kept is not None and uri is None:
        search.config.check_permitted({"tracking_uri": None})
    file = sqlite_file(given or "")
    if file is not None and not file.is_file():
        raise InputError(f"--tracking-uri {given}: there is no such file.")
    uri = uri or default_tracking_uri(search.folder.path.parent)
    return with_password(uri, search.folder.name)


@contextmanager
def opened_store(uri: str) -> Iterator[MlflowClient]:
    """Give a client of a store, made if it is missing and sqlite, or raise an InputError.

    Inside, a server that does not answer fails after seconds instead of four minutes, quietly;
    retries that the user has set in the environment are left alone.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the parent run
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # for each trial
    mine = {name: value for name, value in _RETRIES.items() if name not in os.environ}
    os.environ.update(mine)
    for library in ("alembic", "mlflow"):  # importing mlflow sets them to INFO
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # A warning for each attempt; what fails is raised as well, and told once.
    connections = logging.getLogger("urllib3.connectionpool")
    level = connections.level
    connections.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's remarks on opening a store
            _check_addresses(uri)
            with _migration_lock(uri):
                client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            yield client
    # A database may want a driver that is not there.
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = without_secrets(str(error)).rstrip(".")
        raise InputError(
            f"the MLflow store {without_password(uri)} cannot be used: {reason}. Start the server, "
            "correct --tracking-uri, or leave that out for a sqlite file in the output folder."
        ) from error
    finally:
        connections.setLevel(level)
        for name in mine:
            os.environ.pop(name, None)


def _check_addresses(uri: str) -> None:
    """Raise an InputError if a sqlite store keeps artifacts on a server.

    Whoever wrote the file has chosen it, and MLflow would send it data and the user's token.
    """
    file = sqlite_file(uri)
    if file is None or not file.is_file():
        return
    for table, column in _ADDRESSES[:2]:  # of registered models nothing is fetched
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database:
            found = database.execute(
                f"select {column} from {table} where {column} like 'http%://%' or "  # noqa: S608
                f"{column} like 'mlflow-artifacts://%' limit 1"
            ).fetchone()
            if found is not None:
                raise InputError(
                    f"the MLflow store {file}: says that artifacts lie at "
                    f"{without_password(found[0])}, a server that would be sent data and MLflow's "
                    "token. If you trust it, give the address of its tracking server with "
                    "--tracking-uri; else use another --output."
                )


def _migration_lock(uri: str) -> FileLock | nullcontext[None]:
    """Return a lock: processes that open a new sqlite store at once die in its migration."""
    if (file := sqlite_file(uri)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # In a folder that cannot be written nobody makes a store anew.
        if os.access(file.parent, os.W_OK):
            return FileLock(file.parent / ".mlflow.lock")
    return nullcontext()


def look_at(uri: str, experiment: str) -> str:
    """Say what a search would find at a tracking URI, writing nothing, or raise an InputError."""
    file, shown = sqlite_file(uri), without_password(uri)
    if file is None and not uri.startswith(("http://", "https://")):
        return f"{shown}, not checked: opening the store would change it"
    with tempfile.TemporaryDirectory() as folder:
        if file is not None:
            check_writable(file.parent, f"MLflow store {shown}")
            if not file.is_file():
                return f"{shown}, to be created"
            copy = Path(folder) / file.name  # opening a store may bring it up to date
            try:
                with (
                    closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as one,
                    closing(sqlite3.connect(copy)) as other,
                ):
                    one.backup(other)
            except sqlite3.Error as error:
                raise InputError(f"the MLflow store {file} cannot be used: {error}.") from error
            uri = f"{_SQLITE}{copy}"
            bring_artifacts(uri, file.parent)
        with opened_store(uri) as client:
            if (found := client.get_experiment_by_name(experiment)) is not None:
                open_experiment(client, experiment)
    return f"{shown} answers; experiment {experiment}{'' if found else ', to be created'}"


def open_experiment(client: MlflowClient, name: str) -> Experiment:
    """Return an experiment whose artifacts can be reached, made if missing, or raise InputError."""
    from mlflow.artifacts import list_artifacts
    from mlflow.entities import LifecycleStage

    experiment = find_experiment(client, name)
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise InputError(
            f"MLflow experiment {name}: it was deleted in MLflow. Restore it (mlflow experiments "
            f"restore -x {experiment.experiment_id}), or name another one "
            "with MLFLOW_EXPERIMENT_NAME."
        )
    place = str(experiment.artifact_location)
    try:
        if place.startswith("file:"):
            check_writable(Path(url2pathname(place.removeprefix("file://"))), place)
        list_artifacts(artifact_uri=place, tracking_uri=client.tracking_uri)
    except Exception as error:  # of an artifact store's library: anything
        reason = without_secrets(str(error)).rstrip(".")
        raise InputError(
            f"MLflow experiment {name}: its artifacts lie in {without_secrets(place)}, which "
            f"cannot be used: {reason}. Install its client library, set its credentials, "
            "or name another experiment with MLFLOW_EXPERIMENT_NAME."
        ) from error
    return experiment


def bring_artifacts(uri: str, folder: Path | None = None) -> None:
    """Let a sqlite store that was moved or copied know the artifacts that came with it.

    MLflow keeps whole addresses of them, and would write to the old place for ever. Changed are
    those below the folder that `find_experiment` has named, where one lies beside the store now, in
    its `folder` (that of its file unless given). A store of another make is left as it is.
    """
    file = sqlite_file(uri)
    if file is None or not file.is_file():
        return
    here = ((folder or file.parent) / ARTIFACTS).resolve()
    if not here.is_dir():
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database, database:
        named = database.execute(
            "select distinct artifact_location from experiments join experiment_tags using "
            "(experiment_id) where key = 'mlflow.note.content' and value = ?",
            (_EXPERIMENT_TAGS["mlflow.note.content"],),
        )
        for (old,) in named.fetchall():
            if old == here.as_uri() or not old.endswith(f"/{ARTIFACTS}"):
                continue
            for table, column in _ADDRESSES:
                database.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "  # noqa: S608
                    f"where {column} = ? or substr({column}, 1, ?) = ?",
                    (here.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


def find_experiment(client: MlflowClient, name: str) -> Experiment:
    """Return an experiment, made if missing; one that was deleted is returned as such."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found
    # MLflow would put the artifacts of a sqlite store into the current folder.
    file = sqlite_file(client.tracking_uri)
    place = (file.parent / ARTIFACTS).resolve().as_uri() if file is not None else None
    try:
        client.create_experiment(name, artifact_location=place, tags=dict(_EXPERIMENT_TAGS))
    except MlflowException:
        if client.get_experiment_by_name(name) is None:  # else another process was first
            raise
    return find_experiment(client, name)

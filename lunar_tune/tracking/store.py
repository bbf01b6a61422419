"""MLflow's store: opening it, what is wrong with it, its experiment."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from lunar_tune.errors import InputError
from lunar_tune.files import check_writable
from lunar_tune.secrets import without_password, without_secrets
from lunar_tune.tracking.address import URI_VARIABLE, for_mlflow, sqlite_file
from lunar_tune.tracking.artifacts import ARTIFACTS, EXPERIMENT_NOTE, beside, check_addresses

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_RETRIES, _TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
_QUICK = {
    **{_RETRIES: "1", _TIMEOUT: "10", "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false"},
    **{"PGCONNECT_TIMEOUT": "10", "AWS_MAX_ATTEMPTS": "2"},
}
_QUICKEST = {**_QUICK, _RETRIES: "0", _TIMEOUT: "5", "PGCONNECT_TIMEOUT": "5"}
_OPENING = 60.0  # seconds for which another process may be making a store; it takes about five
_LONGEST = 300  # characters of a library's reason; a server's may be a whole page
# What to install for a module that MLflow imports.
_PACKAGES = {
    "botocore": "boto3",
    "google": "google-cloud-storage",
    "azure": "azure-identity azure-storage-blob azure-storage-file-datalake",
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
_EXPERIMENT_TAGS = {
    # Without it the UI asks whether the runs are of an agent or of a model.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": EXPERIMENT_NOTE,
}


@contextmanager
def opened_store(
    uri: str, *, is_away: bool = False, registering: bool = False
) -> Iterator[MlflowClient]:
    """Give a client of a store, made if it is missing and sqlite, or raise an InputError.

    Inside, a server that does not answer fails after seconds instead of four minutes, quietly, and
    sooner where it is known that the store `is_away`; what the user has set in the environment is
    left alone. A model is given MLflow's own patience, and the registry of MLFLOW_REGISTRY_URI.
    """
    from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the parent run
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # for each trial
    for library in ("alembic", "mlflow"):  # importing mlflow sets them to INFO
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # A warning for each attempt; what fails is raised as well, and told once.
    connections = logging.getLogger("urllib3.connectionpool")
    level = connections.level
    connections.setLevel(logging.ERROR)
    registry = os.environ.get("MLFLOW_REGISTRY_URI") if registering else None
    try:
        with (
            _environment({} if registering else _QUICKEST if is_away else _QUICK),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # MLflow's remarks on opening a store
            with _migration_lock(uri), _environment(_default_root(uri)):
                _has_tables(uri)
                check_addresses(uri)
                place = for_mlflow(uri)
                client = MlflowClient(tracking_uri=place, registry_uri=registry or place)
            yield client
    # A database may want a driver that is not there, a server be that of another program.
    except (MlflowException, SQLAlchemyError, OSError, ImportError, ParseError) as error:
        raise InputError(
            f"the MLflow store {without_password(uri)} cannot be used: {_reason(error)}. "
            + (_installing(error) or "Mend that, start the server, or name another ")
            + "store with --tracking-uri, such as http://host:5000 or sqlite:///runs/mlflow.db."
        ) from error
    finally:
        connections.setLevel(level)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Inside, variables are set that the user has not."""
    mine = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _default_root(uri: str) -> dict[str, str]:
    """Return what keeps the current folder out of a sqlite store that is made.

    MLflow 3.17 writes it into SQL as it is, a quote or a colon too, for its default experiment.
    """
    file = sqlite_file(uri)
    return {} if file is None else {"_MLFLOW_SERVER_ARTIFACT_ROOT": beside(file).as_uri()}


def _reason(error: BaseException) -> str:
    """Return why an error came about, in a line: what the system or the database said, if it did.

    MLflow and requests tell that at length, with every name that it has passed.
    """
    from sqlalchemy.exc import DBAPIError

    told: BaseException = error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DBAPIError):
        if isinstance(cause, OSError | ImportError):
            told = cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, DBAPIError) and cause.orig is not None:
        told = cause.orig
    lines = [line.strip() for line in str(told).splitlines()] or [type(told).__name__]
    return without_secrets(lines[0])[:_LONGEST].rstrip(".")


def _installing(error: BaseException) -> str | None:
    """Say what to install if an error is for a module that is missing."""
    name = error.name if isinstance(error, ImportError) else None
    if name is None:
        return None
    package = _PACKAGES.get(name.partition(".")[0], name.partition(".")[0])
    return f"Install its client (pip install {package}), or name another "


def _migration_lock(uri: str) -> FileLock | nullcontext[None]:
    """Return a lock: processes that open a new sqlite store at once die in its migration."""
    if (file := sqlite_file(uri)) is not None and uri not in _WHOLE:
        file.parent.mkdir(parents=True, exist_ok=True)
        # In a folder that cannot be written nobody makes a store anew.
        if os.access(file.parent, os.W_OK):
            return FileLock(file.parent / ".mlflow.lock", timeout=_OPENING)
    return nullcontext()


_WHOLE: set[str] = set()  # databases that have been looked into in this process


def _has_tables(uri: str) -> bool:
    """Say whether a store is there, of a database whether it has MLflow's tables.

    One that has other tables is an InputError: MLflow 3.17 puts its own into a database of another
    program, and brings one of an older MLflow up to date, which that can read no more. One that
    does not answer raises SQLAlchemy's error at once, where MLflow would ask ten times.
    """
    if urlsplit(uri).scheme.partition("+")[0] not in _DATABASES or uri in _WHOLE:
        return True
    import mlflow
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.pool import NullPool

    with create_engine(uri, poolclass=NullPool).connect() as database:
        tables = set(inspect(database).get_table_names())
        found = set(MigrationContext.configure(database).get_current_heads())
    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if found == set(migrations.get_heads()):
        _WHOLE.add(uri)
        return True
    problem, shown = "", shlex.quote(without_password(uri))
    if found and found <= {one.revision for one in migrations.walk_revisions()}:
        problem = "is of an older MLflow. Take a copy of it and run mlflow db upgrade " + shown
    elif found and "experiments" in tables:
        problem = f"is of a newer MLflow than {mlflow.__version__}. Install that"
    elif tables and "experiments" not in tables:  # with that alone, a process was killed making it
        problem = "is a database of another program. Leave it to that: give an empty one"
    if problem:
        raise InputError(
            f"the MLflow store {shown} {problem}, or name another store with --tracking-uri."
        )
    return False


def look_at(uri: str, experiment: str) -> str:
    """Say what a search would find at a tracking URI, writing nothing, or raise an InputError."""
    from sqlalchemy.exc import SQLAlchemyError

    file, shown = sqlite_file(uri), without_password(uri)
    if file is not None:
        check_writable(file.parent, f"MLflow store {shown}")
        if not file.exists():
            return f"{shown}, to be created"
    with suppress(SQLAlchemyError, ImportError):  # which opening it says
        if not _has_tables(uri):
            return f"{shown}, whose tables MLflow is to make"
    with opened_store(uri) as client:
        experiment = chosen_experiment(client, experiment)
        if (found := client.get_experiment_by_name(experiment)) is not None:
            open_experiment(client, experiment, trying=False)
    return f"{shown} answers; experiment {experiment}{'' if found else ', to be created'}"


def chosen_experiment(client: MlflowClient, name: str) -> str:
    """Return the name of the experiment of MLFLOW_EXPERIMENT_ID, where that alone is set.

    An InputError says that there is none.
    """
    from mlflow.exceptions import MlflowException

    number = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not number or os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        return name
    try:
        return str(client.get_experiment(number).name)
    except MlflowException as error:
        raise InputError(
            f"MLFLOW_EXPERIMENT_ID {number}: {_reason(error)}. Name an experiment that is there, "
            "or one to be made with MLFLOW_EXPERIMENT_NAME."
        ) from error


def open_experiment(client: MlflowClient, name: str, *, trying: bool = True) -> Experiment:
    """Return an experiment whose artifacts can be written, made if missing, or raise InputError.

    That is found out by `trying`: a small file is written there, and deleted if that is allowed.
    """
    from mlflow.entities import LifecycleStage
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    experiment = find_experiment(client, name)
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        uri = without_password(client.tracking_uri.replace("+pysqlite", "", 1))
        raise InputError(
            f"MLflow experiment {name}: it was deleted in MLflow. Restore it ({URI_VARIABLE}="
            f"{shlex.quote(uri)} mlflow experiments restore -x {experiment.experiment_id}), "
            "or name another one with MLFLOW_EXPERIMENT_NAME."
        )
    place, file = str(experiment.artifact_location), sqlite_file(client.tracking_uri)
    if file is not None and place.endswith(f"/{ARTIFACTS}") and beside(file).is_dir():
        place = beside(file).as_uri()  # where `bring_artifacts` puts them, or has put them
    try:
        repository = get_artifact_repository(place, tracking_uri=client.tracking_uri)
        if trying:
            _write_and_delete(repository)
        elif (folder := getattr(repository, "artifact_dir", None)) is not None:
            check_writable(Path(folder), place)
        else:
            repository.list_artifacts()
    except Exception as error:  # of an artifact store's library: anything
        raise InputError(
            f"MLflow experiment {name}: its artifacts lie in {without_password(place)}, which "
            f"cannot be used: {_reason(error)}. "
            + (_installing(error) or "Mend that, set its credentials, or name another ")
            + "experiment with MLFLOW_EXPERIMENT_NAME."
        ) from error
    return experiment


def _write_and_delete(repository: ArtifactRepository) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"lunar-tune-{uuid.uuid4().hex}.txt"
        file.write_text("written to see whether it can be\n")
        repository.log_artifact(str(file))
    with suppress(Exception):  # whoever may write need not be allowed to delete
        repository.delete_artifacts(file.name)


def find_experiment(client: MlflowClient, name: str) -> Experiment:
    """Return an experiment, made if missing; one that was deleted is returned as such."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        if not found.experiment_id:
            raise MlflowException("what answers there is no MLflow server")
        return found
    # MLflow would put the artifacts of a sqlite store into the current folder.
    file = sqlite_file(client.tracking_uri)
    place = beside(file).as_uri() if file is not None else None
    try:
        client.create_experiment(name, artifact_location=place, tags=dict(_EXPERIMENT_TAGS))
    except MlflowException:
        if client.get_experiment_by_name(name) is None:  # else another process was first
            raise
    return find_experiment(client, name)

"""The address of MLflow's store: the usual one, that of a search, as it is kept.

sqlite:////home/me/runs/mlflow.db    http://me:***@host:5000
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lunar_tune.config.options import is_store
from lunar_tune.errors import InputError
from lunar_tune.secrets import is_masked, without_password
from lunar_tune.study.stored_search import StoredSearch

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def default_tracking_uri(output: Path) -> str:
    """Return the URI of the sqlite store that all searches of an output folder share."""
    return _sqlite_uri(output / "mlflow.db")


def named_uri(given: str | None) -> str | None:
    """Return the URI that is given, else that of MLFLOW_TRACKING_URI, as MLflow's users expect.

    An InputError says of the variable, which another project may have set, that it names no store.
    """
    own = uri_of_environment()
    if given or own is None or is_store(own):
        return given or own
    raise InputError(
        f"{URI_VARIABLE}={without_password(own)} is set in the environment and names no MLflow "
        "server or database; MLflow 3 writes no folders of files. Unset it, or give "
        "--tracking-uri, such as sqlite:///runs/mlflow.db."
    )


def uri_of_environment() -> str | None:
    """Return what MLFLOW_TRACKING_URI says, if it says anything."""
    return os.environ.get(URI_VARIABLE) or None


def _sqlite_uri(file: Path) -> str:
    """Return the URI of a sqlite file; what it would end at, a `?` say, is escaped."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(file.resolve())).render_as_string()


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for any other store."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    return Path(make_url(uri).database or ":memory:")


def for_mlflow(uri: str) -> str:
    """Return a URI as MLflow is told it: of `sqlite:///` it makes folders of escaped names."""
    return uri.replace("sqlite:", "sqlite+pysqlite:", 1) if uri.startswith("sqlite:") else uri


def kept_uri(uri: str) -> str:
    """Return a tracking URI as it may be kept: without its password, the same from any folder."""
    file = sqlite_file(uri)
    return without_password(uri) if file is None else _sqlite_uri(file)


def with_password(kept: str, search: str) -> str:
    """Return a usable address, from one that `kept_uri` has masked, or raise an InputError."""
    if not is_masked(kept):
        return kept
    if (given := of_environment(kept)) is not None:
        return given
    raise InputError(
        f"{search}: the store {kept} needs a password, which is not kept; give the whole address "
        f"with --tracking-uri or in {URI_VARIABLE}."
    )


def of_environment(kept: str) -> str | None:
    """Return the address in MLflow's own variable if it names the same store, else None."""
    own = uri_of_environment()
    return own if own is not None and is_store(own) and kept_uri(own) == kept else None


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

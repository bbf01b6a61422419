"""Where a sqlite store's artifacts lie: beside it, after it was moved too, and on no server."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

from lunar_tune.errors import InputError
from lunar_tune.secrets import without_password
from lunar_tune.tracking.address import sqlite_file

ARTIFACTS = "mlartifacts"  # the folder of a sqlite store's artifacts, beside it
EXPERIMENT_NOTE = (  # by which an experiment is known that was made here
    "Searches of lunar-tune: a parent run for each search, a child run for "
    "each trial. *Views* has lists with their scores; `lunar-tune compare` adds charts."
)
_ADDRESSES = (  # where a store of MLflow 3 keeps addresses of artifacts, by table and column
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
# What MLflow asks a server for; `models` stands for an address that is kept with a model.
_REMOTE = {"http", "https", "mlflow-artifacts", "models"}


def check_addresses(uri: str) -> None:
    """Raise an InputError if a sqlite store keeps artifacts on a server, or cannot be read.

    Whoever wrote the file has chosen it, and MLflow would send it data and the user's token. Its
    own reading of an address counts, which a blank before it does not change.
    """
    from mlflow.utils.uri import get_uri_scheme

    file = sqlite_file(uri)
    if file is None or not file.is_file():
        return
    for table, column in _ADDRESSES[:2]:  # of registered models nothing is fetched
        try:
            with closing(sqlite3.connect(file)) as database:
                found = database.execute(
                    f"select distinct cast({column} as text) from {table} "  # noqa: S608
                    f"where {column} not like 'file:///%' and {column} not like '/%'"
                ).fetchall()
        except sqlite3.Error as error:
            if str(error).startswith("no such table"):  # which MLflow is about to make
                continue
            waiting = "Wait for who writes it, or name" if "locked" in str(error) else "Name"
            raise InputError(
                f"the MLflow store {file} cannot be used: {error}. {waiting} another store with "
                "--tracking-uri."
            ) from error
        for (address,) in found:
            scheme, server = get_uri_scheme(address.strip()), urlsplit(address.strip()).netloc
            # Without a server this one means the one that has the store, of which there is none.
            if scheme in _REMOTE and (server or scheme != "mlflow-artifacts"):
                raise InputError(
                    f"the MLflow store {file}: says that artifacts lie at "
                    f"{without_password(address)}, a server that would be sent data and MLflow's "
                    "token. If you trust it, give the address of its tracking server with "
                    "--tracking-uri; else use another --output."
                )


def beside(file: Path) -> Path:
    """Return the folder of a sqlite store's artifacts, or raise an InputError if it is a link.

    Whoever made the store could have all that it names written to, and shown.
    """
    folder = file.parent.resolve() / ARTIFACTS
    if folder.is_symlink():
        raise InputError(
            f"{folder}: is a link. What MLflow keeps lies beside its store: put the folder itself "
            "there, or move the whole folder with the store."
        )
    return folder


def bring_artifacts(uri: str) -> None:
    """Let a sqlite store that was moved or copied know the artifacts that came with it.

    MLflow keeps whole addresses of them, and would write to the old place for ever. Changed are
    those below the folder that `find_experiment` has named, where one lies beside the store now. A
    store of another make is left as it is.
    """
    file = sqlite_file(uri)
    if file is None or not file.is_file() or not (here := beside(file)).is_dir():
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database, database:
        named = database.execute(
            "select distinct artifact_location from experiments join experiment_tags using "
            "(experiment_id) where key = 'mlflow.note.content' and value = ?",
            (EXPERIMENT_NOTE,),
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

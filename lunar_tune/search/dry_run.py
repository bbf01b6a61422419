"""What a search would meet: its folder, its MLflow store and its cluster, left as they are."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import check_writable
from lunar_tune.search.backends.cluster import allocate_resources, ray_session
from lunar_tune.secrets import without_password
from lunar_tune.tracking.store import (
    default_tracking_uri,
    open_experiment,
    opened_store,
    sqlite_file,
    with_password,
)

__all__ = ["surroundings"]


def surroundings(config: SearchConfig) -> dict[str, str]:
    """Return what was found, to show; `plan_search` has looked at the folder already.

    Raises:
        InputError: Something cannot be used; all of it is said at once.
    """
    problems = Problems()
    store = problems.attempt(lambda: _store(config))
    cluster = problems.attempt(lambda: _cluster(config))
    problems.raise_if_any()
    return {
        "output": f"{config.output.resolve()} can be written",
        "tracking": str(store),
        "runs on": str(cluster),
    }


def _store(config: SearchConfig) -> str:
    """Say what a tracking store is; none is made, brought up to date or written."""
    uri = with_password(config.tracking_uri or default_tracking_uri(config.output), "the search")
    file, shown = sqlite_file(uri), without_password(uri)
    if file is None and not uri.startswith(("http://", "https://")):
        return f"{shown}, not looked at: opening it would write it"
    if file is not None:
        check_writable(file.parent, f"MLflow store {shown}")
        if not file.is_file():
            return f"{shown}, to be made"
    with tempfile.TemporaryDirectory() as folder:
        if file is not None:
            uri = _copied(file, Path(folder))
        with opened_store(uri) as client:
            if (found := client.get_experiment_by_name(EXPERIMENT)) is not None:
                open_experiment(client, EXPERIMENT)
    return f"{shown} answers; experiment {EXPERIMENT}{'' if found else ', to be made'}"


def _copied(file: Path, folder: Path) -> str:
    """Return the address of a copy of a sqlite store, since opening one may write it."""
    copy = folder / file.name
    try:
        with (
            closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error as error:
        raise InputError(f"the MLflow store {file} cannot be used: {error}.") from error
    return f"sqlite:///{copy}"


def _cluster(config: SearchConfig) -> str:
    """Say where trials would run; a cluster is asked, this machine's own Ray is not started."""
    if config.in_process:
        return "this process, one trial at a time"
    if config.address is None:
        return "this machine, by Ray"
    with ray_session(config):
        found = allocate_resources(config)
    trials = f"{found.concurrency} trials at once, each with {found.cpus:g} CPU cores"
    return f"the cluster at {config.address}: {trials} and {found.gpus:g} GPUs"

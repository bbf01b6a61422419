"""What takes long to make and is only read or copied: made by the first test process that asks."""

from __future__ import annotations

import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that lasts as long as the run and is the same in all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder that holds what was made in it, by this process or another one.

    Args:
        folder: Below `shared_folder`; it never moves, for what is made may know its place.
        make: Called with the folder, empty. If it fails, whoever asks next tries again.
    """
    finished = folder.with_name(f"{folder.name}.made")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


def make_store(folder: Path) -> None:
    """Make an empty MLflow store, `mlflow.db`, as opening one for the first time does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lunar_tune.tracking.address import default_tracking_uri
        from lunar_tune.tracking.store import opened_store

        with opened_store(default_tracking_uri(folder)) as client:
            client.search_experiments()


def copy_store(made: Path, place: Path) -> Path:
    """Copy a store that others may have open."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(place)) as target:
        source.backup(target)
    return place

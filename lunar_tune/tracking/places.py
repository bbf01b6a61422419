"""Which folder a search's runs belong to: a copy has runs of its own, a folder that moved its own.

A store knows it, since a folder can be copied with all that it says of itself: the search's run has
a tag with the place of its folder, written anew by whoever writes the run.
"""

from __future__ import annotations

import hashlib
import platform
import uuid
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lunar_tune.errors import InputError
from lunar_tune.study.folder import Folder
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.address import sqlite_file

if TYPE_CHECKING:
    from mlflow.entities import Run

FOLDER = "lunar_tune.folder"  # the tag


class Place(NamedTuple):
    """Where a folder is, as a store can tell it from all others."""

    machine: str
    number: str  # inode; the same from every machine that mounts the folder
    path: str
    """From the folder of a sqlite store, which needs neither machine nor number: it is a file among
    the same files, and may be moved or copied with them. Absolute for any other store."""

    @classmethod
    def of(cls, folder: Path, uri: str) -> Place:
        """Return the place of a folder that is there, as the store at a URI tells it."""
        if (file := sqlite_file(uri)) is not None:
            return cls("", "", relpath(folder, file.resolve().parent))
        machine = f"{platform.node()} {uuid.getnode()}"
        machine = hashlib.sha256(machine.encode()).hexdigest()[:12]
        return cls(machine, str(folder.stat().st_ino), str(folder))

    @property
    def tag(self) -> str:
        """The place as a text."""
        return ":".join(self)


def other_owner(run: Run, folder: Folder, identity: str, uri: str) -> str | None:
    """Return whose a run of a search's identity is, if another folder has it: the original.

    None says that it is this folder's: it lay here before, or where it lay there is no such search
    any more, so that this is the one, moved. Another machine's folder is taken to be there.
    """
    here, file = Place.of(folder.path, uri), sqlite_file(uri)
    there = here._replace(number="", path=run.data.tags["search"])  # of a run without the tag
    if FOLDER in run.data.tags:
        there = Place(*run.data.tags[FOLDER].split(":", 2))
    beside = folder.path.parent if file is None else file.resolve().parent
    other = (beside / there.path).resolve()
    if here.machine != there.machine:
        is_here = other == folder.path and here.number == there.number
        return None if is_here else f"{other} on another machine"
    return str(other) if other != folder.path and _has(Folder(other), identity) else None


def _has(folder: Folder, identity: str) -> bool:
    """Say whether a folder has the search of an identity, as far as can be seen."""
    try:
        folder.journal.stat()
        place = StoredStudy.read(folder.journal).notes.get("mlflow")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, InputError):  # another user's, or damaged
        return True
    return place is not None and place["id"] == identity

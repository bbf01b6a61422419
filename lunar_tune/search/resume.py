"""Going on with a search that has begun: what it was told, what may change, who works on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lunar_tune import __version__
from lunar_tune.config.fields import flag_of, options_of
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.search.plan import SearchPlan
from lunar_tune.search.signature import signature_of
from lunar_tune.study.folder import Folder, find_search, searches_in
from lunar_tune.study.stored_search import StoredConfig
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.store import with_password

__all__ = [
    "BusySearchError",
    "alone",
    "check_unchanged",
    "is_finished",
    "resumed",
    "unfinished_like",
]

_LOOKED_AT = 5


class BusySearchError(InputError):
    """Another process works on the same search."""


def resumed(given: Mapping[str, Any], problems: Problems) -> tuple[SearchConfig, Mapping[str, str]]:
    """Return the configuration of a search that has begun, with what is given anew.

    Args:
        given: Options by field; `resume` names the search, `output` is where names are looked up.
        problems: Where it is noted that an option cannot change any more.

    Returns:
        The configuration, and the origins of what it says.

    Raises:
        InputError: There is no such search, or what it was told cannot be read.
    """
    folder = find_search(given["resume"], given.get("output", SearchConfig().output))
    stored, known = StoredConfig.read(folder), options_of(SearchConfig)
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name == "force" or (name in known and known[name].resume):
            changed[name] = value
        elif name != "resume" and value != getattr(stored.search, name):
            problems.add(
                f"{flag_of(name)}: {folder.name} was begun with another value or none, and its "
                "trials would not compare. Leave it out, or start a new search."
            )
    changed["output"] = folder.path.parent
    uri = changed.get("tracking_uri", stored.search.tracking_uri)
    if uri is not None:
        with problems.collect():
            changed["tracking_uri"] = with_password(uri, folder.name)
    config = dataclasses.replace(stored.search, resume=folder.name, **changed)
    return config, stored.origins


def check_unchanged(plan: SearchPlan, folder: Folder) -> str | None:
    """Check that a search's earlier trials compare with what is planned.

    Returns:
        A warning where a newer version of the package cannot tell; None otherwise.

    Raises:
        InputError: Data or settings have changed.
    """
    stored = StoredStudy.read(folder.journal)
    before = stored.notes.get("signature") if stored is not None else None
    if before is None or before == signature_of(plan):
        return None
    version = None
    with suppress(InputError):  # a mirror, which may be missing
        version = StoredConfig.read(folder).resolved.get("version")
    if version not in (None, __version__):
        return (
            f"{folder.name} was begun with lunar-tune {version}, whose defaults may differ from "
            f"those of {__version__}"
        )
    raise InputError(
        f"{folder.path} was searched with other settings or data, so its trials would not compare. "
        "Give back the data or space that it had, or start a new search."
    )


@contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """Inside, no other process works on a search; one that dies holds no lock.

    Raises:
        BusySearchError: Another process does.
    """
    try:
        with FileLock(folder.lock, timeout=0):
            yield
    except Timeout as error:
        raise BusySearchError(
            f"{folder.name}: another process works on this search ({folder.path}). Wait until it "
            "ends, or choose another --name."
        ) from error


def is_finished(folder: Folder, num_trials: int) -> bool:
    """Say whether a search has ended by itself, with as many trials as it is to have."""
    stored = StoredStudy.read(folder.journal)
    if stored is None or not stored.has_ended(1):
        return False
    return sum(row.counts for row in stored.rows) >= num_trials


def unfinished_like(signature: str, output: Path) -> Folder | None:
    """Return the last unfinished search with a signature, of the few that were written to last.

    Args:
        signature: Of the search that is about to begin.
        output: Folder of all searches.
    """
    for folder in searches_in(output)[:_LOOKED_AT]:
        stored = None
        with suppress(InputError, OSError):  # another search's damage is not this one's affair
            stored = StoredStudy.read(folder.journal)
        if stored is None or stored.notes.get("signature") != signature:
            continue
        if stored.notes.get("num_trials") is None:
            return folder
    return None

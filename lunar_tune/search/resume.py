"""Going on with a search that has begun: what it was told, what may change, who works on it.

Covers: the configuration of a search by its name, with what may be given anew; refusing what would
make its trials incomparable; the lock that keeps two processes from one search.
Does not cover: the study's trials that were left running (`study`), MLflow (`trial_runs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lunar_tune import __version__
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.search.plan import SearchPlan
from lunar_tune.search.signature import signature_of
from lunar_tune.study.folder import Folder, find_search, searches_in
from lunar_tune.study.stored_config import StoredConfig
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.store import with_password

__all__ = [
    "BusySearchError",
    "alone",
    "check_run",
    "check_unchanged",
    "is_finished",
    "resumed",
    "unfinished_like",
]

MAY_CHANGE = (
    "num_trials",
    "time_budget",
    "trial_timeout",
    "max_failures",
    "tracking_uri",
    "gpus_per_trial",
    "cpus_per_trial",
    "concurrency",
    "address",
    "keep",
    "system_metrics",
    "output",
)
"""Options of a search that decide no score."""
RUN_MAY_CHANGE = (
    # Where something lies; that it is the same is checked (`check_unchanged`).
    "model",
    "model_path",
    "data",
    "retain_data",
    "factual_data",
    "reference_prompts",
    "refusals",
    "chat_template",
    "embedding_model",
    "device",
    "engine.memory_budget",
    "engine.cache_limit",
    "engine.verify_weights",
    "decoding.batch_size",
)
"""Those of its runs, by their fields."""
_LOOKED_AT = 5


class BusySearchError(InputError):
    """Another process works on the same search."""


def resumed(
    name: str,
    *,
    output: Path,
    given: Mapping[str, Any],
    problems: Problems,
) -> tuple[SearchConfig, Mapping[str, str]]:
    """Return the configuration of a search that has begun, with what is given anew.

    Args:
        name: Of the search, or its folder.
        output: Where names are looked up.
        given: Options of the search that were given beside the name, by field.
        problems: Where it is noted that an option cannot change any more.

    Returns:
        The configuration, and the origins of what it says.

    Raises:
        InputError: There is no such search, or what it was told cannot be read.
    """
    folder = find_search(name, output)
    stored = StoredConfig.read(folder)
    for field in sorted(set(given) - set(MAY_CHANGE)):
        if given[field] != getattr(stored.search, field):
            _refuse(f"--{field.replace('_', '-')}", folder.name, problems)
    changed = {field: value for field, value in given.items() if field in MAY_CHANGE}
    changed["output"] = folder.path.parent
    uri = changed.get("tracking_uri", stored.search.tracking_uri)
    if uri is not None:
        with problems.collect():
            changed["tracking_uri"] = with_password(uri, folder.name)
    return dataclasses.replace(stored.search, resume=True, **changed), stored.origins


def check_run(
    search: SearchConfig, run: RunOptions, flags: Mapping[str, str], problems: Problems
) -> None:
    """Note which options of a search's runs were given anew and cannot change any more.

    Args:
        search: That has begun.
        run: Its options with what was given anew.
        flags: Of the options that were given, by field.
        problems: Where it is noted.
    """
    for field, flag in flags.items():
        before, after = (attrgetter(field)(one) for one in (search.run, run))
        if field not in RUN_MAY_CHANGE and before != after:
            _refuse(flag, str(search.name), problems)


def _refuse(flag: str, name: str, problems: Problems) -> None:
    problems.add(
        f"{flag}: {name} was begun with another value or none, and its trials would not "
        "compare. Leave it out, or start a new search."
    )


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
    """Say whether a search has ended by itself, with as many trials as it is to have.

    One that MLflow does not have whole is not: it is gone on with until it has.
    """
    stored = StoredStudy.read(folder.journal)
    if stored is None or not stored.has_ended(1) or stored.notes.get("mirrored") is False:
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

"""Going on with a search that has begun: what it was told, what may change, what must not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from lunar_tune import __version__
from lunar_tune.config.fields import flag_of, options_of
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.data.records import records_digest
from lunar_tune.errors import InputError, Problems
from lunar_tune.search.plan import SearchPlan
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
    "signature_of",
    "unfinished_like",
]

_LOOKED_AT = 5


class BusySearchError(InputError):
    """Another process works on the same search."""


def resumed(given: Mapping[str, Any], problems: Problems) -> tuple[SearchConfig, Mapping[str, str]]:
    """Return the configuration of a search that has begun, changed by what is given, and origins.

    Of `given`, options by field, `resume` names the search, and names are looked up in `output`.
    That an option cannot change any more is noted in `problems`.

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

    Where a newer version of the package cannot tell, a warning is returned.

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


def signature_of(plan: SearchPlan) -> str:
    """Return a digest of all that decides a search's trials, but for how many there are."""
    config, spec, data = plan.config, plan.spec, plan.spec.data
    held = data.held_out
    records = (
        *(data.fit_forget, data.fit_retain, data.forget, data.retain),
        *(data.retain_sample, data.factual),
        *((held.forget, held.retain, held.factual) if held is not None else ()),
    )
    decided = {
        name: to_jsonable_python(getattr(config, name))
        for name, said in options_of(SearchConfig).items()
        if said.decides
    }
    # Of the space what is tried, not the file that says so, and not what comes first.
    left_out = {"origin", "starting_points"}
    space = {key: value for key, value in plan.space.to_dict().items() if key not in left_out}
    model_path, embedding_model = (
        None if path is None else Path(path).name
        for path in (config.model_path, spec.embedding_model)
    )
    parts: list[Any] = [
        [spec.model.name, spec.model.revision, model_path],
        [spec.chat.template, spec.chat.system_prompt],
        [list(spec.metrics), embedding_model],
        decided,
        space,
        [records_digest(one) for one in records],
        [list(data.reference_prompts), list(data.refusals)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def alone(folder: Folder, what: str = "search", option: str = "--name") -> Iterator[None]:
    """Inside, no other process works on a search or a table; one that dies holds no lock.

    Raises:
        BusySearchError: Another process does.
    """
    try:
        with FileLock(folder.lock, timeout=0):
            yield
    except Timeout as error:
        raise BusySearchError(
            f"{folder.name}: another process works on this {what} ({folder.path}). Wait until it "
            f"ends, or choose another {option}."
        ) from error


def is_finished(folder: Folder, num_trials: int) -> bool:
    """Say whether a search has ended by itself, with as many trials as it is to have."""
    stored = StoredStudy.read(folder.journal)
    if stored is None or not stored.has_ended(1):
        return False
    return sum(row.counts for row in stored.rows) >= num_trials


def unfinished_like(signature: str, output: Path) -> Folder | None:
    """Return the last unfinished search with a signature, of the few that were written to last."""
    for folder in searches_in(output)[:_LOOKED_AT]:
        with suppress(InputError, OSError):  # another search's damage is not this one's affair
            stored = StoredStudy.read(folder.journal)
            notes = stored.notes if stored is not None else {}
            if notes.get("signature") == signature and notes.get("num_trials") is None:
                return folder
    return None
